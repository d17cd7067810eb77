"""Call once everything the long run will call, on the real batch, before it is paid for."""

import itertools
import math
import shutil
import statistics
import time
from dataclasses import dataclass

import torch

from lib.datasets import loader
from lib.loops import checkpoint, optim
from lib.loops.device import autocast
from lib.loops.ema import Ema
from lib.loops.evaluate import evaluate
from lib.loops.schedule import Plan
from lib.params import Params
from lib.run import Check, Run
from lib.tasks import Task

UNTIMED_STEPS = loader.BATCHES_AHEAD + 1
"""First steps at a size: warm-up, and batches that were decoded while the network warmed up. To
time these would hide a slow loader."""
TIMED_STEPS = 4
NUM_EVAL_IMAGES = 512


@dataclass(frozen=True)
class Rehearsal:
    """What went well and how long it took."""

    checks: tuple[Check, ...]
    step_seconds: float
    """Mean over the run of a training step, its data included; progressive sizes by their share."""
    eval_seconds: float
    """Of a whole evaluation, extrapolated from some of its images."""
    save_seconds: float
    checkpoint_bytes: int


def rehearse(task: Task, params: Params, run: Run) -> Rehearsal:
    """A few true steps at each size, evaluation, save, reload: the run's batch, precision, loader.

    The network is changed by it; use a fresh one afterwards.
    """
    plan = Plan(params, task.num_train)
    model, config = task.model.train(), params.train
    groups = optim.param_groups(model, params.optim)
    optimizer = optim.build(groups, params.optim, lr=1e-4)
    weights = [parameter for group in groups for parameter in group["params"]]
    scaler = torch.amp.GradScaler(task.device.type, enabled=config.precision == "fp16")
    ema = Ema(model, config.ema) if config.ema.decay else None
    network = torch.compile(model, dynamic=False) if params.machine.compile else model

    # Steps, at every size of the run.
    num_sizes = len(plan.sizes)
    starts = [-(-place * plan.num_steps // num_sizes) for place in range(num_sizes + 1)]
    micro = config.batch_size // config.accumulate
    seconds, shapes, asked, loss = [], [], [], math.nan
    for first, end in itertools.pairwise(starts):
        if first == end:
            continue  # fewer steps than sizes
        timed = []
        num_steps = min(UNTIMED_STEPS + TIMED_STEPS, end - first)
        requests = list(itertools.islice(plan.requests(first), num_steps * config.accumulate))
        batches = task.train_batches(requests)
        for step in range(num_steps):
            started = time.perf_counter()
            for _ in range(config.accumulate):
                batch = task.to_device(next(batches))
                with autocast(task.device, config.precision):
                    losses = task.losses(network, batch)
                scaler.scale(losses["loss"] / config.accumulate).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(weights, params.optim.clip_norm or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if ema:
                ema.update(step)
            loss = losses["loss"].item()
            timed.append(time.perf_counter() - started)
        batches.close()
        seconds.append(statistics.median(timed[UNTIMED_STEPS:] or timed))
        shapes.append(tuple(batch["images"].shape))
        size = task.network_size(params, requests[-1].size)
        asked.append((micro, params.model.in_chans, *size))

    # Evaluation of what will be delivered.
    judged = evaluate(task, ema.model if ema else model, "val", most=NUM_EVAL_IMAGES)
    num_judged = min(NUM_EVAL_IMAGES, task.num_val)
    eval_seconds = judged["seconds"] * task.num_val / num_judged

    # Save and reload, in a folder that is removed again.
    scratch = Run(run.path / "rehearsal")
    shutil.rmtree(scratch.path, ignore_errors=True)  # left by a rehearsal that was killed
    started = time.perf_counter()
    folder = checkpoint.save(scratch, 1, model, ema.model if ema else None,
                             {"optimizer": optimizer.state_dict()})
    save_seconds = time.perf_counter() - started
    num_bytes = sum(file.stat().st_size for file in folder.iterdir())
    saved = checkpoint.load(scratch, "last")
    differing = [name for name, tensor in model.state_dict().items()
                 if not torch.equal(tensor.cpu(), saved.model[name])]
    optimizer.load_state_dict(saved.state["optimizer"])
    shutil.rmtree(scratch.path)

    checks = (
        Check("input_shape", "shape of a training micro-batch (B, C, H, W)",
              _shown(shapes), _shown(asked), shapes == asked,
              advice="The network does not get what the params ask for."),
        Check("rehearsed_steps", "loss after the rehearsed steps", loss, "finite",
              math.isfinite(loss),
              advice="The loss blew up at once: look at the inputs and the loss."),
        Check("rehearsed_eval", f"{task.headline} of the untrained network on {num_judged} images",
              judged[task.headline], "computed", True, "info"),
        Check("reload", "tensors that differ after save and reload", len(differing), "0",
              not differing, advice=f"These do not survive a checkpoint: {differing[:5]}"),
    )
    return Rehearsal(checks, statistics.mean(seconds), eval_seconds, save_seconds, num_bytes)


def _shown(shapes: list[tuple[int, ...]]) -> str:
    return ", then ".join(" x ".join(map(str, shape)) for shape in shapes)
