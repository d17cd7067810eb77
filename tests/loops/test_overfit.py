"""The memorisation gate on real digits: what passes it, and what it must catch."""

import math

import pytest
import torch
from torch import nn

from lib.loops.overfit import OverfitResult, overfit
from lib.preflight import contracts
from lib.run import Run
from lib.tasks import build_task

CPU = torch.device("cpu")


@pytest.fixture
def gate(tmp_path, tiny_params):
    """Runs the gate; `spoil(task)` breaks something first. Returns task, result, records."""

    def go(spoil=lambda task: None, **overrides):
        params = tiny_params(tmp_path, **{
            "overfit.num_batches": 2, "overfit.batch_size": 12, "overfit.steps": 150,
        } | overrides)
        task = build_task(params, CPU)
        spoil(task)
        run = Run(tmp_path / "run")
        run.path.mkdir()
        run.start("overfit")
        frozen = task.frozen_batches(params.overfit.num_batches, params.overfit.batch_size)
        return task, overfit(task, params, run, frozen), run.rows("overfit")

    return go


def test_real_digits_are_memorised_and_the_gate_ends_early(gate):
    task, result, rows = gate()
    (first, _) = task.frozen_batches(2, 12)
    assert result.metrics["top1"] == 1.0 and task.memorised(result.metrics).passed
    assert result.finite and result.dead_parameters == ()
    assert contracts.gradients_reach(result).passed and contracts.stayed_finite(result).passed
    assert all(c.passed for c in contracts.initial_losses(task, result, first))
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == list(range(1, result.num_steps + 1))
    assert result.num_steps < 150 and steps[-1]["loss"] < 0.3 * steps[0]["loss"]
    assert result.initial["loss"] == steps[0]["loss"]
    assert rows[-1]["frozen/top1"] == 1.0


@pytest.mark.parametrize("momentum", [0.001, None])
def test_statistics_that_lag_behind_do_not_fail_what_was_learnt(gate, momentum):
    """At momentum 0.001 the running statistics are still those of random weights at the end, and
    the network as it stands does not know the images that it has learnt by heart."""

    def lag(task):
        for module in task.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum

    task, result, _ = gate(lag, overfit__num_batches=1, overfit__batch_size=24)
    assert task.memorised(result.metrics).passed
    frozen = task.frozen_batches(1, 24)
    as_it_stands = task.evaluate(task.model.eval(), frozen, "train")
    if momentum:
        assert not task.memorised(as_it_stands).passed
    # The judged copy is apart: the network keeps its own statistics, momentum and mode.
    norms = [m for m in task.model.train().modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {momentum}
    assert {int(norm.num_batches_tracked) for norm in norms} == {result.num_steps}


def test_frozen_norms_are_judged_by_their_own_statistics(gate):
    """Those in evaluation mode are part of what the run will use (detect.freeze_norms)."""
    seen = []

    def freeze(task):
        for module in task.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean += 3.0
                module.train = lambda mode=True, module=module: module
                module.training = False
        honest = task.evaluate

        def evaluate(model, batches, split):
            seen.extend(m.running_mean.clone() for m in model.modules()
                        if isinstance(m, nn.BatchNorm2d))
            return honest(model, batches, split)

        task.evaluate = evaluate

    gate(freeze, overfit__steps=2)
    assert seen and all(torch.equal(mean, torch.full_like(mean, 3.0)) for mean in seen)


def test_a_detached_layer_is_named_as_dead(gate):
    """M3 of the failures. Everything below the cut is without a gradient, what is above is not."""

    def cut(task):
        task.model.layer1.register_forward_hook(lambda module, inputs, output: output.detach())

    _, result, _ = gate(cut, overfit__steps=5)
    assert any(name.startswith("layer1.") for name in result.dead_parameters)
    assert any(name.startswith("conv1.") for name in result.dead_parameters)
    assert not [n for n in result.dead_parameters if n.startswith(("layer2.", "layer4.", "fc."))]
    check = contracts.gradients_reach(result)
    assert not check.passed and check.severity == "error"
    assert result.dead_parameters[0] in check.value


def test_an_unused_module_and_a_gate_of_zero_are_named_as_dead(gate):
    def add(task):
        task.model.unused = nn.Linear(2, 2)
        branch = nn.Linear(10, 10)
        task.model.fc.branch = branch  # its output is multiplied by zero
        task.model.fc.register_forward_hook(lambda module, inputs, out: out + 0 * branch(out))

    _, result, _ = gate(add, overfit__steps=6)
    assert set(result.dead_parameters) == {
        "unused.weight", "unused.bias", "fc.branch.weight", "fc.branch.bias"}


def test_frozen_parameters_are_not_called_dead(gate):
    def freeze(task):
        task.model.conv1.requires_grad_(False)

    _, result, _ = gate(freeze, overfit__steps=5)
    assert result.dead_parameters == ()


def test_labels_shuffled_at_each_step_cannot_pass(gate):
    """M7 of the failures: the metric decides, on the true labels, not the loss."""
    generator = torch.Generator().manual_seed(0)

    def shuffle(task):
        honest = task.losses

        def losses(model, batch):
            order = torch.randperm(len(batch["labels"]), generator=generator)
            return honest(model, batch | {"labels": batch["labels"][order]})

        task.losses = losses

    task, result, _ = gate(shuffle, overfit__steps=100)
    assert not task.memorised(result.metrics).passed
    assert result.metrics["top1"] < 0.9 and result.num_steps == 100


def test_a_network_that_sees_no_pixels_cannot_pass(gate):
    def blind(task):
        task.model.register_forward_pre_hook(lambda module, inputs: torch.zeros_like(inputs[0]))

    task, result, _ = gate(blind, overfit__steps=50)
    assert not task.memorised(result.metrics).passed


def test_a_loss_that_is_no_number_ends_the_gate_before_the_update(gate):
    seen = []

    def poison(task):
        honest = task.losses

        def losses(model, batch):
            seen.append([weight.detach().clone() for weight in model.parameters()])
            values = honest(model, batch)
            return {"loss": values["loss"] * (math.nan if len(seen) == 4 else 1)}

        task.losses = losses

    task, result, _ = gate(poison)
    assert not result.finite and result.num_steps == 4 and len(seen) == 4
    assert all(map(torch.equal, seen[-1], task.model.parameters()))
    check = contracts.stayed_finite(result)
    assert not check.passed and check.value == 4


@pytest.mark.parametrize("initial, passed", [(2.3, True), (2.9, True), (148.5, False),
                                             (0.39, False)])
def test_the_first_loss_is_held_against_theory(tmp_path, tiny_params, initial, passed):
    task = build_task(tiny_params(tmp_path), CPU)
    result = OverfitResult({"loss": initial}, {}, (), 1, True)
    (check,) = contracts.initial_losses(task, result, task.sample_batch("train", 4))
    assert check.passed is passed and check.value == initial
