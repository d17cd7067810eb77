"""Memorise a few frozen batches: the cheapest proof that data, network and losses fit together."""

import copy
import math
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.loops import optim
from lib.loops.device import autocast
from lib.params import Optim, Params
from lib.run import Run
from lib.tasks import Batch, Task

EVAL_EVERY = 25
GRADIENT_STEPS = 5
"""A zero-initialised gain (a residual branch's last norm) blocks the first gradients only."""


@dataclass(frozen=True)
class OverfitResult:
    """What the memorisation showed."""

    initial: dict[str, float]
    """Loss terms of the untrained network on the first batch, before any update."""
    metrics: dict[str, float]
    """Of the frozen images at the end, without a split's name."""
    dead_parameters: tuple[str, ...]
    """Parameters that had no or a zero gradient in each of the first steps."""
    num_steps: int
    finite: bool


def overfit(task: Task, params: Params, run: Run, batches: list[Batch]) -> OverfitResult:
    """Train on `batches` again and again until `task.memorised`, or overfit.steps are done.

    AdamW with a cosine to zero, whatever the run's own optimizer, so that this gate tests the
    data, the network and the losses alone. Every image is judged in evaluation mode, with the
    BatchNorm statistics of all frozen images. In the second half they are fixed in training too:
    else the network learns to use those of each small batch, which evaluation does not have.
    """
    config, model = params.overfit, task.model.train()
    adamw = Optim(name="adamw", weight_decay=0.0)
    optimizer = optim.build(optim.param_groups(model, adamw), adamw, config.lr)
    silent = {name for name, weight in model.named_parameters() if weight.requires_grad}
    scaler = torch.amp.GradScaler(task.device.type, enabled=params.train.precision == "fp16")
    initial: dict[str, float] = {}
    metrics: dict[str, float] = {}
    step, finite = 0, True
    settle_step = max(1, config.steps // 2)
    for step in range(1, config.steps + 1):
        if step == settle_step:
            settle_norms(task, model, batches)
        started = time.perf_counter()
        lr = config.lr * (1 + math.cos(math.pi * (step - 1) / config.steps)) / 2
        optim.set_lr(optimizer, lr)
        batch = task.to_device(batches[(step - 1) % len(batches)])
        with autocast(task.device, params.train.precision):
            losses = task.losses(model, batch)
        values = {term: value.item() for term, value in losses.items()}
        initial = initial or values
        finite = all(map(math.isfinite, values.values()))
        if not finite:
            break
        scaler.scale(losses["loss"]).backward()
        if step <= GRADIENT_STEPS:
            silent -= {name for name, weight in model.named_parameters()
                       if weight.grad is not None and weight.grad.any()}
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.record("step", step=step, **values, lr=lr, seconds=time.perf_counter() - started)
        if step % EVAL_EVERY == 0 or step == config.steps:
            judged = copy.deepcopy(model)
            if step < settle_step:
                settle_norms(task, judged, batches)
            with torch.no_grad(), autocast(task.device, params.train.precision):
                metrics = task.evaluate(judged.eval(), batches, "train")
            run.record("eval", step=step, **{f"frozen/{k}": v for k, v in metrics.items()})
            if task.memorised(metrics).passed:
                break
    return OverfitResult(initial, metrics, tuple(sorted(silent)), step, finite)


def settle_norms(task: Task, model: nn.Module, batches: list[Batch]) -> None:
    """Measure BatchNorm's statistics anew on these batches, and keep them from now on.

    Running ones lag behind weights that move this fast (momentum 0.03 remembers 30 steps), and
    would fail a network that knows the images by heart. Those the network keeps fixed stay so.
    """
    norms = [module for module in model.modules()
             if isinstance(module, _BatchNorm) and module.training]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    with torch.no_grad(), autocast(task.device, task.params.train.precision):
        for batch in batches if norms else ():
            task.scores(model, task.to_device(batch)["images"])
    model.train()
    for norm in norms:
        norm.eval()
