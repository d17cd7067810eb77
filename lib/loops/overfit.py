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
    data, the network and the losses alone. Every image is judged in evaluation mode, by a copy
    whose BatchNorm statistics are those of the frozen images.
    """
    config, model = params.overfit, task.model.train()
    adamw = Optim(name="adamw", weight_decay=0.0)
    optimizer = optim.build(optim.param_groups(model, adamw), adamw, config.lr)
    silent = {name for name, weight in model.named_parameters() if weight.requires_grad}
    scaler = torch.amp.GradScaler(task.device.type, enabled=params.train.precision == "fp16")
    initial: dict[str, float] = {}
    metrics: dict[str, float] = {}
    step, finite = 0, True
    for step in range(1, config.steps + 1):
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
            with torch.no_grad(), autocast(task.device, params.train.precision):
                metrics = task.evaluate(_settled(task, model, batches), batches, "train")
            run.record("eval", step=step, **{f"frozen/{k}": v for k, v in metrics.items()})
            if task.memorised(metrics).passed:
                break
    return OverfitResult(initial, metrics, tuple(sorted(silent)), step, finite)


def _settled(task: Task, model: nn.Module, batches: list[Batch]) -> nn.Module:
    """A copy in evaluation mode, its BatchNorm statistics measured anew on these batches.

    Running ones lag behind weights that move this fast (momentum 0.03 remembers 30 steps), and
    would fail a network that knows the images by heart.
    """
    settled = copy.deepcopy(model)
    norms = [module for module in settled.modules()
             if isinstance(module, _BatchNorm) and module.training]
    settled.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    for batch in batches if norms else ():
        task.scores(settled, task.to_device(batch)["images"])
    return settled.eval()
