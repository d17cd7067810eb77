"""One file a task. A new task is one file and one line here."""

import torch

from lib.params import Params
from lib.tasks.classify import Classify
from lib.tasks.task import Batch, Task

TASKS = {"classify": Classify}

__all__ = ["TASKS", "Batch", "Task", "build_task"]


def build_task(params: Params, device: torch.device) -> Task:
    """The task of the params with its data opened and its network on the device.

    The network's weights are a function of the seed.
    """
    torch.manual_seed(params.seed)
    return TASKS[params.task](params, device)
