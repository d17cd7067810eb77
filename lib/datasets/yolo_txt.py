"""YOLO text: a file a picture, a line a box: `class cx cy width height`, shares of the picture.

Found as the field lays it out: a YAML file in ROOT with `names`, `train` and `val`; or without one
ROOT/images/SPLIT and ROOT/labels/SPLIT, ROOT/SPLIT/images and ROOT/SPLIT/labels, or ROOT/SPLIT and
ROOT/labels/SPLIT. A picture without a label file holds no box.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib import strict_yaml
from lib.datasets.detection import (
    HEADER_THREADS,
    DetectionDataset,
    Listing,
    Tally,
    check_channels,
    check_splits,
    files_below,
    listed,
    read_sizes,
)
from lib.datasets.pictures import is_image_name
from lib.errors import BadInput
from lib.params import Data, resolve_path

ROUNDING = 1e-3  # how far a share may lie outside [0, 1] and still be taken as rounding
PIXELS = 2.0  # a line with a number above this is in pixels
FAULTY = [0.0, *[float("nan")] * 4]  # stands for a line that gives no class and box


def open_splits(data: Data, num_channels: int) -> tuple[DetectionDataset, DetectionDataset]:
    """The training and validation split, with one list of classes. Raises BadInput."""
    check_channels(num_channels)
    root = resolve_path(data.root)
    if not root.is_dir():
        raise BadInput(f"{root}: no such folder (data.root)")
    yaml_file = find_yaml(root)
    tree = strict_yaml.read(yaml_file.read_text("utf-8"), str(yaml_file))[0] if yaml_file else {}
    names = _names(tree, root, yaml_file)
    files = [_split_files(root, split, tree, yaml_file) for split in (data.train, data.val)]
    labels = [_read_labels(split) for split in files]
    if names is None:  # nothing names the classes: they are numbered, up to the largest in training
        largest = max((int(part.classes.max(initial=-1)) for part in labels[0]), default=-1)
        names = [str(number) for number in range(largest + 1)]
    for split, parts in zip(files, labels, strict=True):
        _refuse_unknown_classes(parts, names, split, yaml_file)
        _refuse_pixels(parts, split)
    train, val = (
        DetectionDataset(_listing(split, parts, names), data, num_channels)
        for split, parts in zip(files, labels, strict=True)
    )
    check_splits(train, val, data)
    return train, val


# --------------------------------------------------------------------------------------------
# Where things are
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitFiles:
    """The files of a split: pictures that can be opened, label files that exist."""

    split: str
    root: Path
    pictures: dict[str, int]
    """Bytes by path relative to `root`."""
    labels: list[Path | None]
    """The label file of each picture."""
    sizes: list[tuple[int, int]]
    tally: Tally


def find_yaml(root: Path) -> Path | None:
    """ROOT/data.yaml, or the only other YAML file in ROOT."""
    files = sorted((*root.glob("*.yaml"), *root.glob("*.yml")))
    for file in files:
        if file.stem == "data":
            return file
    if len(files) > 1:
        raise BadInput(
            f"{root}: {len(files)} YAML files ({listed([file.name for file in files])}) and none "
            "is data.yaml; rename the one that describes the data"
        )
    return files[0] if files else None


def label_folders(pictures: Path) -> list[Path]:
    """Where the labels of a folder of pictures may be, the most usual place first."""
    places = [pictures.parent / "labels" / pictures.name]
    if "images" in pictures.parts:  # the last "images" of the path becomes "labels"
        last = len(pictures.parts) - 1 - pictures.parts[::-1].index("images")
        places.insert(0, Path(*pictures.parts[:last], "labels", *pictures.parts[last + 1 :]))
    return places


def _label_folder(pictures: Path) -> Path:
    places = label_folders(pictures)
    for folder in places:
        if folder.is_dir():
            return folder
    if any(pictures.glob("*.txt")):  # beside the pictures, as darknet has them
        return pictures
    raise BadInput(
        f"{pictures}: no labels for these pictures; they belong in {places[0]} (an empty folder "
        "there: all background)"
    )


def _split_files(root: Path, split: str, tree: dict, yaml_file: Path | None) -> SplitFiles:
    tally = Tally()
    found: dict[Path, int] = {}  # picture: bytes
    label_of: dict[Path, Path] = {}
    for place in _places(root, split, tree, yaml_file):
        if place.is_dir():
            pictures = {place / name: size for name, size in files_below(place).items()
                        if is_image_name(name)}
            homes = dict.fromkeys(pictures, place)
        else:
            pictures = _listed_pictures(place, root, tally)
            homes = {path: path.parent for path in pictures}
        found |= pictures
        folders = {home: _label_folder(home) for home in set(homes.values())}
        texts = {
            folder / name
            for folder in folders.values() for name in files_below(folder)
            if name.endswith(".txt") and not name.endswith("classes.txt")
        }
        expected = {
            path: folders[home] / path.relative_to(home).with_suffix(".txt")
            for path, home in homes.items()
        }
        label_of |= {path: text for path, text in expected.items() if text in texts}
        if place.is_dir():
            for text in sorted(texts - set(expected.values())):
                tally.drop("label file without a picture", str(text))
    if not found:
        raise BadInput(f"{root}: no picture in the split {split!r}")

    base = Path(os.path.commonpath([path.parent for path in found]))
    used: dict[str, int] = {}
    labels, sizes = [], []
    ordered = sorted(found)
    for path, size in zip(ordered, read_sizes(ordered), strict=True):
        name = path.relative_to(base).as_posix()
        if not found[path]:
            tally.drop("empty image file", name)
        elif size is None:
            tally.drop("not a picture that can be opened", name)
        else:
            used[name] = found[path]
            labels.append(label_of.get(path))
            sizes.append(size)
    return SplitFiles(split, base, used, labels, sizes, tally)


def _places(root: Path, split: str, tree: dict, yaml_file: Path | None) -> list[Path]:
    """Folders of pictures, or text files that list them."""
    if split in tree:
        entries = tree[split] if isinstance(tree[split], list) else [tree[split]]
        base = root / str(tree.get("path", "."))
        base = base if base.is_dir() else root  # `path` is often that of its author's machine
        places = [_existing(base, root, str(entry)) for entry in entries]
        for entry, place in zip(entries, places, strict=True):
            if place is None:
                raise BadInput(f"{yaml_file}: {split}: {entry}: no such folder or list")
        return places
    candidates = [root / "images" / split, root / split / "images", root / split]
    for folder in candidates:
        if folder.is_dir():
            return [folder]
    raise BadInput(
        f"{root}: neither {listed([str(folder.relative_to(root)) for folder in candidates])} is a "
        f"folder, nor does a YAML file name {split!r}"
    )


def _existing(base: Path, root: Path, entry: str) -> Path | None:
    trimmed = entry.removeprefix("../")  # Roboflow writes ../train/images beside ROOT/train/images
    for place in (base / entry, root / entry, root / trimmed):
        if place.exists():
            return place.resolve()
    return None


def _listed_pictures(file: Path, root: Path, tally: Tally) -> dict[Path, int]:
    """The pictures that a text file names, one a line; bytes by path."""
    found = {}
    for line in file.read_text("utf-8").split("\n"):
        if line.strip():
            path = root / line.strip()
            if path.is_file():
                found[path.resolve()] = path.stat().st_size
            else:
                tally.drop("missing image file", line.strip())
    return found


def _names(tree: dict, root: Path, yaml_file: Path | None) -> list[str] | None:
    """Class names by number, from the YAML or ROOT/classes.txt; None: nothing names them."""
    if "names" in tree:
        names = tree["names"]
        if isinstance(names, dict):
            numbers = [str(number) for number in range(len(names))]
            if {str(number) for number in names} != set(numbers):
                raise BadInput(
                    f"{yaml_file}: names: the numbers must run from 0 to {len(names) - 1} without "
                    f"a gap, they are {listed(list(names))}"
                )
            names = [{str(key): name for key, name in names.items()}[number] for number in numbers]
        names = [str(name) for name in names]
        if "nc" in tree and tree["nc"] != len(names):
            raise BadInput(f"{yaml_file}: nc is {tree['nc']}, but there are {len(names)} names")
    elif yaml_file:
        raise BadInput(f"{yaml_file}: has no `names`, the list of the classes")
    elif (root / "classes.txt").is_file():
        names = (root / "classes.txt").read_text("utf-8").split("\n")
        names = [name.strip() for name in names if name.strip()]
    else:
        return None
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadInput(f"{yaml_file or root}: class name {listed(twice)} stands there twice")
    return names


# --------------------------------------------------------------------------------------------
# What the label files say
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """One label file of n lines."""

    classes: np.ndarray  # (n,) int64, 0 in a faulty line
    boxes: np.ndarray  # (n, 4) float64 cxcywh, NaN in a faulty line
    lines: list[int]
    """Line numbers, from 1."""
    faults: np.ndarray  # (n,) object: None, or what is wrong with the line


def parse(text: str) -> Labels:
    rows, lines, faults = [], [], []
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split()
        if not words:
            continue
        try:
            row, fault = _row(words)
        except ValueError:
            row, fault = FAULTY, "label line with a word that is no number"
        rows.append(row)
        lines.append(number)
        faults.append(fault)
    array = np.asarray(rows, np.float64).reshape(-1, 5)
    return Labels(array[:, 0].astype(np.int64), array[:, 1:], lines, np.asarray(faults, object))


def _row(words: list[str]) -> tuple[list[float], str | None]:
    """Class and box of a line, and what is wrong with it."""
    row = [float(word) for word in words]
    if len(row) > 6 and len(row) % 2:
        return FAULTY, "label line with a polygon instead of a box"
    if len(row) != 5:
        return FAULTY, "label line without exactly five numbers"
    if not row[0].is_integer():
        return FAULTY, "label line whose class is no whole number"
    if min(row[1:]) < -ROUNDING or max(row[1:]) > 1 + ROUNDING:
        return row, "box with a value outside [0, 1]"
    return row, None


def _read_labels(files: SplitFiles) -> list[Labels]:
    def read(path: Path | None) -> Labels:
        try:
            return parse(path.read_text("utf-8") if path else "")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{path}: cannot be read as a label file ({error})") from None

    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        return list(pool.map(read, files.labels))


def _refuse_unknown_classes(
    parts: Sequence[Labels], names: Sequence[str], files: SplitFiles, yaml_file: Path | None
) -> None:
    places, numbers = [], set()
    for path, part in zip(files.labels, parts, strict=True):
        for i in np.flatnonzero((part.classes < 0) | (part.classes >= len(names))):
            places.append(f"{path}:{part.lines[i]}")
            numbers.add(int(part.classes[i]))
    if places:
        lowest = min(int(part.classes.min()) for part in parts if len(part.classes))
        hint = " (do they count from 1?)" if lowest >= 1 and numbers == {len(names)} else ""
        where = yaml_file or "the training labels"
        raise BadInput(
            f"{places[0]}: class {listed(sorted(numbers))} lies outside the {len(names)} classes "
            f"of {where}, 0 to {len(names) - 1}{hint}; {len(places):,} such lines in "
            f"{files.split}: {', '.join(places[:3])}"
        )


def _refuse_pixels(parts: Sequence[Labels], files: SplitFiles) -> None:
    """A file whose every line is in pixels was written that way; a single line is a slip."""
    in_pixels = [
        path for path, part in zip(files.labels, parts, strict=True)
        if (part.boxes > PIXELS).any()
        and ((part.boxes > PIXELS).any(1) | np.isnan(part.boxes).all(1)).all()
    ]
    if in_pixels:
        raise BadInput(
            f"{in_pixels[0]}: the boxes are in pixels; YOLO labels are shares of the picture, "
            "center x and width divided by its width, center y and height by its height. "
            f"{len(in_pixels):,} such files in {files.split}"
        )


def _listing(files: SplitFiles, parts: Sequence[Labels], names: list[str]) -> Listing:
    places = [
        f"{path}:{line}"
        for path, part in zip(files.labels, parts, strict=True) for line in part.lines
    ]
    boxes = np.concatenate([np.empty((0, 4)), *(part.boxes for part in parts)])  # (M, 4)
    classes = np.concatenate([np.empty(0, np.int64), *(part.classes for part in parts)])  # (M,)
    faults = np.concatenate([np.empty(0, object), *(part.faults for part in parts)])  # (M,)
    center, size = boxes[:, :2], boxes[:, 2:]
    return Listing(
        split=files.split,
        root=files.root,
        names=names,
        category_ids=range(len(names)),
        paths=list(files.pictures),
        file_sizes=list(files.pictures.values()),
        sizes=np.asarray(files.sizes).reshape(-1, 2),
        image_ids=np.arange(1, len(files.pictures) + 1),
        image_of_box=np.repeat(np.arange(len(parts)), [len(part.lines) for part in parts]),
        corners=np.concatenate((center - size / 2, center + size / 2), 1),
        in_pixels=False,
        labels=classes,
        is_crowd=np.zeros(len(boxes), bool),
        areas=np.full(len(boxes), np.nan),
        places=places,
        tally=files.tally,
        faults=faults,
    )
