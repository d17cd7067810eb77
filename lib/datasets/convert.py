"""From COCO JSON to YOLO text and back. The pictures stay where they are.

`to_yolo` writes label files and data.yaml beside the pictures, `to_coco` the annotations; the data
set can then be opened as either. What the other format cannot say is left out and counted.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from lib.datasets.detection import DetectionDataset
from lib.datasets.yolo_txt import label_folders
from lib.errors import BadInput


@dataclass(frozen=True)
class Conversion:
    """What a conversion of one split wrote."""

    split: str
    to: Path
    images: int
    """Pictures, those without a box among them."""
    boxes: int
    left_out: dict[str, int]
    """Boxes not written, by reason; what the opening of the source dropped is among them."""


def to_yolo(root: Path, *splits: DetectionDataset) -> list[Conversion]:
    """Write a label folder for each split and ROOT/data.yaml. Nothing is overwritten.

    YOLO text has no crowd regions: they are left out.
    """
    description = root / "data.yaml"
    folders = [label_folders(dataset.root)[0] for dataset in splits]
    _refuse_existing(description, *folders)
    conversions = []
    for dataset, folder in zip(splits, folders, strict=True):
        _refuse_shared_stems(dataset)
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
        temporary.mkdir(parents=True)
        for index, path in enumerate(dataset.paths):
            boxes, labels = dataset.targets(index)
            lines = [
                f"{label} {' '.join(f'{value:.9g}' for value in box)}\n"
                for box, label in zip(boxes.tolist(), labels.tolist(), strict=True)
            ]
            file = (temporary / path).with_suffix(".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(lines))
        temporary.rename(folder)
        crowd = {"crowd region": dataset.census.crowd} if dataset.census.crowd else {}
        conversions.append(Conversion(
            dataset.census.split, folder, len(dataset), len(dataset.boxes) - dataset.census.crowd,
            dataset.census.boxes_dropped | crowd,
        ))
    _write(description, yaml.safe_dump({
        **{dataset.census.split: _relative(dataset.root, root) for dataset in splits},
        "names": dict(enumerate(splits[0].class_names)),
    }, sort_keys=False, allow_unicode=True))
    return conversions


def to_coco(root: Path, *splits: DetectionDataset) -> list[Conversion]:
    """Write ROOT/annotations/instances_SPLIT.json for each split. Nothing is overwritten.

    Category ids are those of the source, or the class numbers; areas are the boxes' where the
    source has none.
    """
    files = [root / "annotations" / f"instances_{data.census.split}.json" for data in splits]
    _refuse_existing(*files)
    conversions = []
    for dataset, file in zip(splits, files, strict=True):
        file.parent.mkdir(exist_ok=True)
        _write(file, json.dumps(coco_document(dataset)))
        conversions.append(Conversion(
            dataset.census.split, file, len(dataset), len(dataset.boxes),
            dataset.census.boxes_dropped,
        ))
    return conversions


def coco_document(dataset: DetectionDataset) -> dict:
    """The data set as COCO annotations: boxes in pixels, x and y of the upper left corner."""
    images, annotations = [], []
    for index, path in enumerate(dataset.paths):
        width, height = dataset.sizes[index].tolist()
        image_id = int(dataset.image_ids[index])
        images.append({"id": image_id, "file_name": path, "width": width, "height": height})
        for box, label, is_crowd, area in zip(
            *(column.tolist() for column in dataset.annotations(index)), strict=True
        ):
            x, y, w, h = box
            annotations.append({
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": dataset.category_ids[label],
                "bbox": [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height],
                "area": area,
                "iscrowd": int(is_crowd),
            })
    categories = [
        {"id": number, "name": name}
        for number, name in zip(dataset.category_ids, dataset.class_names, strict=True)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def _refuse_existing(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise BadInput(f"{path}: is there already; move it away first")


def _refuse_shared_stems(dataset: DetectionDataset) -> None:
    picture_of: dict[Path, str] = {}
    for path in dataset.paths:
        other = picture_of.setdefault(Path(path).with_suffix(""), path)
        if other != path:
            raise BadInput(
                f"{dataset.root}: {other} and {path} would share one label file; rename one"
            )


def _relative(folder: Path, root: Path) -> str:
    return Path(os.path.relpath(folder.resolve(), root.resolve())).as_posix()


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, "utf-8")
    temporary.rename(file)
