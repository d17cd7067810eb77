"""The embedded detection data: handwritten digits lying about on cluttered backgrounds.

The digits are the 1,797 real scans that ship with scikit-learn (8 x 8 pixels); validation scenes
are made of digits that no training scene shows. Written once as JPEG with COCO JSON, and as YOLO
text beside it: the same folder opens as either format.
"""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lib.datasets import coco, convert, yolo_txt
from lib.datasets.detection import DetectionDataset
from lib.params import Data, resolve_path

HEIGHT, WIDTHS = 128, (128, 160, 192)
NUM_TRAIN, NUM_VAL = 1000, 100
SEED = 3
DIGIT_SIDES = 20, 64  # height of a digit, pixels, log-uniform
MARGIN = 3  # pixels between any two digits


def open_splits(data: Data, num_channels: int) -> tuple[DetectionDataset, DetectionDataset]:
    """The scenes' training and validation split; writes the files where they are not there yet."""
    _written(data)
    return coco.open_splits(data, num_channels)


def open_yolo_splits(data: Data, num_channels: int) -> tuple[DetectionDataset, DetectionDataset]:
    """The same, by the YOLO labels, which know no crowd regions."""
    _written(data)
    return yolo_txt.open_splits(data, num_channels)


def _written(data: Data) -> None:
    root = resolve_path(data.root)
    if not root.exists():
        write_scenes(root, data.train, data.val)


def write_scenes(
    root: Path, train: str = "train", val: str = "val",
    num_train: int = NUM_TRAIN, num_val: int = NUM_VAL,
) -> None:
    """Write all scenes below `root`, whole or not at all."""
    from sklearn.datasets import load_digits  # a second of import that only the first run pays

    digits = load_digits()
    is_val = np.arange(len(digits.target)) % 5 == 4
    temporary = root.with_name(f".{root.name}.{os.getpid()}")
    try:
        for family, (split, count, chosen) in enumerate(
            ((train, num_train, ~is_val), (val, num_val, is_val))
        ):
            classes = digits.target[chosen].tolist()
            _write_split(temporary, split, count, digits.images[chosen], classes, family)
        here = Data(root=str(temporary), train=train, val=val)
        convert.to_yolo(temporary, *coco.open_splits(here, 3))
        temporary.rename(root)
    except OSError:
        if not root.exists():  # else another process wrote the same files first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_split(
    root: Path, split: str, count: int, digits: np.ndarray, classes: list[int], family: int
) -> None:
    """digits (N, 8, 8), 0 to 16; classes N; `family` tells the random numbers of the splits apart.
    """
    images, annotations = [], []
    (root / split).mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng((SEED, family, number))
        picture, items = make_scene(rng, number, digits, classes)
        name = f"scene_{number:04d}.jpg"
        picture.save(root / split / name, quality=90)
        images.append(
            {"id": number + 1, "file_name": name, "width": picture.width, "height": picture.height}
        )
        for digit, (left, top, right, bottom), is_crowd in items:
            width, height = right - left, bottom - top
            annotations.append({
                "id": len(annotations) + 1, "image_id": number + 1, "category_id": digit + 1,
                "bbox": [left, top, width, height], "area": width * height, "iscrowd": is_crowd,
            })
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps({
        "images": images,
        "annotations": annotations,
        "categories": [{"id": digit + 1, "name": str(digit)} for digit in range(10)],
    }))


Item = tuple[int, tuple[int, int, int, int], int]
"""A digit's class, its box (left, top, right, bottom) in pixels, and 1 for a crowd region."""


def make_scene(
    rng: np.random.Generator, number: int, digits: np.ndarray, classes: list[int]
) -> tuple[Image.Image, list[Item]]:
    """One scene. Of every 20: two empty, one crowded with 12 to 20 digits, one with a crowd region;
    the others hold one to six digits.
    """
    kind = number % 20
    width = int(rng.choice(WIDTHS))
    canvas = _background(rng, width)  # (H, W, 3) float
    items: list[Item] = []
    taken: list[tuple[int, int, int, int]] = []
    if kind in (3, 13):
        wanted, sides = 0, DIGIT_SIDES
    elif kind == 7:
        wanted, sides = int(rng.integers(12, 21)), (18, 26)
    else:
        wanted, sides = int(rng.integers(1, 7)), DIGIT_SIDES
    if kind == 17:
        items.append(_crowd(rng, canvas, digits, classes))
        taken.append(items[0][1])
    for _ in range(wanted):
        which = int(rng.integers(len(digits)))
        side = round(math.exp(rng.uniform(*np.log(sides))))
        ink = _ink(digits[which], side)
        box = _free_place(rng, ink.shape, width, taken)
        if box is not None:
            _paint(rng, canvas, ink, box)
            taken.append(box)
            items.append((classes[which], box, 0))
    canvas += rng.normal(0, rng.uniform(1, 5), canvas.shape)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), items


