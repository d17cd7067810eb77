"""What all tests share: one thread a process, the digits on disk, a run that takes seconds."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

# Before torch is loaded, for this process and every one it starts: workers with a thread a core
# each spin against one another.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["WANDB_MODE"] = "offline"

import pytest
import yaml

from lib import params as params_module
from lib.params import Params

TINY = {
    "task": "classify",
    "seed": 0,
    "model": {"name": "test_resnet"},
    "data": {
        "format": "folder", "image_size": 32, "val_crop": 1.0, "num_workers": 0,
        "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
        "augment": {"scale": [0.7, 1.0], "ratio": [0.9, 1.1], "hflip": 0.0},
    },
    "optim": {"lr": 0.1},
    "train": {"steps": 4, "batch_size": 32},
    "overfit": {"num_batches": 1, "batch_size": 16, "steps": 20},
    "lr_finder": {"steps": 20, "trial_steps": 5},
    "machine": {"device": "cpu"},
    "logging": {"csv": False, "tensorboard": False, "wandb": False},
}

TINY_DETECT = TINY | {
    "task": "detect",
    "model": {"name": "rtdetr_tiny"},
    "data": {
        "format": "scenes", "image_size": 64, "num_workers": 0,
        "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0],
    },
    "train": {"steps": 4, "batch_size": 4},
    "overfit": {"num_batches": 1, "batch_size": 4, "steps": 20},
}
NUM_SCENES = 24, 20  # training (one with a crowd region, three empty) and validation


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One temporary folder for the whole session; pytest-xdist gives each worker its own below."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def written_once(factory: pytest.TempPathFactory, name: str, write: Callable) -> Path:
    """A data set that the first worker to ask for it writes."""
    root = shared_folder(factory) / name
    with root.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            write(root)
    return root


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The handwritten digits as an ImageFolder (train/0..9, val/0..9). Read it, never write it."""
    from lib.datasets.demo import write_digits

    return written_once(tmp_path_factory, "digits", write_digits)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few scenes of digits with boxes (splits train and val). Read them, never write them."""
    from lib.datasets.scenes import write_scenes

    return written_once(tmp_path_factory, "scenes", lambda root: write_scenes(
        root, "train", "val", *NUM_SCENES))


@pytest.fixture
def tiny_params(digits: Path) -> Callable[..., Params]:
    """`tiny_params(tmp_path, **overrides)`: params of a run on the digits that takes seconds.

    Overrides are dotted keys, `**{"optim.lr": 0.1}`, or `__` for the dot: `optim__lr=0.1`. The
    file stays in `tmp_path/params.yaml`, without the overrides.
    """

    return maker(TINY, digits)


@pytest.fixture
def tiny_detect(scenes: Path) -> Callable[..., Params]:
    """`tiny_params` of a detection run, on the scenes."""
    return maker(TINY_DETECT, scenes)


def maker(tree: dict, root: Path) -> Callable[..., Params]:
    def make(tmp_path: Path, **overrides) -> Params:
        file = tmp_path / "params.yaml"
        file.write_text(yaml.safe_dump(tree | {"data": tree["data"] | {"root": str(root)}}))
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        return params_module.load(file, dotted)

    return make
