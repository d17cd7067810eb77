"""A detection split in memory: pictures, their boxes, and what became of every box.

Whatever the format on disk, boxes become one thing, here and only here: float32 cxcywh normalized
by the picture's width and height (`make_boxes`). Pixels return at the metric and in pictures.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lib.datasets import pictures
from lib.datasets.folder import choose_classes
from lib.errors import BadInput
from lib.params import Data

NUM_EXAMPLES = 5  # file names kept for each reason
CLIP_TOLERANCE = 0.01  # share of the picture; a box that reaches further out is counted as clipped
HEADER_THREADS = 16  # headers are small reads: on network storage nearly all of it is waiting


@dataclass(frozen=True)
class Census:
    """What became of every picture and every box of a split."""

    split: str
    listed: int
    """Pictures that the annotations name or the folder holds."""
    used: int
    dropped: dict[str, int]
    """Pictures left out, by reason. With `used` they add up to `listed`."""
    boxes_listed: int
    boxes_used: int
    """Boxes kept, crowd regions among them."""
    boxes_dropped: dict[str, int]
    """Boxes left out, by reason. With `boxes_used` they add up to `boxes_listed`."""
    boxes_clipped: int
    """Boxes used that reached more than 1 % of the picture beyond its edge, and were cut there."""
    crowd: int
    """Regions marked as a crowd: kept for the metric, never a training target."""
    negatives: int
    """Pictures used that hold no box: background, kept."""
    emptied: int
    """Pictures among these that had boxes, all dropped: they now teach that nothing is there."""
    most_boxes: int
    """Training targets of the fullest picture."""
    per_class: dict[str, int]
    """Training targets by class name."""
    mapping: dict[str, str]
    """The file's category id and name to label, as `"18 dog": "16"`."""
    examples: dict[str, tuple[str, ...]]
    """The first few files of each reason."""
    digest: str
    """Of the used files' relative paths and sizes, the boxes and the labels, 16 hex digits."""


class Boxes(NamedTuple):
    """The n boxes of one picture."""

    boxes: np.ndarray  # (n, 4) float32 normalized cxcywh
    labels: np.ndarray  # (n,) int64
    is_crowd: np.ndarray  # (n,) bool
    areas: np.ndarray  # (n,) float64, square pixels of the picture as annotated


