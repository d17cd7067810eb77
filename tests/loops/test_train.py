"""The loop on real digits: its arithmetic, its ends, and resume bit for bit."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib import params as params_module
from lib.errors import BadInput, BudgetReached, Interrupted
from lib.loops import checkpoint
from lib.loops.schedule import Plan
from lib.loops.train import train
from lib.params import ROOT, Params
from lib.run import Run
from lib.tasks import build_task

CPU = torch.device("cpu")
BASE = {"data.classes": ["0", "1"], "train.batch_size": 16, "train.steps": 6}


@pytest.fixture
def loop(tmp_path, tiny_params):
    """`loop(name, spoil, **overrides)` trains into tmp_path/name; returns task, run, end."""

    def go(name: str = "run", spoil=lambda task: None, lr: float = 0.05, **overrides):
        params = tiny_params(tmp_path, **BASE | overrides)
        return start(params, tmp_path / name, spoil, lr)

    return go


def start(params: Params, path: Path, spoil=lambda task: None, lr: float = 0.05):
    task, run = build_task(params, CPU), Run(path)
    path.mkdir(exist_ok=True)
    spoil(task)
    run.start("train")
    try:
        ended = train(task, params, run, lr)
    except (Interrupted, BudgetReached) as error:
        ended = error
    finally:
        run.flush()
        run.close_records()
    return task, run, ended


def at_step(step: int, act):
    """Spoil a task: `act(task, values, batch)` may change the losses of call `step`, from 1."""

    def spoil(task):
        honest, calls = task.losses, []

        def losses(model, batch):
            calls.append(1)
            values = honest(model, batch)
            return act(task, values, batch) or values if len(calls) == step else values

        task.losses = losses

    return spoil


def rows(run: Run, kind: str) -> list[dict]:
    return [row for row in run.rows("train") if row["kind"] == kind]


def events(run: Run, event: str) -> list[dict]:
    return [row for row in rows(run, "event") if row["event"] == event]


def weights(task) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in task.model.state_dict().items()}


# -- a step's arithmetic ----------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [
    {}, {"data.augment.mixup": 0.4, "train.label_smoothing": 0.1}, {"optim.clip_norm": 0.1},
])
def test_accumulated_micro_batches_equal_the_whole_batch(loop, overrides):
    """For a network without BatchNorm: same losses, same norms, same weights."""
    found = [loop(f"by{parts}", **{"model.name": "test_convnext", "train.accumulate": parts,
                                   "train.steps": 3} | overrides)[:2] for parts in (1, 2, 4)]
    for task, run in found[1:]:
        for one, other in zip(rows(found[0][1], "step"), rows(run, "step"), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        for name, tensor in weights(found[0][0]).items():
            torch.testing.assert_close(tensor, weights(task)[name], rtol=1e-3, atol=1e-5)


def test_one_step_is_gradient_descent_with_the_recorded_gradient(loop, tmp_path, tiny_params):
    """The first update moves the weights by lr times the gradient, whose norm is recorded."""
    still = {"train.steps": 1, "optim.momentum": 0.0, "optim.weight_decay": 0.0}
    before = weights(build_task(tiny_params(tmp_path, **BASE), CPU))
    task, run, _ = loop(lr=0.01, **still)
    moved = math.sqrt(sum(
        (weight.detach() - before[name]).square().sum().item()
        for name, weight in task.model.named_parameters()
    ))
    (row,) = rows(run, "step")
    assert moved == pytest.approx(0.01 * row["grad_norm"], rel=1e-3)
    assert row["lr"] == 0.01 and row["updated"] is True and row["images"] == 16


def test_clipping_bounds_the_update_and_records_the_norm_before(loop, tmp_path, tiny_params):
    still = {"train.steps": 1, "optim.momentum": 0.0, "optim.weight_decay": 0.0}
    before = weights(build_task(tiny_params(tmp_path, **BASE), CPU))
    _, free, _ = loop("free", lr=0.01, **still)
    task, clipped, _ = loop("clipped", lr=0.01, **still | {"optim.clip_norm": 0.01})
    moved = math.sqrt(sum(
        (weight.detach() - before[name]).square().sum().item()
        for name, weight in task.model.named_parameters()
    ))
    assert moved == pytest.approx(0.01 * 0.01, rel=1e-3)
    (one,), (other,) = rows(free, "step"), rows(clipped, "step")
    assert one["grad_norm"] == other["grad_norm"] > 0.1


def test_the_run_learns_and_keeps_what_it_promises(loop, tmp_path):
    """Loss falls, every step and evaluation is recorded once, last and best can be delivered."""
    task, run, ended = loop(**{"train.steps": 24, "train.eval_every_epochs": 0.5,
                               "train.keep_best": 2, "train.ema.decay": 0.5})
    assert ended == "finished"
    steps, evals = rows(run, "step"), rows(run, "eval")
    assert [row["step"] for row in steps] == list(range(1, 25))
    plan = Plan(task.params, task.num_train)
    assert [row["step"] for row in evals] == [*range(plan.eval_steps, 24, plan.eval_steps), 24]
    assert len(evals) == plan.num_evals
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"] and evals[-1]["val/top1"] > 0.9
    assert {"val/loss", "val/top1", "val/top5", "val/top1_raw", "val/loss_raw"} < evals[-1].keys()
    best = checkpoint.load(run, "best").state["position"]["step"]
    top1 = {row["step"]: row["val/top1"] for row in evals}
    assert top1[best] == max(top1.values())
    kept = {path.name for path in run.checkpoints.glob("step_*")}
    assert kept >= {"step_24", f"step_{best}"} and len(kept) <= 3
    assert checkpoint.load_delivered(run, task.model) == best
    metrics = task.evaluate(task.model, task.eval_batches("val"), "val")
    assert metrics["top1"] == top1[best]


def test_progressive_sizes_reach_the_network(loop):
    sizes = []

    def watch(task):
        task.model.register_forward_pre_hook(
            lambda module, inputs: sizes.append(inputs[0].shape[-1]) if module.training else None)

    loop(spoil=watch, **{"train.image_sizes": [16, 24], "train.steps": 4})
    assert sizes == [16, 16, 24, 24]


# -- resume -----------------------------------------------------------------------------------

# What a resume could get wrong: BatchNorm, momentum, dropout, mixing, the average, an epoch's end.
FULL = {
    "model.drop_rate": 0.3, "data.augment.mixup": 0.4, "data.augment.hflip": 0.5,
    "optim.schedule": "one_cycle", "optim.warmup_epochs": 0.2, "train.ema.decay": 0.9,
    "train.batch_size": 64, "train.steps": 7, "train.eval_every_epochs": 0.75,
    "train.keep_best": 2,
}


def comparable(run: Run) -> list[dict]:
    """Steps and evaluations without what the clock says."""
    clocks = ("time", "seconds", "wait")
    return [{key: value for key, value in row.items() if key not in clocks}
            for row in run.rows("train") if row["kind"] in ("step", "eval")]


def assert_equal_runs(run: Run, other: Run) -> None:
    """Same records, and the same bits in weights, average and optimizer."""
    assert comparable(run) == comparable(other)
    assert {p.name for p in run.checkpoints.iterdir()} == {p.name for p in
                                                           other.checkpoints.iterdir()}
    for name in ("last", "best"):
        one, two = (checkpoint.load(each, name) for each in (run, other))
        for mine, theirs in ((one.model, two.model), (one.ema, two.ema)):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
        clean = [dict(c.state["position"], seconds=0) for c in (one, two)]
        assert clean[0] == clean[1] and one.state["top"] == two.state["top"]
        buffers = [c.state["optimizer"]["state"] for c in (one, two)]
        for key, state in buffers[0].items():
            assert torch.equal(state["momentum_buffer"], buffers[1][key]["momentum_buffer"])


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_in_a_step_saves_and_resume_equals_the_uninterrupted_run(loop, name):
    """R4 and R6 of the failures. The signal is real, and comes while a step is computed."""
    _, whole, _ = loop("whole", **FULL)

    def send(task, values, batch):
        os.kill(os.getpid(), getattr(signal, name))

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    _, run, ended = loop("stopped", at_step(3, send), **FULL)
    assert isinstance(ended, Interrupted) and ended.exit_code == 5 and name in str(ended)
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert checkpoint.load(run, "last").state["position"]["step"] == 3
    assert [row["step"] for row in rows(run, "step")] == [1, 2, 3]
    _, run, ended = loop("stopped", **FULL)
    assert ended == "finished" and events(run, "resumed")[0]["step"] == 3
    assert_equal_runs(whole, run)


def test_a_run_stopped_by_its_budget_at_every_step_equals_the_uninterrupted_run(loop):
    """Each try does one step or one evaluation, exits 4 and has saved; the last one finishes."""
    _, whole, _ = loop("whole", **FULL)
    reached = []
    for _ in range(7 + 3):  # steps and evaluations
        _, run, ended = loop("stopped", **FULL | {"budget.hours": 1e-9})
        if ended == "finished":
            break
        assert isinstance(ended, BudgetReached) and ended.exit_code == 4
        reached.append(checkpoint.load(run, "last").state["position"]["step"])
        assert "budget.hours" in str(ended) and f"step {reached[-1]}" in str(ended)
    assert ended == "finished" and sorted(set(reached)) in ([*range(1, 7)], [*range(1, 8)])
    assert_equal_runs(whole, run)


def test_dollars_stop_the_run_by_the_price_of_the_machine(loop):
    _, _, ended = loop(**{"budget.dollars": 1e-6, "machine.dollars_per_hour": 3600.0})
    assert isinstance(ended, BudgetReached) and "budget.dollars" in str(ended)
    assert loop("free", **{"budget.dollars": 1e-6})[2] == "finished"  # no price, no bill


SCRIPT = """
import sys, torch
from lib import params
from lib.loops.train import train
from lib.run import Run
from lib.tasks import build_task
loaded = params.load(sys.argv[1])
run = Run(sys.argv[2])
run.path.mkdir(exist_ok=True)
run.start("train")
task = build_task(loaded, torch.device("cpu"))
train(task, loaded, run, 0.05)
"""


@pytest.mark.slow
def test_a_run_killed_at_once_resumes_to_the_same_end(tmp_path, tiny_params):
    """SIGKILL in another process, at no particular moment: no step twice, none missing."""
    params = tiny_params(tmp_path, **BASE | FULL | {
        "train.steps": 16, "train.save_every_steps": 3, "train.eval_every_epochs": 2.0})
    file = tmp_path / "resolved.yaml"
    file.write_text(params_module.to_yaml(params))
    _, whole, _ = start(params, tmp_path / "whole")
    killed = Run(tmp_path / "killed")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(file), str(killed.path)],
                               env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while not (killed.checkpoints / "last").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    saved = checkpoint.load(killed, "last").state["position"]["step"]
    assert process.returncode == -signal.SIGKILL and 3 <= saved < 16
    done = [row["step"] for row in rows(killed, "step")]
    assert done[: saved] == list(range(1, saved + 1))  # what is resumed after is recorded
    _, run, ended = start(params, killed.path)
    assert ended == "finished" and events(run, "resumed")[0]["step"] == saved
    assert_equal_runs(whole, run)


def test_a_changed_run_is_refused(loop):
    """R3 of the failures."""
    loop(**{"train.steps": 2})
    with pytest.raises(BadInput, match="other params"):
        loop(**{"train.steps": 3})


def test_a_finished_run_is_not_trained_again(loop):
    _, run, _ = loop()
    before = comparable(run)
    task, run, ended = loop(spoil=at_step(1, lambda *_: 1 / 0))
    assert ended == "finished" and comparable(run) == before


# -- numbers that are none --------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_before_the_update(loop):
    """R11 of the failures: weights, average and checkpoint are those of the step before."""
    seen = {}

    def poison(task, values, batch):
        seen["weights"] = {n: w.detach().clone() for n, w in task.model.named_parameters()}
        seen["samples"] = task.sample_names(batch["indices"].tolist())
        return {"loss": values["loss"] * math.nan}

    task, run, ended = loop(spoil=at_step(4, poison), **{"train.save_every_steps": 1})
    assert ended == "non-finite"
    assert all(torch.equal(seen["weights"][n], w) for n, w in task.model.named_parameters())
    (event,) = events(run, "non-finite")
    assert event["step"] == 4 and "loss" in event["terms"] and event["samples"] == seen["samples"]
    assert [row["step"] for row in rows(run, "step")] == [1, 2, 3]
    saved = load_file(run.checkpoints / "last" / "model.safetensors")
    assert all(torch.equal(saved[n], w) for n, w in seen["weights"].items())
    assert events(run, "train ended")[0]["reason"] == "non-finite"


def test_a_gradient_that_is_no_number_stops_too_and_is_named(loop):
    def poison(task, values, batch):
        weight = task.model.fc.weight
        return {"loss": values["loss"] + torch.sqrt((weight - weight.detach()).abs()).sum()}

    task, run, ended = loop(spoil=at_step(2, poison))
    assert ended == "non-finite"
    assert events(run, "non-finite")[0]["terms"] == ["grad_norm"]
    assert all(weight.isfinite().all() for weight in task.model.parameters())


def test_a_step_that_fp16_skips_advances_neither_schedule_nor_average(loop):
    seen = []

    def overflow(task, values, batch):
        seen.append({n: w.detach().clone() for n, w in task.model.named_parameters()})
        return {"loss": values["loss"] * 1e30}

    def spoil(task):
        at_step(1, overflow)(task)
        at_step(2, lambda task, values, batch: seen.append(
            {n: w.detach().clone() for n, w in task.model.named_parameters()}))(task)

    overrides = {"train.precision": "fp16", "train.steps": 4, "optim.warmup_epochs": 0.5,
                 "train.ema.decay": 0.9}
    _, run, ended = loop(spoil=spoil, **overrides)
    assert ended == "finished"
    steps = rows(run, "step")
    assert [row["updated"] for row in steps] == [False, True, True, True]
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert steps[0]["lr"] == steps[1]["lr"] == pytest.approx(0.05 * 0.04)
    assert steps[2]["lr"] > steps[1]["lr"]
    state = checkpoint.load(run, "last").state
    assert state["position"]["step"] == 4 and state["position"]["update"] == 3
    assert state["scaler"]["scale"] == 32768.0  # halved once
    assert all(math.isfinite(row["loss"]) for row in steps[1:])


# -- other ends -------------------------------------------------------------------------------


def test_patience_ends_a_run_that_gets_no_better(loop):
    _, run, ended = loop(lr=1e-12, **{"train.steps": 40, "train.eval_every_epochs": 0.05,
                                      "train.patience_evals": 3})
    assert ended == "patience"
    evals = rows(run, "eval")
    assert len(evals) == 4 and evals[-1]["step"] < 40
    assert events(run, "train ended")[0]["reason"] == "patience"
    assert checkpoint.load(run, "last").state["position"]["step"] == evals[-1]["step"]


def test_the_target_ends_the_run_only_where_that_is_asked_for(loop):
    early = {"train.steps": 40, "train.eval_every_epochs": 0.2, "train.target": 0.9}
    _, run, ended = loop("early", **early | {"train.stop_at_target": True})
    evals = rows(run, "eval")
    assert ended == "target" and evals[-1]["step"] < 40
    assert evals[-1]["val/top1"] >= 0.9 > max([row["val/top1"] for row in evals[:-1]] or [0])
    assert loop("whole", **early | {"train.steps": 20})[2] == "finished"


def test_records_are_plain_json_lines(loop):
    _, run, _ = loop(**{"train.steps": 2})
    for line in run.records_file.read_text().splitlines():
        assert {"kind", "stage", "time"} <= json.loads(line).keys()
