"""Starting the training loop from a notebook cell."""

import torch

from lib.errors import BadInput
from lib.loops.device import pick_device
from lib.loops.train import train
from lib.params import Params
from lib.run import Run
from lib.tasks import Task, build_task


def launch(params: Params, run: Run, device: str = "auto") -> str:
    """Train in this process on one device; returns why the run ended (see `train`).

    Raises BadInput where the data is not what the run began with.
    """
    chosen = pick_device(params.machine, device)
    torch.backends.cudnn.benchmark = True  # the sizes are few and come again
    resumes = any(run.checkpoints.glob("step_*"))
    task = build_task(params, chosen, fresh=not resumes)
    _same_data(task, run)
    return train(task, params, run, params.effective_lr(run.suggested_lr()))


def _same_data(task: Task, run: Run) -> None:
    """The order of samples is a function of the data: other files would be another run (R3)."""
    before = {split["split"]: split for split in run.manifest().get("data") or []}
    now = task.census()
    for split in now:
        then = before.get(split["split"])
        if then and then["digest"] != split["digest"]:
            raise BadInput(
                f"the {split['split']} data changed since this run began: {then['used']} files, "
                f"digest {then['digest']} then; {split['used']}, {split['digest']} now. Restore "
                "it, or begin a new run with --name"
            )
    if not before:
        run.update_manifest(data=now)
