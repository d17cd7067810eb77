"""COCO JSON: ROOT/annotations/instances_SPLIT.json and the pictures in ROOT/SPLIT.

Category ids may start anywhere and have gaps (COCO's 80 classes run from 1 to 90): label k is the
k-th smallest id, and the census shows the mapping.
"""

import gc
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lib.datasets.detection import (
    DetectionDataset,
    Listing,
    Tally,
    check_channels,
    check_splits,
    files_below,
    listed,
)
from lib.datasets.pictures import is_image_name
from lib.errors import BadInput
from lib.params import Data, resolve_path

POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[[][0-9.,eE+\-\s]*\]')
"""A list of lists of numbers, up to its last bracket."""


def open_splits(data: Data, num_channels: int) -> tuple[DetectionDataset, DetectionDataset]:
    """The training and validation split, with one list of categories. Raises BadInput."""
    check_channels(num_channels)
    root = resolve_path(data.root)
    listings = [read_listing(root, split) for split in (data.train, data.val)]
    categories = [
        dict(zip(listing.category_ids, listing.names, strict=True)) for listing in listings
    ]
    if categories[0] != categories[1]:
        raise BadInput(_categories_differ(root, data, *categories))
    train, val = (
        DetectionDataset(listing, data, num_channels) for listing in listings
    )
    check_splits(train, val, data)
    return train, val


def read_listing(root: Path, split: str) -> Listing:
    """One split as it is written, its picture files looked up."""
    file = _annotation_file(root, split)
    document = read_json(file)
    names, category_ids = _categories(document, file)
    images, annotations = document["images"], document["annotations"]
    del document
    ids = _column(images, "id", int, np.int64, file, "image")
    file_names = _column(images, "file_name", str, object, file, "image")
    widths = _column(images, "width", _side, np.int64, file, "image")
    heights = _column(images, "height", _side, np.int64, file, "image")
    _no_duplicates(ids, file, "image id")
    _no_duplicates(file_names, file, "image file_name")

    # Which pictures are there
    tally = Tally()
    folder = _picture_folder(root, split, file_names)
    on_disk = files_below(folder)
    used = np.zeros(len(images), bool)
    for i, name in enumerate(file_names):
        if name not in on_disk:
            tally.drop("missing image file", name)
        elif on_disk[name] == 0:
            tally.drop("empty image file", name)
        elif min(widths[i], heights[i]) <= 0:
            tally.drop("image without a width and height in the annotations", name)
        else:
            used[i] = True
    if folder.name == split:  # a folder of this split alone
        for name in on_disk.keys() - set(file_names):
            if is_image_name(name):
                tally.drop("image file that the annotations do not list", name)

    # Boxes
    image_of_box = _positions(annotations, "image_id", ids, file, "images", file_names=None)
    labels = _positions(
        annotations, "category_id", np.asarray(category_ids), file, "categories",
        file_names=file_names[image_of_box],
    )
    boxes = _boxes(annotations)  # (M, 4) xywh, pixels
    _refuse_normalized(boxes, file)
    is_crowd = np.fromiter((bool(a.get("iscrowd")) for a in annotations), bool, len(annotations))
    areas = np.asarray([_number(a.get("area")) for a in annotations], np.float64)
    keep = used[image_of_box]
    for i in np.flatnonzero(~keep):
        tally.drop_box("box of a picture that is left out", file_names[image_of_box[i]])
    new_position = np.cumsum(used) - 1
    return Listing(
        split=split,
        root=folder,
        names=names,
        category_ids=category_ids,
        paths=file_names[used].tolist(),
        file_sizes=[on_disk[name] for name in file_names[used]],
        sizes=np.stack((widths, heights), 1)[used],
        image_ids=ids[used],
        image_of_box=new_position[image_of_box[keep]],
        corners=np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1)[keep],
        in_pixels=True,
        labels=labels[keep],
        is_crowd=is_crowd[keep],
        areas=areas[keep],
        places=file_names[image_of_box[keep]],
        tally=tally,
    )


