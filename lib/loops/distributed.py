"""Starting the training loop from a notebook cell."""

from lib.errors import BadInput
from lib.loops.device import pick_device
from lib.loops.train import train
from lib.params import Params
from lib.run import Run
from lib.tasks import build_task


def launch(params: Params, run: Run, device: str = "auto") -> str:
    """Train in this process on one device; returns why the run ended (see `train`)."""
    chosen = pick_device(params.machine, device)
    if params.machine.gpus * params.machine.nodes > 1:
        raise BadInput(
            f"machine.gpus {params.machine.gpus} x machine.nodes {params.machine.nodes}: this "
            "version trains on one device; set both to 1"
        )
    task = build_task(params, chosen)
    return train(task, params, run, params.effective_lr(run.suggested_lr()))
