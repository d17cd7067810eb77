"""The plan: how many steps, and the learning rate at each, from the first to the very last."""

import math
import warnings

import numpy as np
import pytest
import torch

from lib.errors import BadInput
from lib.loops.schedule import Plan


@pytest.fixture
def plan(tmp_path, tiny_params):
    def make(num_samples: int = 320, **overrides) -> Plan:
        """10 steps an epoch unless told otherwise."""
        return Plan(tiny_params(tmp_path, **{"train.steps": 100} | overrides), num_samples)

    return make


@pytest.fixture
def box_plan(tmp_path, tiny_detect):
    def make(**overrides) -> Plan:
        """Of detection: 10 steps an epoch."""
        return Plan(tiny_detect(tmp_path, **{"train.steps": 100} | overrides), 40)

    return make


def factors(plan: Plan) -> np.ndarray:
    return np.array([plan.lr_factor(update) for update in range(plan.num_steps)])


# -- the learning rate ------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, last", [
    ("constant", 1.0), ("cosine", 0.01), ("one_cycle", 0.01), ("multistep", 0.25),
])
@pytest.mark.parametrize("warmup_epochs", [0.0, 2.0])
def test_initial_peak_and_final_learning_rate_are_those_of_the_params(plan, schedule, last,
                                                                      warmup_epochs):
    """C9 of the failures: exact at the first step, at the end of warm-up and at the last step."""
    found = factors(plan(
        optim__schedule=schedule, optim__warmup_epochs=warmup_epochs, optim__warmup_start=0.1,
        optim__final_lr=0.01, optim__milestones_epochs=[4, 8], optim__gamma=0.5,
    ))
    warmup = int(10 * warmup_epochs)
    assert len(found) == 100
    assert found[0] == pytest.approx(0.1 if warmup else 1.0, rel=1e-12)
    assert found[warmup] == found.max() == 1.0
    assert found[-1] == pytest.approx(last, rel=1e-12)
    assert (np.diff(found[: warmup + 1]) > 0).all() and (np.diff(found[warmup:]) <= 0).all()
    assert (found > 0).all()


def test_cosine_is_torchs_cosine(plan):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=99, eta_min=0.05)
    found = factors(plan(optim__schedule="cosine", optim__final_lr=0.05))
    assert found == pytest.approx(torch_rates(optimizer, theirs, 100), abs=1e-9)


def test_one_cycle_is_torchs_one_cycle(plan):
    """Torch counts the peak's step within pct_start and quotes the end against the start."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=100, pct_start=31 / 100, div_factor=25,
        final_div_factor=10, cycle_momentum=False,
    )
    found = factors(plan(optim__schedule="one_cycle", optim__warmup_epochs=3.0,
                         optim__warmup_start=1 / 25, optim__final_lr=1 / 250))
    assert found == pytest.approx(torch_rates(optimizer, theirs, 100), abs=1e-9)


def torch_rates(optimizer, scheduler, count: int) -> list[float]:
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup_epochs, flat, start", [
    (0.0, 0.5, 50), (2.0, 0.5, 50), (2.0, 0.1, 20), (2.0, 0.0, 20), (0.0, 0.72, 72),
])
def test_flat_cosine_keeps_its_peak_for_a_share_of_the_run(plan, warmup_epochs, flat, start):
    """The share counts the warm-up; from there on it is torch's cosine to the very last step."""
    found = factors(plan(optim__schedule="cosine", optim__flat=flat, optim__final_lr=0.05,
                         optim__warmup_epochs=warmup_epochs))
    warmup = int(10 * warmup_epochs)
    assert (found[:warmup] < 1).all() and (found[warmup : start + 1] == 1).all()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 99 - start, eta_min=0.05)
    assert found[start:] == pytest.approx(torch_rates(optimizer, theirs, 100 - start), abs=1e-9)
    assert (np.diff(found[start:]) < 0).all() and found[-1] == pytest.approx(0.05)


@pytest.mark.parametrize("schedule", ["constant", "one_cycle", "multistep"])
def test_flat_is_of_cosine_alone(plan, schedule):
    flat = factors(plan(optim__schedule=schedule, optim__flat=0.5, optim__warmup_epochs=1.0))
    assert flat.tolist() == factors(plan(optim__schedule=schedule,
                                         optim__warmup_epochs=1.0)).tolist()


def test_multistep_drops_at_its_milestones(plan):
    found = factors(plan(optim__schedule="multistep", optim__milestones_epochs=[3, 6.5],
                         optim__gamma=0.1))
    assert found == pytest.approx([1.0] * 30 + [0.1] * 35 + [0.01] * 35)


def test_warm_up_is_a_straight_line_but_for_one_cycle(plan):
    straight = factors(plan(optim__schedule="cosine", optim__warmup_epochs=2.0,
                            optim__warmup_start=0.2))[:21]
    assert straight == pytest.approx(np.linspace(0.2, 1, 21))
    curved = factors(plan(optim__schedule="one_cycle", optim__warmup_epochs=2.0,
                          optim__warmup_start=0.2))[:21]
    assert curved == pytest.approx(0.6 - 0.4 * np.cos(np.linspace(0, math.pi, 21)))


def test_a_step_past_the_end_keeps_the_last_learning_rate(plan):
    """OneCycle's crash on the very last step cannot happen."""
    made = plan(optim__schedule="one_cycle", optim__warmup_epochs=1.0, optim__final_lr=0.1)
    assert made.lr_factor(100) == made.lr_factor(99) == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle", "multistep"])