class DetectionDataset:
    """One split. The boxes of picture i are rows `offsets[i]:offsets[i + 1]` of the flat arrays."""

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    """The id each label has in the annotation file."""
    root: Path
    """The folder of the pictures."""
    paths: list[str]
    """Pictures, relative to `root`, sorted."""
    sizes: np.ndarray
    """(N, 2) width and height of the upright picture, pixels."""
    image_ids: np.ndarray
    """(N,) int64, as in the annotations."""
    offsets: np.ndarray
    """(N + 1,) int64."""
    boxes: np.ndarray
    """(M, 4) float32 normalized cxcywh."""
    labels: np.ndarray
    """(M,) int64."""
    is_crowd: np.ndarray
    """(M,) bool."""
    areas: np.ndarray
    """(M,) float64, square pixels."""
    census: Census

    def __init__(self, listing: "Listing", data: Data, num_channels: int):
        """`data.single_class` makes every class that `data.classes` keeps one, named "object"."""
        self.root, self.mode = listing.root, pictures.MODES[num_channels]
        tally = listing.tally

        # Pictures, sorted by path: the same order from every format and on every machine.
        order = np.asarray(sorted(range(len(listing.paths)), key=listing.paths.__getitem__), int)
        self.paths = [listing.paths[i] for i in order]
        self.sizes = np.asarray(listing.sizes, np.int64).reshape(-1, 2)[order]
        self.image_ids = np.asarray(listing.image_ids, np.int64)[order]
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))

        # Boxes, sorted by picture, the faulty ones dropped.
        image = place[listing.image_of_box]  # (M,)
        by_image = np.argsort(image, kind="stable")
        image, corners = image[by_image], listing.corners[by_image]
        labels, is_crowd = listing.labels[by_image], listing.is_crowd[by_image]
        areas, places = listing.areas[by_image], [listing.places[i] for i in by_image]
        had_box = np.bincount(image, minlength=len(self.paths)) > 0
        units = self.sizes[image] if listing.in_pixels else np.ones((len(image), 2))
        boxes, clipped, faults = make_boxes(corners, units)
        if listing.faults is not None:
            known = listing.faults[by_image]
            faults = np.where(known.astype(bool), known, faults)
        kept_classes = _chosen_classes(listing, data)
        faults[~np.isin(labels, kept_classes)] = "class not in data.classes"
        keep = ~faults.astype(bool)
        for i in np.flatnonzero(~keep):
            tally.drop_box(faults[i], places[i])
        for i in np.flatnonzero(clipped & keep):
            tally.example("clipped at the edge", places[i])
        image = image[keep]
        self.boxes, self.is_crowd = boxes[keep], is_crowd[keep]
        new_label = np.full(len(listing.names), -1)
        new_label[kept_classes] = 0 if data.single_class else np.arange(len(kept_classes))
        self.labels = new_label[labels[keep]]
        self.class_names = tuple(listing.names[i] for i in kept_classes)
        self.category_ids = tuple(listing.category_ids[i] for i in kept_classes)
        if data.single_class:
            self.class_names, self.category_ids = ("object",), (1,)
        pixel_areas = self.boxes[:, 2:].astype(np.float64).prod(1) * self.sizes[image].prod(1)
        self.areas = np.where(np.isfinite(areas[keep]), areas[keep], pixel_areas)
        self.offsets = np.searchsorted(image, np.arange(len(self.paths) + 1))

        counts = np.diff(self.offsets)
        targets = np.bincount(image[~self.is_crowd], minlength=len(self.paths))
        emptied = had_box & (counts == 0)
        for i in np.flatnonzero(emptied):
            tally.example("all boxes dropped", self.paths[i])
        per_class = np.bincount(self.labels[~self.is_crowd], minlength=len(self.class_names))
        self.census = Census(
            split=listing.split,
            listed=len(self.paths) + sum(tally.dropped.values()),
            used=len(self.paths),
            dropped=tally.dropped,
            boxes_listed=len(self.boxes) + sum(tally.boxes_dropped.values()),
            boxes_used=len(self.boxes),
            boxes_dropped=tally.boxes_dropped,
            boxes_clipped=int((clipped & keep).sum()),
            crowd=int(self.is_crowd.sum()),
            negatives=int((counts == 0).sum()),
            emptied=int(emptied.sum()),
            most_boxes=int(targets.max(initial=0)),
            per_class=dict(zip(self.class_names, per_class.tolist(), strict=True)),
            mapping={
                f"{listing.category_ids[i]} {listing.names[i]}": str(new_label[i])
                for i in kept_classes
            },
            examples={reason: tuple(names) for reason, names in tally.examples.items()},
            digest=self._digest([listing.file_sizes[i] for i in order]),
        )

    def _digest(self, file_sizes: Iterable[int]) -> str:
        listing = hashlib.sha256(repr(self.class_names).encode())
        for path, size in zip(self.paths, file_sizes, strict=True):
            listing.update(f"{path} {size}\n".encode())
        for array in (self.offsets, self.boxes, self.labels, self.is_crowd):
            listing.update(np.ascontiguousarray(array).tobytes())
        return listing.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.paths)

    def annotations(self, index: int) -> Boxes:
        """All boxes of picture `index`, crowd regions among them."""
        rows = slice(self.offsets[index], self.offsets[index + 1])
        return Boxes(self.boxes[rows], self.labels[rows], self.is_crowd[rows], self.areas[rows])

    def targets(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """What is to be learnt: boxes (n, 4) and labels (n,), without crowd regions."""
        boxes, labels, is_crowd, _ = self.annotations(index)
        return boxes[~is_crowd], labels[~is_crowd]

    def file(self, index: int) -> Path:
        """Where picture `index` is."""
        return self.root / self.paths[index]

    def open(self, index: int) -> Image.Image:
        """Picture `index`, header read and pixels still on disk.

        A picture that is not of the annotated size is refused: its boxes would lie elsewhere.
        One of the annotated size only as it is stored keeps lying so, whatever its EXIF tag says.
        """
        image = pictures.open_picture(self.file(index))
        wanted = tuple(self.sizes[index].tolist())
        try:
            if pictures.upright_size(image) != wanted:
                if image.size != wanted:
                    raise BadInput(self._other_size(index, image.size))
                del image.getexif()[pictures.EXIF_ORIENTATION]
        except pictures.BROKEN as error:
            raise self.unreadable(index, error) from None
        return image

    def pixels(self, image: Image.Image) -> Image.Image:
        """The decoded image, upright by its EXIF tag, with the channels the network reads."""
        return pictures.decoded(image, self.mode)

    def unreadable(self, index: int, error: Exception) -> BadInput:
        return pictures.unreadable(self.file(index), error)

    def _other_size(self, index: int, size: tuple[int, int]) -> str:
        width, height = self.sizes[index]
        return (
            f"{self.file(index)}: {size[0]} x {size[1]} pixels, the annotations say "
            f"{width} x {height}; the boxes belong to another version of this picture"
        )

    def bad_headers(self, indices: Iterable[int] | None = None) -> list[str]:
        """Pictures that cannot be opened or are not of the annotated size, a sentence each."""

        def problem(index: int) -> str | None:
            try:
                self.open(index).close()
            except BadInput as error:
                return str(error)

        with ThreadPoolExecutor(HEADER_THREADS) as pool:
            found = pool.map(problem, range(len(self)) if indices is None else indices)
            return [sentence for sentence in found if sentence]


# --------------------------------------------------------------------------------------------
# What a format hands over
# --------------------------------------------------------------------------------------------


class Tally:
    """Counts what is left out, with the first few file names of each reason."""

    def __init__(self):
        self.dropped: dict[str, int] = {}
        self.boxes_dropped: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}

    def drop(self, reason: str, name: str) -> None:
        """A picture, or a file that belongs to none."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.example(reason, name)

    def drop_box(self, reason: str, name: str) -> None:
        self.boxes_dropped[reason] = self.boxes_dropped.get(reason, 0) + 1
        self.example(reason, name)

    def example(self, reason: str, name: str) -> None:
        names = self.examples.setdefault(reason, [])
        if len(names) < NUM_EXAMPLES and name not in names:
            names.append(name)


@dataclass(frozen=True)
class Listing:
    """A split as its format reads it: N pictures that exist, M boxes as they are written."""

    split: str
    root: Path
    names: Sequence[str]
    """Class names by ascending category id."""
    category_ids: Sequence[int]
    """Ascending."""
    paths: list[str]
    file_sizes: list[int]
    """Bytes."""
    sizes: np.ndarray
    """(N, 2) width, height."""
    image_ids: np.ndarray
    """(N,)"""
    image_of_box: np.ndarray
    """(M,) position in `paths`."""
    corners: np.ndarray
    """(M, 4) float64 xyxy, in pixels or normalized, unchecked."""
    in_pixels: bool
    labels: np.ndarray
    """(M,) position in `names`."""
    is_crowd: np.ndarray
    """(M,) bool"""
    areas: np.ndarray
    """(M,) float64 square pixels; NaN: take the box's."""
    places: Sequence[str]
    """(M,) where each box is written: a file, or file:line."""
    tally: Tally
    """What the format has left out already."""
    faults: np.ndarray | None = None
    """(M,) object: None, or why the format refuses this box."""


