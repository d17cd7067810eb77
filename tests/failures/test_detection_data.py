"""Rows of bad detection data, each put into sound scenes: named, counted, with file names."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lib.datasets import coco, yolo_txt
from lib.errors import BadInput
from lib.loops.schedule import Plan
from lib.params import ROOT, Data
from lib.params import load as load_params
from lib.preflight.audit import census_checks, picture_checks
from lib.preflight.contracts import accepts_sizes
from lib.tasks import build_task


@pytest.fixture
def data(scenes: Path, tmp_path: Path) -> Path:
    """Scenes of one's own, to be damaged."""
    return Path(shutil.copytree(scenes, tmp_path / "scenes"))


@pytest.fixture
def edit(data: Path) -> Callable:
    """`edit(lambda document: ...)` changes the annotations of a split in place."""

    def change(edit_document: Callable[[dict], None], split: str = "train") -> None:
        file = data / "annotations" / f"instances_{split}.json"
        document = json.loads(file.read_text())
        edit_document(document)
        file.write_text(json.dumps(document))

    return change


def task_of(data: Path, **overrides):
    params = load_params(ROOT / "params/demo_rtdetr.yaml", {
        "data.root": str(data), "data.train": "train", "data.val": "val", "data.num_workers": 0,
        "data.image_size": 64, **overrides,
    })
    return build_task(params, torch.device("cpu"))


def checks_of(data: Path) -> dict:
    task = task_of(data)
    checks = census_checks(task.census()) + picture_checks(task, lambda done, total: None)
    return {check.id: check for check in checks}


def test_sound_scenes_raise_no_finding(data: Path):
    failed = [check for check in checks_of(data).values() if not check.passed]
    assert not failed, failed


def test_d2_a_class_out_of_range_names_file_and_line(data: Path):
    label = next(path for path in sorted((data / "labels" / "train").glob("*.txt"))
                 if path.read_text().strip())
    lines = label.read_text().splitlines()
    label.write_text("\n".join(["10 " + lines[0].split(maxsplit=1)[1], *lines[1:]]))
    with pytest.raises(BadInput, match=rf"{label.name}:1: class 10 lies outside the 10 classes"):
        yolo_txt.open_splits(Data(root=str(data)), 3)


def test_d3_gapped_ids_are_mapped_and_an_unmapped_one_is_an_error(data: Path, edit):
    gapped = {digit + 1: 10 * digit + 7 for digit in range(10)}

    def renumber(document: dict) -> None:
        for category in document["categories"]:
            category["id"] = gapped[category["id"]]
        for annotation in document["annotations"]:
            annotation["category_id"] = gapped[annotation["category_id"]]

    before = coco.open_splits(Data(root=str(data)), 3)[0].labels
    for split in ("train", "val"):
        edit(renumber, split)
    train, _ = coco.open_splits(Data(root=str(data)), 3)
    assert train.category_ids == tuple(gapped.values()) and (train.labels == before).all()
    assert "97 9 -> 9" in checks_of(data)["mapping"].value

    edit(lambda document: document["annotations"][0].update(category_id=8))
    with pytest.raises(BadInput, match="category_id"):
        coco.open_splits(Data(root=str(data)), 3)


def test_d4_other_categories_in_validation_are_an_error(data: Path, edit):
    def rotate(document: dict) -> None:
        names = [category["name"] for category in document["categories"]]
        for category, name in zip(document["categories"], names[1:] + names[:1], strict=True):
            category["name"] = name

    edit(rotate, "val")
    with pytest.raises(BadInput, match=r"categor"):
        coco.open_splits(Data(root=str(data)), 3)


def test_d5_a_training_picture_in_validation_is_named(data: Path):
    source, target = data / "train" / "scene_0001.jpg", data / "val" / "scene_0001.jpg"
    shutil.copy(source, target)
    document = json.loads((data / "annotations/instances_val.json").read_text())
    trained = json.loads((data / "annotations/instances_train.json").read_text())
    size = next(image for image in trained["images"] if image["file_name"] == source.name)
    here = next(image for image in document["images"] if image["file_name"] == target.name)
    here.update(width=size["width"], height=size["height"])
    (data / "annotations/instances_val.json").write_text(json.dumps(document))
    check = checks_of(data)["shared"]
    assert not check.passed and check.severity == "error"  # 1 of 20 is above 1 %
    assert "1 of 20" in check.value and "scene_0001.jpg" in check.advice


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"<!DOCTYPE html><p>404"],
    ids=["truncated", "html"],
)
def test_d6_a_picture_that_cannot_be_read_is_named_before_training(data: Path, damage):
    file = data / "train" / "scene_0004.jpg"
    file.write_bytes(damage(file.read_bytes()))
    check = checks_of(data)["readable"]
    assert not check.passed and check.severity == "error" and check.value == 1
    assert "scene_0004.jpg" in check.advice


def test_d7_faulty_boxes_are_counted_by_reason_with_their_files(data: Path, edit):
    def spoil(document: dict) -> None:
        names = {image["id"]: image["file_name"] for image in document["images"]}
        plain = [a for a in document["annotations"] if not a["iscrowd"]]
        spoil.files = [names[a["image_id"]] for a in plain[:4]]
        plain[0]["bbox"] = [5, 5, 0, 10]
        plain[1]["bbox"] = [5, 5, 10, -3]
        plain[2]["bbox"] = [500, 500, 10, 10]
        plain[3]["bbox"] = [float("nan"), 5, 10, 10]

    edit(spoil)
    checks = checks_of(data)
    check = checks["boxes_dropped_train"]
    assert not check.passed and check.value.startswith("4 of ")
    for reason in ("2 box of zero or negative size", "1 box outside the picture",
                   "1 box not made of four finite numbers"):
        assert reason in check.value
    assert all(file in check.advice for file in spoil.files)
    task = task_of(data, **{"train.batch_size": 4})  # and an epoch goes through
    for batch in task.train_batches(list(Plan(task.params, task.num_train).requests())[:6]):
        assert torch.isfinite(batch["boxes"]).all()


def test_d8_pictures_without_boxes_stay_and_are_counted(data: Path, edit):
    def empty(document: dict) -> None:
        gone = document["images"][0]["id"]
        document["annotations"] = [a for a in document["annotations"] if a["image_id"] != gone]

    before = coco.open_splits(Data(root=str(data)), 3)[0].census
    edit(empty)
    train, _ = coco.open_splits(Data(root=str(data)), 3)
    assert train.census.used == before.used == len(train)
    assert train.census.negatives == before.negatives + 1
    assert f"{before.negatives + 1} images without" in checks_of(data)["boxes_train"].value


def test_d12_the_shape_the_network_gets_is_the_one_that_was_asked_for(data: Path):
    params = load_params(ROOT / "params/demo_yolo.yaml", {"data.image_size": [101, 180]})
    shown = accepts_sizes(params, 10)
    assert "101 x 180 (padded to 128 x 192)" in shown.value
    task = task_of(data, **{"data.image_size": [96, 160], "train.batch_size": 4})
    batch = next(task.train_batches(Plan(task.params, task.num_train).requests()))
    assert task.to_device(batch)["images"].shape == (4, 3, 96, 160)
