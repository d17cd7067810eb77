"""Starting from a file of weights: read without unpickling code, and say how much was loaded."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.errors import BadInput


@dataclass(frozen=True)
class LoadReport:
    """What a file gave a network. Counts are of tensors."""

    num_loaded: int
    num_expected: int
    missing: tuple[str, ...]
    """The network's tensors the file does not have."""
    mismatched: tuple[str, ...]
    """In both, of different shapes (a new head, say)."""
    unused: tuple[str, ...]
    """The file's tensors the network does not have."""

    @property
    def share(self) -> float:
        return self.num_loaded / self.num_expected


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file, or of a run's checkpoint folder (its moving
    average where there is one); BadInput where it is none of these.
    """
    if path.is_dir():
        files = [path / "ema.safetensors", path / "model.safetensors"]
        path = next((file for file in files if file.is_file()), files[1])
    if not path.is_file():
        raise BadInput(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own errors for "not such a file"
        start = path.open("rb").read(16)
        raise BadInput(
            f"{path}: not a readable weights file ({type(error).__name__}; {path.stat().st_size:,} "
            f"bytes, starts with {start!r}); fetch it again"
        ) from None
    if not isinstance(state, dict):
        raise BadInput(f"{path}: holds a {type(state).__name__}, not named tensors")
    for key in ("ema", "state_dict", "model", "module"):
        if isinstance(state.get(key), dict):
            state = state[key]
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def fill(model: nn.Module, found: dict[str, Tensor]) -> LoadReport:
    """Copy the tensors whose names and shapes agree into `model`.

    BatchNorm's counters of batches, which some files leave out, are not counted.
    """
    own = _without_counters(model.state_dict())
    found = _without_counters(found)
    fitting = {
        name: tensor
        for name, tensor in found.items()
        if name in own and own[name].shape == tensor.shape
    }
    model.load_state_dict(fitting, strict=False)
    return LoadReport(
        num_loaded=len(fitting),
        num_expected=len(own),
        missing=tuple(name for name in own if name not in found),
        mismatched=tuple(name for name in found if name in own and name not in fitting),
        unused=tuple(name for name in found if name not in own),
    )


def _without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items()
            if not name.endswith("num_batches_tracked")}
