"""Choosing what to compute on."""

from contextlib import AbstractContextManager

import torch

from lib.errors import BadInput
from lib.params import Machine

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(machine: Machine, requested: str = "auto") -> torch.device:
    """The device of `requested`, or of the params where that is "auto".

    Raises BadInput for a device that is not there and for more devices than the machine has.
    """
    name = requested if requested != "auto" else machine.device
    available = {
        "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True
    }
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if name not in available:
        raise BadInput(f"device {name!r}: choose auto, cpu, cuda or mps")
    if not available[name]:
        raise BadInput(
            f"machine.device is {name}, and torch {torch.__version__} finds no such device here; "
            "set machine.device to auto or cpu, or run on a machine that has one"
        )
    found = torch.cuda.device_count() if name == "cuda" else 1
    if machine.gpus > found:
        raise BadInput(
            f"machine.gpus is {machine.gpus}, this machine has {found} {name} "
            f"device{'s' * (found != 1)}; set machine.gpus={found} or run on a larger machine"
        )
    if machine.gpus * machine.nodes > 1:
        raise BadInput(
            f"machine.gpus {machine.gpus} x machine.nodes {machine.nodes}: this version trains on "
            "one device; set both to 1"
        )
    return torch.device(name)


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Forward and loss in the params' precision; fp32 changes nothing."""
    return torch.autocast(
        device.type, AUTOCAST_DTYPES.get(precision, torch.bfloat16), enabled=precision != "fp32"
    )