def test_the_shortest_runs_have_a_learning_rate(plan, schedule, steps):
    found = factors(plan(optim__schedule=schedule, train__steps=steps))
    assert found[0] == 1.0 and np.isfinite(found).all()


# -- steps, epochs, evaluations ---------------------------------------------------------------


@pytest.mark.parametrize("num_samples, batch, epochs, steps", [
    (320, 32, 10, 100), (351, 32, 10, 100), (320, 32, 2.5, 25), (320, 32, 0.01, 1), (32, 32, 3, 3),
])
def test_steps_follow_from_epochs_and_full_batches(plan, num_samples, batch, epochs, steps):
    made = plan(num_samples, train__steps=None, train__epochs=epochs, train__batch_size=batch)
    assert made.num_steps == steps
    assert len(list(made.requests())) == steps


@pytest.mark.parametrize("every, count", [(1, 10), (3, 4), (100, 1), (0.25, 50)])
def test_evaluations_are_counted_as_the_loop_makes_them(plan, every, count):
    made = plan(train__eval_every_epochs=every)
    happen = sum(step % made.eval_steps == 0 or step == 100 for step in range(1, 101))
    assert made.num_evals == happen == count


def test_fewer_images_than_a_batch_is_refused_with_both_numbers(plan):
    with pytest.raises(BadInput, match="32.* 31 images"):
        plan(31)


def test_sizes_change_at_equal_parts_of_the_run(plan):
    made = plan(train__image_sizes=[16, 24, [32, 40]], train__steps=10)
    assert made.sizes == [(16, 16), (24, 24), (32, 40)]
    assert [made.size(step) for step in range(10)] == (
        [(16, 16)] * 4 + [(24, 24)] * 3 + [(32, 40)] * 3)
    assert plan(train__image_sizes=[16, 24, 32], train__steps=2).size(1) == (24, 24)


# -- detection: multi-scale, and the last epochs ----------------------------------------------


def test_multi_scale_sizes_are_whole_strides_around_the_asked_size(box_plan):
    made = box_plan(data__image_size=[256, 384], data__boxes__multi_scale=0.4)
    sizes = np.array([made.size(step) for step in range(100)])
    assert (sizes % 32 == 0).all()
    assert (abs(sizes - (256, 384)) <= 0.4 * np.array((256, 384)) + 16).all()
    assert len(set(map(tuple, sizes.tolist()))) > 5  # rounded from one factor for both sides:
    assert np.abs(sizes[:, 0] / 256 - sizes[:, 1] / 384).max() <= 16 / 256 + 16 / 384
    assert abs(sizes.mean(0) / (256, 384) - 1).max() < 0.1
    assert made.sizes == [(256, 384)]
    assert "up to 40% more or less" in made.facts()["image sizes (height x width)"]


@pytest.mark.parametrize("first_step", [1, 37, 99])
def test_a_resumed_plan_has_the_sizes_it_would_have_had(box_plan, first_step):
    scaled = {"data.image_size": 128, "data.boxes.multi_scale": 0.5, "train.accumulate": 2}
    whole, resumed = (list(box_plan(**scaled).requests(step)) for step in (0, first_step))
    assert [(r.step, r.size, r.is_late) for r in resumed] == [
        (r.step, r.size, r.is_late) for r in whole if r.step >= first_step]
    assert all(one.size == other.size for one, other in zip(whole[::2], whole[1::2], strict=True))
    other = box_plan(**scaled, seed=1)
    assert [r.size for r in other.requests()] != [r.size for r in whole]


def test_without_multi_scale_the_size_is_left_as_asked(box_plan):
    assert {r.size for r in box_plan(data__image_size=[72, 104]).requests()} == {(72, 104)}


@pytest.mark.parametrize("plain_epochs, first_late", [(0.0, 100), (3.0, 70), (0.5, 95), (99.0, 0)])
def test_the_last_epochs_are_late(box_plan, plain_epochs, first_late):
    made = box_plan(data__boxes__mosaic=1.0, data__boxes__plain_epochs=plain_epochs)
    assert [r.step for r in made.requests() if r.is_late] == list(range(first_late, 100))
    assert all(r.is_late == (r.step >= first_late) for r in made.requests(80))


# -- in the loop ------------------------------------------------------------------------------


def test_the_loop_steps_with_these_rates_and_without_a_warning(tmp_path, tiny_params):
    """Rates recorded are the peak times the plan's factors; nobody warns of the order of steps."""
    from lib.loops.train import train
    from lib.run import Run
    from lib.tasks import build_task

    params = tiny_params(tmp_path, optim__schedule="one_cycle", optim__final_lr=0.1,
                         train__batch_size=8, train__steps=6, data__classes=["0", "1"],
                         optim__warmup_epochs=0.06, model__name="test_convnext")
    task = build_task(params, torch.device("cpu"))
    run = Run(tmp_path / "run")
    run.path.mkdir()
    run.start("train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(task, params, run, lr=0.02)
    made = Plan(params, task.num_train)
    assert made.warmup_steps == 2
    rates = [row["lr"] for row in run.rows("train") if row["kind"] == "step"]
    assert rates == pytest.approx(0.02 * factors(made), rel=1e-9)
    assert rates[0] == pytest.approx(0.02 * 0.04) and rates[-1] == pytest.approx(0.002)
