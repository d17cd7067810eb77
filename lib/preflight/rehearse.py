"""Call once everything the long run will call, on the real batch, before it is paid for."""

import shutil
import statistics
import time
from dataclasses import dataclass

import torch

from lib.datasets import loader
from lib.loops import checkpoint, optim
from lib.loops.device import autocast
from lib.loops.ema import Ema
from lib.loops.schedule import Plan
from lib.params import Params
from lib.run import Check, Run
from lib.tasks import Task

NUM_STEPS = 4
"""The first is warm-up; the rest are timed."""
NUM_EVAL_BATCHES = 2


@dataclass(frozen=True)
class Rehearsal:
    """What went well and how long it took."""

    checks: tuple[Check, ...]
    step_seconds: float
    """Median of a training step after the first, its data included."""
    eval_seconds: float
    """Of a whole evaluation, extrapolated from its first batches."""
    save_seconds: float
    checkpoint_bytes: int


def rehearse(task: Task, params: Params, run: Run) -> Rehearsal:
    """A few true steps, evaluation, save, reload: on the run's batch, precision and loader.

    The network is changed by it; use a fresh one afterwards.
    """
    plan = Plan(params, task.num_train)
    model = task.model.train()
    groups = optim.param_groups(model, params.optim)
    optimizer = optim.build(groups, params.optim, lr=1e-4)
    ema = Ema(model, params.train.ema) if params.train.ema.decay else None
    network = torch.compile(model) if params.machine.compile else model

    # Steps.
    seconds = []
    num_steps = min(NUM_STEPS, plan.num_steps)
    batches = task.train_batches(plan.requests())
    for step in range(num_steps):
        started = time.perf_counter()
        for _ in range(params.train.accumulate):
            batch = task.to_device(next(batches))
            with autocast(task.device, params.train.precision):
                losses = task.losses(network, batch)
            (losses["loss"] / params.train.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.update(step)
        loss = losses["loss"].item()
        seconds.append(time.perf_counter() - started)
    batches.close()

    # Evaluation of what will be delivered.
    started = time.perf_counter()
    judged = ema.model if ema else model.eval()
    some = loader.first(task.eval_batches("val"), NUM_EVAL_BATCHES)
    with torch.no_grad():
        metrics = task.evaluate(judged, some)
    num_judged = sum(len(batch["labels"]) for batch in some)
    eval_seconds = (time.perf_counter() - started) * task.num_val / num_judged

    # Save and reload, in a folder that is removed again.
    scratch = Run(run.path / "rehearsal")
    shutil.rmtree(scratch.path, ignore_errors=True)  # left by a rehearsal that was killed
    started = time.perf_counter()
    folder = checkpoint.save(scratch, num_steps, model, ema.model if ema else None,
                             {"optimizer": optimizer.state_dict()})
    save_seconds = time.perf_counter() - started
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    saved = checkpoint.load(scratch, "last")
    differing = [name for name, tensor in model.state_dict().items()
                 if not torch.equal(tensor.cpu(), saved.model[name])]
    optimizer.load_state_dict(saved.state["optimizer"])
    shutil.rmtree(scratch.path)

    size = plan.image_size(num_steps - 1)
    asked = (params.train.batch_size // params.train.accumulate, params.model.in_chans, size, size)
    shape = tuple(batch["images"].shape)
    checks = (
        Check("input_shape", "shape of a training micro-batch (B, C, H, W)",
              " x ".join(map(str, shape)), " x ".join(map(str, asked)), shape == asked,
              advice="The network does not get what the params ask for."),
        Check("rehearsed_steps", f"loss after {num_steps} rehearsed steps", loss, "finite",
              bool(torch.isfinite(torch.tensor(loss))),
              advice="The loss blew up at once: look at the inputs and the loss."),
        Check("rehearsed_eval", f"{task.headline} of the untrained network on {num_judged} images",
              metrics[task.headline.split("/")[1]], "computed", True, "info"),
        Check("reload", "tensors that differ after save and reload", len(differing), "0",
              not differing, advice=f"These do not survive a checkpoint: {differing[:5]}"),
    )
    step_seconds = statistics.median(seconds[1:] or seconds)
    return Rehearsal(checks, step_seconds, eval_seconds, save_seconds, num_bytes)