def _background(rng: np.random.Generator, width: int) -> np.ndarray:
    """Soft patches of colour with lines, ellipses and rectangles over them, (H, W, 3) float."""
    patches = rng.integers(40, 216, (4, 6, 3)).astype(np.uint8)
    picture = Image.fromarray(patches).resize((width, HEIGHT), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(6, 16))):
        x, y = rng.uniform(-10, width), rng.uniform(-10, HEIGHT)
        w, h = rng.uniform(6, 50, 2)
        colour = tuple(rng.integers(20, 236, 3).tolist())
        shape = int(rng.integers(3))
        if shape == 0:
            draw.line((x, y, x + w * rng.choice((-1, 1)), y + h), colour, int(rng.integers(1, 4)))
        elif shape == 1:
            draw.ellipse((x, y, x + w, y + h), outline=colour, width=int(rng.integers(1, 4)))
        else:
            draw.rectangle((x, y, x + w, y + h), fill=colour)
    return np.asarray(picture, np.float64).copy()


def _ink(digit: np.ndarray, side: int) -> np.ndarray:
    """The strokes of a digit, `side` pixels high and cut to the ink: (h, w) in [0, 1]."""
    grey = Image.fromarray((digit * (255 / 16)).astype(np.uint8))
    rows, columns = (np.flatnonzero((digit > 3).any(axis)) for axis in (1, 0))
    tight = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    scale = side / (tight[3] - tight[1])
    size = (max(round((tight[2] - tight[0]) * scale), 4), side)
    large = np.asarray(grey.resize(size, Image.Resampling.BICUBIC, box=tight), np.float64) / 255
    return (1.35 * large - 0.2).clip(0, 1)


def _free_place(
    rng: np.random.Generator, shape: tuple[int, int], width: int, taken: list
) -> tuple[int, int, int, int] | None:
    """A place for (h, w) pixels that touches none of the taken ones; None after 50 tries."""
    h, w = shape
    for _ in range(50):
        left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, HEIGHT - h + 1))
        box = left, top, left + w, top + h
        if all(
            box[0] >= other[2] + MARGIN or other[0] >= box[2] + MARGIN
            or box[1] >= other[3] + MARGIN or other[1] >= box[3] + MARGIN
            for other in taken
        ):
            return box
    return None


def _paint(
    rng: np.random.Generator, canvas: np.ndarray, ink: np.ndarray, box: tuple[int, int, int, int]
) -> None:
    """Ink in a colour that stands out from what lies below it."""
    left, top, right, bottom = box
    below = canvas[top:bottom, left:right]  # (h, w, 3), a view
    dark = below.mean() > 127
    colour = rng.uniform(0, 60, 3) if dark else rng.uniform(195, 255, 3)
    below += ink[:, :, None] * (colour - below)


def _crowd(
    rng: np.random.Generator, canvas: np.ndarray, digits: np.ndarray, classes: list[int]
) -> Item:
    """A heap of overlapping digits of one class, annotated as one crowd region."""
    kind = int(rng.integers(10))
    members = np.flatnonzero(np.asarray(classes) == kind)
    width, height = 44, 30
    left = int(rng.integers(0, canvas.shape[1] - width + 1))
    top = int(rng.integers(0, HEIGHT - height + 1))
    for _ in range(18):
        ink = _ink(digits[int(rng.choice(members))], 11)
        x = left + int(rng.integers(0, width - ink.shape[1] + 1))
        y = top + int(rng.integers(0, height - ink.shape[0] + 1))
        _paint(rng, canvas, ink, (x, y, x + ink.shape[1], y + ink.shape[0]))
    return kind, (left, top, left + width, top + height), 1
