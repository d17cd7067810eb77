"""Evaluate a network on a split; every metric carries the split's name."""

import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from lib.loops.device import autocast
from lib.tasks import Batch, Task


class Stopped(Exception):
    """The evaluation was asked to stop before its end."""


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, split: str, should_stop: Callable[[], object] = lambda: False,
    most: int | None = None,
) -> dict[str, float]:
    """The task's metrics of `model` on "val" or "train" (validation transform), as `val/top1`.

    In the run's precision; on all samples, or on `most` spread evenly. The network's training
    mode is put back as it was. Raises Stopped between two batches once `should_stop()` holds.
    """

    def batches() -> Iterator[Batch]:
        for batch in task.eval_batches(split, most):
            if should_stop():
                raise Stopped
            yield batch

    started = time.perf_counter()
    was_training = model.training
    model.eval()
    try:
        with autocast(task.device, task.params.train.precision):
            metrics = task.evaluate(model, batches(), split)
    finally:
        model.train(was_training)
    named = {f"{split}/{name}": value for name, value in metrics.items()}
    return named | {"seconds": time.perf_counter() - started}
