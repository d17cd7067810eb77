"""A learning rate where the curve supports one, none where it does not, and nothing touched."""

import copy
import math
import random

import numpy as np
import pytest
import torch

from lib.loops import lr_finder
from lib.loops.lr_finder import Smoother, Sweep, suggest
from lib.run import Run
from lib.tasks import build_task
from lib.watch.diagnose import lr_checks

CPU = torch.device("cpu")
LRS = np.geomspace(1e-6, 10, 100)


def sweep_of(losses, diverged_at: float | None = None, lrs: np.ndarray = LRS) -> Sweep:
    """A sweep with these losses, smoothed as the finder does."""
    smoother = Smoother(0.9)
    losses = np.asarray(losses, float)
    return Sweep(lrs[: len(losses)], losses, np.array([*map(smoother, losses)]), diverged_at)


def fall(centre: float, width: float = 0.5, start: float = 2.3, end: float = 0.4) -> np.ndarray:
    """A loss that falls about the learning rate `centre`, over some decades."""
    decades = (np.log10(LRS) - math.log10(centre)) / width
    return end + (start - end) / (1 + np.exp(decades))


def noise(scale: float, count: int = len(LRS), seed: int = 0) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal(count)


def cliff(centre: float, scale: float) -> tuple[np.ndarray, float | None]:
    """The losses of a fall about `centre` and a blow-up past 300 times that, with noise."""
    losses = fall(centre) + 50 * np.maximum(0, LRS / centre / 300 - 1)
    end = int(np.flatnonzero(losses > 8)[0]) if (losses > 8).any() else len(losses)
    diverged_at = float(LRS[end]) if end < len(LRS) else None
    return losses[:end] + noise(scale, end), diverged_at


# -- suggestions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("centre", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("scale", [0.0, 0.05])
def test_a_curve_that_falls_gets_a_rate_on_its_slope(centre, scale):
    """Between a third and 25 times where it falls fastest (smoothing lags), noise or not."""
    losses, diverged_at = cliff(centre, scale)
    found = suggest(sweep_of(losses, diverged_at))
    assert found.lr is not None, found.reason
    assert centre / 3 <= found.lr <= centre * 25
    assert found.lr < (diverged_at or math.inf) / 2.9
    assert found.steepest is not None and centre / 2 < found.steepest < centre * 25


def test_a_suggestion_moves_with_the_curve():
    low, high = (suggest(sweep_of(*cliff(centre, 0.02))).lr for centre in (1e-4, 1e-2))
    assert 10 < high / low < 300


def test_the_suggestion_keeps_away_from_where_the_loss_blows_up():
    """A fall right up to the cliff: not more than a third of the cliff's rate."""
    losses = np.linspace(2.3, 0.5, 60)
    found = suggest(sweep_of(losses, float(LRS[60])))
    assert found.lr is not None and found.lr <= LRS[60] / 3


@pytest.mark.parametrize("losses, why", [
    (2.3 + noise(0.01), "flat"),
    (2.3 - 0.02 * np.arange(100) / 99, "flat"),
    (2.3 + 0.02 * np.arange(100) / 99, "flat"),
    (2.3 + noise(1.5), "noisy"),
    (fall(1e-3, start=2.3, end=1.9) + noise(0.8, seed=1), "noisy"),
])
def test_flat_and_noisy_curves_get_no_suggestion_and_the_reason(losses, why):
    found = suggest(sweep_of(losses))
    assert found.lr is None and found.reason.startswith(why), found


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_a_loss_that_blows_up_at_once_gets_no_suggestion(steps):
    found = suggest(sweep_of(2.3 * 2.0 ** np.arange(steps), float(LRS[steps])))
    assert found.lr is None and "blew up" in found.reason and f"{LRS[steps]:.2e}" in found.reason


def test_a_curve_that_only_rises_gets_no_suggestion():
    found = suggest(sweep_of(2.3 * 1.05 ** np.arange(40), float(LRS[40])))
    assert found.lr is None and found.reason.startswith("flat")


def test_smoothing_is_without_a_bias_to_the_start():
    smoother = Smoother(0.9)
    assert [smoother(3.0) for _ in range(5)] == pytest.approx([3.0] * 5)
    smoother = Smoother(0.5)
    assert [smoother(value) for value in (4.0, 1.0)] == pytest.approx([4.0, 2.0])


