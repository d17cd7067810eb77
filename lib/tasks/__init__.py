"""One file a task. A new task is one file and one line here."""

import torch

from lib.params import Params
from lib.tasks.classify import Classify
from lib.tasks.detect import Detect
from lib.tasks.task import Batch, Task

TASKS = {"classify": Classify, "detect": Detect}

__all__ = ["TASKS", "Batch", "Task", "build_task"]


def build_task(params: Params, device: torch.device, fresh: bool = True) -> Task:
    """The task of the params with its data opened and its network on the device.

    The network's weights are a function of the seed. With `fresh` False the caller loads a
    checkpoint into it, so neither published weights nor `model.weights` are read.
    """
    torch.manual_seed(params.seed)
    if not fresh:
        model = params.model.model_copy(update={"pretrained": False, "weights": None})
        params = params.model_copy(update={"model": model})
    return TASKS[params.task](params, device)