def make_boxes(
    corners: np.ndarray, units: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The one internal form of a box.

    corners (M, 4) float64 xyxy; units (M, 2), the picture's width and height in the same unit.
    Returns boxes (M, 4) float32 normalized cxcywh cut to the picture; clipped (M,) bool; faults
    (M,) object: None, or why the box must be dropped.
    """
    scaled = corners / np.tile(units, 2)  # (M, 4)
    inside = scaled.clip(0, 1)
    low, high = inside[:, :2], inside[:, 2:]
    boxes = np.concatenate(((low + high) / 2, high - low), 1).astype(np.float32)
    with np.errstate(invalid="ignore"):
        clipped = (np.abs(inside - scaled) > CLIP_TOLERANCE).any(1)
        faults = np.full(len(corners), None, object)
        faults[(boxes[:, 2:] <= 0).any(1)] = "box outside the picture"
        faults[(corners[:, 2:] <= corners[:, :2]).any(1)] = "box of zero or negative size"
    faults[~np.isfinite(corners).all(1)] = "box not made of four finite numbers"
    return boxes, clipped, faults


def _chosen_classes(listing: Listing, data: Data) -> list[int]:
    """Positions in `listing.names` of the classes that `data.classes` keeps, ascending."""
    names, wanted = list(listing.names), data.classes
    if isinstance(wanted, tuple) and set(wanted) - set(names):
        unknown = sorted(set(wanted) - set(names))
        raise BadInput(
            f"data.classes: {listed(unknown)} is not among the {len(names)} classes of "
            f"{listing.root}: {listed(names)}"
        )
    chosen = set(choose_classes(names, wanted, listing.root))
    return [i for i, name in enumerate(names) if name in chosen]


def check_splits(train: DetectionDataset, val: DetectionDataset, data: Data) -> None:
    """What must hold before a network is built. Raises BadInput."""
    for dataset, expected, key in (
        (train, data.num_train_images, "num_train_images"),
        (val, data.num_val_images, "num_val_images"),
    ):
        census, where = dataset.census, dataset.root
        if not len(dataset):
            reasons = "; ".join(
                f"{count:,} {reason}: {', '.join(census.examples[reason])}"
                for reason, count in census.dropped.items()
            )
            raise BadInput(f"{where}: no picture to use ({reasons or 'the list is empty'})")
        if census.boxes_used == census.crowd:
            reasons = ", ".join(f"{count:,} {why}" for why, count in census.boxes_dropped.items())
            raise BadInput(
                f"{where}: {len(dataset):,} pictures and no box to learn or judge by "
                f"({reasons or 'none is annotated'})"
            )
        if expected is not None and expected != len(dataset):
            raise BadInput(
                f"{where}: {len(dataset):,} images, data.{key} says {expected:,}; complete the "
                "data or correct the key"
            )


def check_channels(num_channels: int) -> None:
    if num_channels not in pictures.MODES:
        raise BadInput(f"model.in_chans is {num_channels}; picture files are read as 1 or 3")


def read_sizes(paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Width and height of each upright picture, from its header; None where there is none."""

    def size(path: Path) -> tuple[int, int] | None:
        try:
            with pictures.open_picture(path) as image:
                return pictures.upright_size(image)
        except (BadInput, *pictures.BROKEN):
            return None

    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        return list(pool.map(size, paths))


def files_below(root: Path, recursive: bool = True) -> dict[str, int]:
    """Bytes of every visible file below `root`, by relative path with /, sorted."""
    found: dict[str, int] = {}
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = f"{folder}{entry.name}"
                if not entry.is_dir():
                    try:
                        found[name] = entry.stat().st_size
                    except OSError:  # a link to nothing
                        found[name] = 0
                elif recursive:
                    folders.append(f"{name}/")
    return dict(sorted(found.items()))


def listed(names: Sequence[str], most: int = NUM_EXAMPLES) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