# -- the sweep on real digits ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory, digits):
    """One real sweep, and what surrounded it before and after."""
    import yaml

    from lib import params as params_module

    folder = tmp_path_factory.mktemp("finder")
    (folder / "run").mkdir()
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump({
        "model": {"name": "test_resnet", "drop_rate": 0.1},
        "data": {"format": "folder", "root": str(digits), "image_size": 32, "num_workers": 2,
                 "augment": {"scale": [0.7, 1.0], "ratio": [0.9, 1.1], "hflip": 0.0}},
        "train": {"steps": 60, "batch_size": 32},
        "lr_finder": {"min_lr": 1e-4, "max_lr": 100.0, "steps": 60, "trial_steps": 15},
        "machine": {"device": "cpu"},
    }))
    params = params_module.load(file)
    task = build_task(params, CPU)
    task.model.train()
    run = Run(folder / "run")
    run.start("lr_finder")
    before = lr_finder.fingerprint(task), copy.deepcopy(task.model.state_dict()), surroundings()
    sweep = lr_finder.sweep(task, params, run)
    suggestion = suggest(sweep)
    trial = lr_finder.trial(task, params, suggestion.lr or 0.05)
    after = lr_finder.fingerprint(task), copy.deepcopy(task.model.state_dict()), surroundings()
    return {"params": params, "task": task, "rows": run.rows("lr_finder"), "sweep": sweep,
            "suggestion": suggestion, "trial": trial, "before": before, "after": after}


def surroundings() -> tuple:
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


def test_weights_buffers_and_generators_are_what_they_were(found):
    (_, weights, generators), (_, weights_after, generators_after) = found["before"], found["after"]
    for name, tensor in weights.items():
        assert torch.equal(tensor, weights_after[name]), name
    assert generators == generators_after
    assert found["task"].model.training
    assert all(weight.grad is None for weight in found["task"].model.parameters())
    assert lr_finder.untouched(found["before"][0], found["after"][0]).passed


@pytest.mark.parametrize("touch", ["weight", "running_var", "torch", "numpy", "random"])
def test_the_fingerprint_notices_each_thing_that_must_not_change(tmp_path, tiny_params, touch):
    task = build_task(tiny_params(tmp_path), CPU)
    before = lr_finder.fingerprint(task)
    assert lr_finder.fingerprint(task) == before
    if touch in ("weight", "running_var"):
        tensor = next(t for n, t in task.model.state_dict().items() if n.endswith(touch))
        tensor[(0,) * tensor.dim()] += 1e-3
    else:
        {"torch": lambda: torch.rand(1), "numpy": np.random.rand, "random": random.random}[touch]()
    check = lr_finder.untouched(before, lr_finder.fingerprint(task))
    assert not check.passed and check.severity == "error"


def test_the_sweep_goes_through_its_range_log_evenly_and_is_recorded(found):
    sweep = found["sweep"]
    rows = [row for row in found["rows"] if row["kind"] == "step"]
    assert [row["lr"] for row in rows] == sweep.lrs.tolist()
    assert [row["loss"] for row in rows] == sweep.losses.tolist()
    np.testing.assert_allclose(sweep.lrs, np.geomspace(1e-4, 100, 60)[: len(sweep.lrs)])


def test_a_real_sweep_suggests_a_rate_below_its_divergence(found):
    sweep, suggestion = found["sweep"], found["suggestion"]
    assert suggestion.lr is not None, suggestion.reason
    assert 1e-3 < suggestion.lr < 3
    assert suggestion.lr < (sweep.diverged_at or math.inf) / 2.9


def checks(found, lr: float, trial: list[float]) -> dict:
    params = found["params"].model_copy(
        update={"optim": found["params"].optim.model_copy(update={"lr": lr})})
    return {check.id: check for check in lr_checks(
        params, found["suggestion"].lr, found["suggestion"].reason, found["sweep"].diverged_at,
        lr, trial)}


def test_a_trial_at_the_suggestion_learns(found):
    assert len(found["trial"]) == 15
    assert checks(found, found["suggestion"].lr, found["trial"])["trial"].passed


def test_a_trial_at_a_huge_rate_does_not_and_the_rate_is_named(found):
    trial = lr_finder.trial(found["task"], found["params"], 50.0)
    check = checks(found, 50.0, trial)["trial"]
    assert not check.passed and check.severity == "error" and "5.00e+01" in check.advice


def test_a_loss_that_is_no_number_ends_the_sweep_there(tmp_path, tiny_params):
    task = build_task(tiny_params(tmp_path), CPU)
    params = tiny_params(tmp_path, lr_finder__steps=30)
    honest, calls = task.losses, []

    def losses(model, batch):
        calls.append(1)
        values = honest(model, batch)
        return {"loss": values["loss"] * (math.inf if len(calls) == 13 else 1)}

    task.losses = losses
    run = Run(tmp_path)
    run.start("lr_finder")
    sweep = lr_finder.sweep(task, params, run)
    assert len(sweep.lrs) == 12 and len(calls) == 13
    assert sweep.diverged_at == pytest.approx(np.geomspace(1e-6, 10, 30)[12])
