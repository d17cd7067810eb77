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
    made = plan(train__image_sizes=[16, 24, 32], train__steps=10)
    assert [made.image_size(step) for step in range(10)] == [16] * 4 + [24] * 3 + [32] * 3
    assert plan(train__image_sizes=[16, 24, 32], train__steps=2).image_size(1) == 24


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
