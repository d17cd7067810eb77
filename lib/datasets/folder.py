"""Images in class folders: ROOT/SPLIT/CLASS/IMAGE, as torchvision's ImageFolder lays them out."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lib.datasets import pictures
from lib.datasets.pictures import BROKEN, EXIF_ORIENTATION  # noqa: F401 (who reads us needs them)
from lib.errors import BadInput
from lib.params import Data, resolve_path


@dataclass(frozen=True)
class Census:
    """What became of every file of a split."""

    split: str
    listed: int
    used: int
    dropped: dict[str, int]
    """Files left out, by reason."""
    per_class: dict[str, int]
    """Images used, by class name."""
    digest: str
    """Of the sorted relative paths and sizes of the used files, 16 hex digits."""


class FolderDataset:
    """One split: paths, labels, and the reading of one image.

    `class_names` fixes the labels; it comes from the training split, also for validation.
    """

    def __init__(self, root: Path, split: str, class_names: tuple[str, ...], num_channels: int):
        self.class_names = class_names
        self.mode = pictures.MODES[num_channels]
        self.paths: list[Path] = []
        labels: list[int] = []
        dropped: dict[str, int] = {}
        listing = hashlib.sha256()
        for label, name in enumerate(class_names):
            for entry in sorted(os.scandir(root / split / name), key=lambda entry: entry.name):
                reason = _reason_to_drop(entry)
                if reason:
                    dropped[reason] = dropped.get(reason, 0) + 1
                    continue
                self.paths.append(Path(entry.path))
                labels.append(label)
                listing.update(f"{name}/{entry.name} {entry.stat().st_size}\n".encode())
        self.labels = np.asarray(labels, dtype=np.int64)
        counts = np.bincount(self.labels, minlength=len(class_names))
        self.census = Census(
            split=split,
            listed=len(self.paths) + sum(dropped.values()),
            used=len(self.paths),
            dropped=dropped,
            per_class=dict(zip(class_names, counts.tolist(), strict=True)),
            digest=listing.hexdigest()[:16],
        )

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        """Where image `index` is."""
        return self.paths[index]

    def open(self, index: int) -> Image.Image:
        """Image `index`, header read and pixels still on disk."""
        return pictures.open_picture(self.paths[index])

    def pixels(self, image: Image.Image) -> Image.Image:
        """The decoded image, upright by its EXIF tag, with the channels the network reads."""
        return pictures.decoded(image, self.mode)

    def unreadable(self, index: int, error: Exception) -> BadInput:
        return pictures.unreadable(self.paths[index], error)


def _reason_to_drop(entry: os.DirEntry) -> str | None:
    if entry.name.startswith("."):
        return "hidden file"
    if entry.is_dir():
        return "folder inside a class folder"
    if not pictures.is_image_name(entry.name):
        return "not an image suffix"
    return "empty file" if entry.stat().st_size == 0 else None


def open_splits(data: Data, num_channels: int) -> tuple[FolderDataset, FolderDataset]:
    """The training and validation split, with one list of classes.

    Raises BadInput: a missing folder, an empty class, a class only validation has, channels no
    picture file has, a number of images other than the params state.
    """
    root = resolve_path(data.root)
    if num_channels not in (1, 3):
        raise BadInput(f"model.in_chans is {num_channels}; picture folders are read as 1 or 3")
    for split in (data.train, data.val):
        if not (root / split).is_dir():
            raise BadInput(
                f"{root / split}: no such folder; data.root must hold {data.train}/CLASS/IMAGE "
                f"and {data.val}/CLASS/IMAGE"
            )
    train_names = _class_folders(root / data.train)
    val_names = _class_folders(root / data.val)
    only_val = sorted(set(val_names) - set(train_names))
    if only_val:
        raise BadInput(
            f"{root / data.val}: class {_listed(only_val)} is not among the training classes; "
            "a network cannot learn a class it never sees. Rename or remove the folder"
        )
    class_names = choose_classes(train_names, data.classes, root / data.train)
    train = FolderDataset(root, data.train, class_names, num_channels)
    shared = set(class_names) & set(val_names)
    missing = [name for name in class_names if name not in shared]
    if missing:
        raise BadInput(
            f"{root / data.val}: no folder for class {_listed(missing)}, which training has; "
            "add validation images or leave the class out with data.classes"
        )
    val = FolderDataset(root, data.val, class_names, num_channels)
    for dataset, expected, key in (
        (train, data.num_train_images, "num_train_images"),
        (val, data.num_val_images, "num_val_images"),
    ):
        empty = [name for name, count in dataset.census.per_class.items() if count == 0]
        if empty:
            raise BadInput(
                f"{root / dataset.census.split / empty[0]}: no image in this class folder "
                f"({len(empty)} such); add images or remove the folder"
            )
        if expected is not None and expected != len(dataset):
            raise BadInput(
                f"{root / dataset.census.split}: {len(dataset):,} images, data.{key} says "
                f"{expected:,}; complete the data or correct the key"
            )
    return train, val


def _class_folders(split: Path) -> list[str]:
    names = sorted(
        entry.name for entry in os.scandir(split)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise BadInput(f"{split}: no class folder in it; images belong in {split}/CLASS/IMAGE")
    return names


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def choose_classes(
    names: list[str], wanted: int | tuple[str, ...] | None, where: Path
) -> tuple[str, ...]:
    """The classes in use, sorted; their position is the label.

    A number keeps the classes whose names have the smallest SHA-256, so the subset is the same in
    every run and on every machine (Python's own hash() is salted anew in each process).
    """
    if wanted is None:
        return tuple(names)
    if isinstance(wanted, int):
        if wanted > len(names):
            raise BadInput(f"{where}: has {len(names)} classes, data.classes asks for {wanted}")
        ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
        return tuple(sorted(ranked[:wanted]))
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise BadInput(f"{where}: no class folder {_listed(unknown)} (data.classes asks for it)")
    return tuple(sorted(set(wanted)))
