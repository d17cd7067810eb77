"""Checkpoints: written whole or not at all, verified when read, never unpickling code.

    checkpoints/step_120/   model.safetensors  ema.safetensors  state.pt  digest.json
    checkpoints/last        symbolic link to the newest
    checkpoints/best        symbolic link to the best evaluation's
"""

import hashlib
import json
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib.errors import BadInput
from lib.run import Run, write_json


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint as read from disk. `ema` is None in a run without a moving average."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    state: dict[str, Any]
    """Optimizer, scaler and the loop's counters."""

    @property
    def delivered(self) -> dict[str, Tensor]:
        """The weights the run is judged by: the moving average where there is one."""
        return self.ema or self.model


def save(run: Run, step: int, model: nn.Module, ema: nn.Module | None, state: dict) -> Path:
    """Write `step_N` under a temporary name, synced to disk, then rename it and move `last`."""
    final = run.checkpoints / f"step_{step}"
    temporary = run.checkpoints / f".step_{step}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(_tensors(model), temporary / "model.safetensors")
    if ema is not None:
        save_file(_tensors(ema), temporary / "ema.safetensors")
    torch.save(state, temporary / "state.pt")
    files = sorted(temporary.iterdir())
    write_json(temporary / "digest.json", {file.name: _digest(file) for file in files})
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if final.exists():  # saved before its evaluation; killed in between, the older ones are left
        old = run.checkpoints / f".step_{step}.old"
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
    else:
        temporary.rename(final)
    point(run, "last", step)
    return final


def point(run: Run, name: str, step: int) -> None:
    """Make `name` (last or best) mean `step_N`, in one atomic move."""
    temporary = run.checkpoints / f".{name}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(f"step_{step}")
    os.replace(temporary, run.checkpoints / name)


def prune(run: Run, keep_steps: set[int]) -> None:
    """Remove every checkpoint but those of `keep_steps` and what last and best mean."""
    keep = {f"step_{step}" for step in keep_steps}
    for name in ("last", "best"):
        if (run.checkpoints / name).is_symlink():
            keep.add(os.readlink(run.checkpoints / name))
    leftovers = run.checkpoints.glob(".step_*")  # of a save that was killed
    for path in [*run.checkpoints.glob("step_*"), *leftovers]:
        if path.name not in keep:
            shutil.rmtree(path)


def load(run: Run, name: str) -> Checkpoint | None:
    """Read `last`, `best` or `step_N`; None where there is none.

    Raises BadInput for a file whose digest is not the one it was written with.
    """
    folder = run.checkpoints / name
    if not folder.exists():
        return None
    try:
        digests = json.loads((folder / "digest.json").read_text())
    except (OSError, ValueError):
        raise BadInput(f"{folder / 'digest.json'}: damaged; remove {folder}") from None
    for file, expected in digests.items():
        if not (folder / file).is_file() or _digest(folder / file) != expected:
            raise BadInput(f"{folder / file}: damaged (its digest differs); remove {folder}")
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise BadInput(f"{folder / 'state.pt'}: holds more than tensors and plain values, which "
                       f"this run never wrote; remove {folder}") from None
    return Checkpoint(
        model=load_file(folder / "model.safetensors"),
        ema=load_file(folder / "ema.safetensors") if "ema.safetensors" in digests else None,
        state=state,
    )


def load_newest(run: Run) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and what was wrong with newer ones.

    None where nothing was ever saved. Raises BadInput where something was and all of it is
    damaged: a training never starts over silently.
    """
    folders = run.checkpoints.glob("step_*")
    steps = sorted(int(path.name.removeprefix("step_")) for path in folders)
    problems = []
    for step in reversed(steps):
        try:
            return load(run, f"step_{step}"), problems
        except BadInput as error:
            problems.append(str(error))
    if problems:
        raise BadInput(
            f"{run.checkpoints}: no whole checkpoint left ({'; '.join(problems)}); remove the "
            "folder to start the training over"
        )
    return None, []


def load_delivered(run: Run, model: nn.Module) -> int:
    """Put the weights the run is judged by into `model`: the best evaluation's; returns its step.
    """
    saved = load(run, "best")
    if saved is None:
        raise BadInput(f"{run.checkpoints}: no checkpoint of an evaluation; run 03_train first")
    model.load_state_dict(saved.delivered)
    model.eval()
    return saved.state["position"]["step"]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The network's tensors on the CPU, in plain memory order; tied ones once each."""
    return {name: tensor.detach().cpu().contiguous().clone(memory_format=torch.contiguous_format)
            for name, tensor in model.state_dict().items()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
