"""The data audit: every picture is read, shared ones are found, what was left out is named."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib.datasets import coco, folder
from lib.params import Data
from lib.preflight.audit import census_checks, picture_checks
from lib.tasks import build_task

CPU = torch.device("cpu")
NUM_TRAIN, NUM_VAL = 12, 6
FORMATS = {"folder": folder.open_splits, "coco": coco.open_splits}


@dataclass
class Opened:
    """A task as far as the audit of its pictures goes."""

    train_data: object
    val_data: object

    def checks(self) -> dict:
        return {check.id: check for check in picture_checks(self, lambda done, total: None)}


def picture(seed: int, side: int = 48) -> Image.Image:
    low = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(low).resize((side + 16, side), Image.Resampling.BICUBIC)


@pytest.fixture(params=FORMATS)
def data(request, tmp_path):
    """Pictures of both splits in `tmp_path/SPLIT/a`, as class folders or with boxes.

    `data()` opens them and gives the splits with `checks()`.
    """
    for split, first, count in (("train", 0, NUM_TRAIN), ("val", 100, NUM_VAL)):
        (tmp_path / split / "a").mkdir(parents=True)
        for i in range(count):
            picture(first + i).save(tmp_path / split / "a" / f"{i:02d}.jpg", quality=90)

    def make() -> Opened:
        if request.param == "coco":
            describe(tmp_path)
        return Opened(*FORMATS[request.param](Data(root=str(tmp_path)), 3))

    return make


def describe(root: Path) -> None:
    """COCO annotations of the pictures that are there, a box each."""
    (root / "annotations").mkdir(exist_ok=True)
    for split in ("train", "val"):
        images = [{"id": i, "file_name": f"a/{path.name}", "width": 64, "height": 48}
                  for i, path in enumerate(sorted((root / split / "a").iterdir()))]
        write(root, split, images, [box(image["id"], [5, 5, 20, 10]) for image in images])


def box(image: int, bbox: list, category: int = 1, **extra) -> dict:
    return {"image_id": image, "category_id": category, "bbox": bbox} | extra


def write(root: Path, split: str, images: list, annotations: list, classes=("a",)) -> None:
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps({
        "images": images, "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
    }))


# -- can every picture be read? -----------------------------------------------------------------


def test_sound_pictures_pass_and_are_counted_as_they_are_read(data):
    opened, seen = data(), []
    checks = picture_checks(opened, lambda done, total: seen.append((done, total)))
    assert [(check.id, check.passed) for check in checks] == [("readable", True), ("shared", True)]
    assert seen == [(i, NUM_TRAIN + NUM_VAL) for i in range(1, NUM_TRAIN + NUM_VAL + 1)]
    assert checks[0].value == 0 and "of 18 read" in checks[0].title
    assert checks[1].value == f"0 of {NUM_VAL}"


@pytest.mark.parametrize("source", ["tiny_params", "tiny_detect"])
def test_the_demo_data_of_both_tasks_is_clean(tmp_path, request, source):
    params = request.getfixturevalue(source)(tmp_path)
    checks = picture_checks(build_task(params, CPU), lambda done, total: None)
    assert all(check.passed for check in checks)


PAGE = b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n" * 20


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("damage", [
    "cut in half", "last tenth missing", "zero bytes", "error page", "noise in the middle",
])
def test_d10_a_file_that_is_no_picture_is_named(data, tmp_path, split, damage):
    """Found before the run, not by the loader after hours. Damaged after the census was taken,
    which leaves empty files out."""
    opened = data()
    bad = tmp_path / split / "a" / "03.jpg"
    content = bad.read_bytes()
    middle = len(content) // 2
    bad.write_bytes({
        "cut in half": content[:middle],
        "last tenth missing": content[: len(content) * 9 // 10],
        "zero bytes": b"",
        "error page": PAGE,
        "noise in the middle": b"\xff\xd8" + np.random.default_rng(0).bytes(len(content)),
    }[damage])
    check = opened.checks()["readable"]
    assert not check.passed and check.severity == "error" and check.value == 1
    assert str(bad) in check.advice and "03.jpg" in check.advice
    assert opened.checks()["shared"].passed  # those that cannot be read are like nothing


def test_d10_of_many_bad_files_the_first_are_named_and_all_counted(data, tmp_path):
    opened = data()
    for i in range(8):
        (tmp_path / "train" / "a" / f"{i:02d}.jpg").write_bytes(PAGE)
    check = opened.checks()["readable"]
    assert check.value == 8 and check.advice.count("cannot be decoded") == 5
    assert "04.jpg" in check.advice and "05.jpg" not in check.advice


def test_d10_what_the_census_already_sees_is_counted_there(data, tmp_path):
    """An empty file of the listing is left out by name of its reason; a page with a JPEG's name
    looks like a picture until it is read."""
    (tmp_path / "train" / "a" / "03.jpg").write_bytes(b"")
    (tmp_path / "val" / "a" / "02.jpg").write_bytes(PAGE)
    opened = data()
    assert len(opened.train_data) == NUM_TRAIN - 1
    assert sum(opened.train_data.census.dropped.values()) == 1
    check = opened.checks()["readable"]
    assert check.value == 1 and str(tmp_path / "val" / "a" / "02.jpg") in check.advice


def test_a_picture_of_another_size_than_annotated_is_named(tmp_path):
    """Its boxes would lie elsewhere."""
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        picture(ord(split[0])).save(tmp_path / split / "a" / "00.jpg")
    describe(tmp_path)
    opened = Opened(*coco.open_splits(Data(root=str(tmp_path)), 3))
    picture(7, side=40).save(tmp_path / "val" / "a" / "00.jpg")
    check = opened.checks()["readable"]
    assert not check.passed and "56 x 40 pixels, the annotations say 64 x 48" in check.advice


# -- pictures in both splits --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["the same file", "other metadata", "another name"])
def test_a_validation_picture_that_training_has_too_is_named(data, tmp_path, how):
    source = tmp_path / "train" / "a" / "05.jpg"
    target = tmp_path / "val" / "a" / ("99.jpg" if how == "another name" else "02.jpg")
    shutil.copy(source, target)
    if how == "other metadata":
        with_metadata(source, target)
        assert source.read_bytes() != target.read_bytes()
    check = data().checks()["shared"]
    assert not check.passed and check.severity == "error"  # 1 of 6 is more than 1 %
    assert check.value == f"1 of {NUM_VAL + (how == 'another name')}"
    (pair,) = re.findall(r"(\S+\.jpg) is (\S+\.jpg)", check.advice)
    assert [Path(name).name for name in pair] == [target.name, source.name]


def with_metadata(source: Path, target: Path) -> None:
    """The same compressed pixels, with an EXIF block that the source does not have."""
    exif = Image.Exif()
    exif[0x010E] = "a copy"  # ImageDescription
    block = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    segment = b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block
    content = source.read_bytes()
    target.write_bytes(content[:2] + segment + content[2:])
    with Image.open(target) as copy:
        assert copy.getexif()[0x010E] == "a copy"


def test_few_shared_pictures_are_noted_and_more_fail(tmp_path):
    """Up to 1 % of validation is a warning."""
    for split, first, count in (("train", 0, 4), ("val", 10, 198)):
        (tmp_path / split / "a").mkdir(parents=True)
        for i in range(count):
            picture(first + i, side=16).save(tmp_path / split / "a" / f"{i:03d}.png")
    severities = []
    for i in range(3):
        shutil.copy(tmp_path / "train" / "a" / f"{i:03d}.png", tmp_path / "val" / "a" / f"x{i}.png")
        check = Opened(*folder.open_splits(Data(root=str(tmp_path)), 3)).checks()["shared"]
        assert not check.passed and check.value == f"{i + 1} of {199 + i}"
        severities.append(check.severity)
    assert severities == ["warning", "warning", "error"]


def test_pictures_that_are_merely_alike_are_not_called_the_same(data, tmp_path):
    """A neighbouring frame: the same scene, a few pixels on."""
    train = Image.open(tmp_path / "train" / "a" / "05.jpg")
    moved = Image.fromarray(np.roll(np.asarray(train), 2, axis=1))
    moved.save(tmp_path / "val" / "a" / "02.jpg", quality=95)
    assert data().checks()["shared"].passed


# -- the census of boxes ------------------------------------------------------------------------


@pytest.fixture
def census(tmp_path):
    """`census(train annotations)`: checks of four training pictures of classes a and b."""

    def make(annotations: list[dict]) -> dict:
        images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 20} for i in range(4)]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        for split, boxes in (("train", annotations), ("val", [SOUND[0], SOUND[1]])):
            (tmp_path / split).mkdir(exist_ok=True)
            for i in range(4):
                Image.new("RGB", (40, 20), (i, 0, 0)).save(tmp_path / split / f"{i}.png")
            write(tmp_path, split, images, boxes, ("a", "b"))
        train, val = coco.open_splits(Data(root=str(tmp_path)), 3)
        return {check.id: check for check in census_checks([vars(train.census), vars(val.census)])}

    return make


SOUND = [box(0, [0, 0, 9, 9]), box(1, [1, 1, 30, 15], 2), box(2, [0, 0, 40, 20])]


def test_clean_boxes_pass_every_check(census):
    found = census(SOUND)
    assert all(check.passed for check in found.values())
    assert set(found) == {"boxes_dropped_train", "boxes_train", "boxes_dropped_val", "boxes_val",
                          "mapping", "dropped_train", "dropped_val", "balance"}
    assert found["boxes_dropped_train"].value == "0 of 3"
    assert found["boxes_train"].value == (
        "3 in 3 images, up to 1 in one; 1 images without, 0 crowd regions (judged around, never "
        "learnt)")
    assert found["boxes_val"].value.startswith("2 in 2 images")


def test_the_mapping_of_categories_is_shown(census):
    check = census(SOUND)["mapping"]
    assert check.value == "1 a -> 0, 2 b -> 1" and check.severity == "info"


def test_d7_dropped_boxes_are_counted_with_reason_and_file(census):
    found = census([*SOUND, box(1, [5, 5, 0, 4]), box(2, [5, 5, 0, 4]), box(2, [90, 5, 4, 4])])
    check = found["boxes_dropped_train"]
    assert not check.passed and check.severity == "warning"
    assert check.value == ("3 of 6 (2 box of zero or negative size, 1 box outside the picture)")
    assert "Such as 1.png, 2.png" in check.advice
    assert found["boxes_dropped_val"].passed


def test_d7_clipped_boxes_are_counted_and_named(census):
    found = census([*SOUND, box(3, [30, 10, 40, 20])])
    check = found["clipped_train"]
    assert not check.passed and check.severity == "warning"
    assert check.value == "1, cut at its edge" and "Such as 3.png." in check.advice
    assert "clipped_val" not in found and found["boxes_dropped_train"].passed


def test_d7_pictures_that_lost_all_their_boxes_are_named(census):
    found = census([*SOUND, box(3, [5, 5, 0, 4])])
    check = found["emptied_train"]
    assert not check.passed and check.value == 1 and "Such as 3.png." in check.advice
    assert check.severity == "warning" and "emptied_val" not in found


def test_crowds_are_counted_apart(census):
    found = census([*SOUND, box(2, [0, 0, 40, 20], iscrowd=1)])
    assert "3 in 3 images" in found["boxes_train"].value
    assert "1 crowd regions" in found["boxes_train"].value
    assert all(check.passed for check in found.values())


def test_a_class_without_an_example_is_named_and_leaves_the_balance_alone(census):
    found = census([box(0, [0, 0, 9, 9]), box(1, [0, 0, 9, 9])])
    check = found["absent_classes"]
    assert not check.passed and check.severity == "warning" and check.value == "1: b"
    assert found["balance"].passed and "'b'" not in found["balance"].value


def test_pictures_left_out_of_a_box_split_are_named(census, tmp_path):
    census(SOUND)
    (tmp_path / "train" / "3.png").unlink()
    train, val = coco.open_splits(Data(root=str(tmp_path)), 3)
    found = {c.id: c for c in census_checks([vars(train.census), vars(val.census)])}
    check = found["dropped_train"]
    assert not check.passed and check.value == "1 of 4 (1 missing image file)"
    assert "Such as 3.png." in check.advice


def test_a_detector_of_one_class_is_no_failure(tmp_path, tiny_detect):
    """It has the background to tell apart; a classifier of one class has nothing."""
    task = build_task(tiny_detect(tmp_path, data__single_class=True), CPU)
    found = {check.id: check for check in census_checks(task.census())}
    assert "num_classes" not in found and all(check.passed for check in found.values())