def read_json(file: Path) -> dict:
    """The annotations without their polygons, which are nine tenths of the file.

    Python's garbage collector would walk the rest again and again while it grows.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        document = json.loads(POLYGONS.sub(b'"segmentation":0', file.read_bytes()))
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: cannot be read as JSON ({error})") from None
    finally:
        if collecting:
            gc.enable()
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise BadInput(f"{file}: has no list {key!r}; COCO annotations need images, "
                           "annotations and categories")
    return document


# --------------------------------------------------------------------------------------------
# Where things are
# --------------------------------------------------------------------------------------------


def _annotation_file(root: Path, split: str) -> Path:
    candidates = (
        root / "annotations" / f"instances_{split}.json",
        root / "annotations" / f"{split}.json",
        root / split / "_annotations.coco.json",
    )
    for file in candidates:
        if file.is_file():
            return file
    raise BadInput(
        f"{candidates[0]}: no such file (nor {', '.join(map(str, candidates[1:]))}); data.root "
        "must hold the annotations, and data.train and data.val name the splits"
    )


def _picture_folder(root: Path, split: str, file_names: np.ndarray) -> Path:
    """The first of the usual folders that holds one of the first pictures."""
    images = root / "images"
    candidates = (root / split, images / split, root / split / "images", images, root)
    some = file_names[:20]
    for folder in candidates:
        if any((folder / name).is_file() for name in some):
            return folder
    for folder in candidates[:2]:  # none of the first: the census will say how many are missing
        if folder.is_dir():
            return folder
    raise BadInput(f"{root / split}: no such folder; the pictures of {split} belong in it")


# --------------------------------------------------------------------------------------------
# What is in the lists
# --------------------------------------------------------------------------------------------


def _categories(document: dict, file: Path) -> tuple[list[str], list[int]]:
    """Names and ids by ascending id."""
    ids = _column(document["categories"], "id", int, np.int64, file, "category")
    names = _column(document["categories"], "name", str, object, file, "category")
    if not len(ids):
        raise BadInput(f"{file}: no category in it")
    _no_duplicates(ids, file, "category id")
    _no_duplicates(names, file, "category name")
    order = np.argsort(ids)
    return names[order].tolist(), ids[order].tolist()


def _column(
    rows: list, key: str, convert: Callable, dtype: type, file: Path, what: str
) -> np.ndarray:
    """`key` of every row, (len(rows),)."""
    column = np.empty(len(rows), dtype)
    for i, row in enumerate(rows):
        try:
            column[i] = convert(row[key])
        except (KeyError, TypeError, ValueError):
            raise BadInput(f"{file}: {what} number {i + 1} has no good {key!r}: {row}") from None
    return column


def _side(value) -> int:
    """A width or height; 0 where the annotations leave it out."""
    return int(value or 0)


def _number(value) -> float:
    return float(value) if isinstance(value, int | float) else np.nan


def _no_duplicates(values: np.ndarray, file: Path, what: str) -> None:
    unique, counts = np.unique(values, return_counts=True)
    if len(unique) < len(values):
        raise BadInput(
            f"{file}: {what} {listed(unique[counts > 1].tolist())} stands there more than once"
        )


def _positions(
    annotations: list, key: str, ids: np.ndarray, file: Path, where: str,
    file_names: np.ndarray | None,
) -> np.ndarray:
    """Where each annotation's `key` stands in `ids`, (M,). An unknown id is an error."""
    wanted = _column(annotations, key, int, np.int64, file, "annotation")  # (M,)
    order = np.argsort(ids)
    place = np.searchsorted(ids, wanted, sorter=order).clip(max=max(len(ids) - 1, 0))
    unknown = np.flatnonzero(ids[order][place] != wanted) if len(ids) else np.arange(len(wanted))
    if len(unknown):
        first = annotations[unknown[0]]
        image = f", {file_names[unknown[0]]}" if file_names is not None else ""
        values = np.unique(wanted[unknown]).tolist()
        span = f"{ids.min()} to {ids.max()}" if len(ids) else "nothing"
        raise BadInput(
            f"{file}: {len(unknown):,} of {len(annotations):,} annotations have a {key} that is "
            f"not in {where!r} ({span}): {listed(values)}; the first is annotation "
            f"{first.get('id')}{image}"
        )
    return order[place]


def _boxes(annotations: list) -> np.ndarray:
    """(M, 4) float64 as written; NaN where it is not four numbers."""
    rows = [annotation.get("bbox") for annotation in annotations]
    try:
        return np.asarray(rows, np.float64).reshape(len(rows), 4)
    except (TypeError, ValueError):
        boxes = np.full((len(rows), 4), np.nan)
        for i, row in enumerate(rows):
            if isinstance(row, list) and len(row) == 4:
                boxes[i] = [_number(value) for value in row]
        return boxes


def _refuse_normalized(boxes: np.ndarray, file: Path) -> None:
    sizes = boxes[:, 2:]
    if len(boxes) and np.nanmax(boxes, initial=0) <= 1 and np.nanmax(sizes, initial=0) > 0:
        raise BadInput(
            f"{file}: no number in any of the {len(boxes):,} boxes is above 1: they are divided by "
            "the picture's size, and COCO wants pixels (x, y of the upper left corner, width, "
            "height)"
        )


def _categories_differ(root: Path, data: Data, train: dict, val: dict) -> str:
    differing = [
        f"id {number} is {train.get(number, 'missing')!r} in {data.train} and "
        f"{val.get(number, 'missing')!r} in {data.val}"
        for number in sorted(train.keys() | val.keys())
        if train.get(number) != val.get(number)
    ]
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    return (
        f"{root / 'annotations'}: the two splits name other categories: "
        f"{'; '.join(differing[:5])}{more}. A label would mean one thing in training and another "
        "in validation: give both files one list"
    )
