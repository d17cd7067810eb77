"""Evaluate a network on a split; every metric carries the split's name."""

import time

import torch
from torch import nn

from lib.tasks import Task


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, split: str) -> dict[str, float]:
    """The task's metrics of `model` on "val" or "train" (validation transform), as `val/top1`.

    The network's training mode is put back as it was.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    metrics = task.evaluate(model, task.eval_batches(split))
    model.train(was_training)
    named = {f"{split}/{name}": value for name, value in metrics.items()}
    return named | {"seconds": time.perf_counter() - started}
