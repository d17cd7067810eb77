"""YOLO text in every usual layout, and every fault in it named (D1, D2, D6, D7, D8, D10)."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.datasets import coco, detection, yolo_txt
from lib.errors import BadInput
from lib.params import Data

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco128"
GOOD = "1 0.5 0.5 0.5 0.25\n"
YAML = "train: images/train\nval: images/val\nnames: [cat, dog]\n"


def write(root: Path, pictures: str, labels: str, texts: list[str | None]) -> None:
    """Pictures of 40 x 20 pixels, their label files beside; None: no label file."""
    (root / pictures).mkdir(parents=True, exist_ok=True)
    (root / labels).mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        Image.new("RGB", (40, 20)).save(root / pictures / f"{i}.jpg")
        if text is not None:
            (root / labels / f"{i}.txt").write_text(text)


@pytest.fixture
def opened(tmp_path):
    """`opened([texts of the training labels])` -> both splits."""

    def make(texts, description=YAML):
        write(tmp_path, "images/train", "labels/train", texts)
        write(tmp_path, "images/val", "labels/val", [GOOD])
        if description:
            (tmp_path / "data.yaml").write_text(description)
        return yolo_txt.open_splits(Data(root=str(tmp_path)), 3)

    return make


def test_boxes_labels_and_negatives(opened):
    train, _ = opened([GOOD + "0 .25 .25 .5 .5\n", None, "", "\n  \n"])
    assert train.class_names == ("cat", "dog")
    np.testing.assert_allclose(
        train.annotations(0).boxes, [[0.5, 0.5, 0.5, 0.25], [0.25, 0.25, 0.5, 0.5]]
    )
    assert train.labels.tolist() == [1, 0]
    assert train.areas.tolist() == [100.0, 200.0]  # of 40 x 20 pixels
    assert train.census.negatives == 3 and len(train) == 4  # D8: background stays
    assert train.census.dropped == {} and train.sizes[0].tolist() == [40, 20]


@pytest.mark.parametrize("pictures, labels, description", [
    ("images/{}", "labels/{}", "names: {0: cat, 1: dog}"),
    ("{}/images", "{}/labels", "train: ../train/images\nval: ../val/images\nnames: [cat, dog]"),
    ("{}", "labels/{}", "train: train\nval: val\nnc: 2\nnames: [cat, dog]"),
    ("deep/images/{}", "deep/labels/{}",
     "path: deep\ntrain: images/train\nval: [images/val]\nnames: [cat, dog]"),
    ("{}", "{}", "names: [cat, dog]"),
])
def test_layouts(tmp_path, pictures, labels, description):
    for split in ("train", "val"):
        write(tmp_path, pictures.format(split), labels.format(split), [GOOD, None])
    (tmp_path / "data.yaml").write_text(description)
    train, val = yolo_txt.open_splits(Data(root=str(tmp_path)), 3)
    assert train.labels.tolist() == val.labels.tolist() == [1] and len(train) == 2
    assert train.census.dropped == {}


def test_lists_of_pictures(tmp_path):
    write(tmp_path, "images/all", "labels/all", [GOOD, GOOD, None])
    (tmp_path / "train.txt").write_text("./images/all/0.jpg\n./images/all/gone.jpg\n")
    (tmp_path / "val.txt").write_text("images/all/1.jpg\nimages/all/2.jpg\n")
    (tmp_path / "data.yaml").write_text("train: train.txt\nval: val.txt\nnames: [cat, dog]")
    train, val = yolo_txt.open_splits(Data(root=str(tmp_path)), 3)
    assert train.paths == ["0.jpg"] and val.paths == ["1.jpg", "2.jpg"]
    assert train.census.dropped == {"missing image file": 1}


def test_without_names_the_classes_are_numbered_by_training(opened, tmp_path):
    train, _ = opened(["2 .5 .5 .5 .5"], description=None)
    assert train.class_names == ("0", "1", "2")
    (tmp_path / "classes.txt").write_text("cat\ndog\nhorse\n")
    assert opened(["2 .5 .5 .5 .5"], description=None)[0].class_names[2] == "horse"


@pytest.mark.parametrize("line, reason", [
    ("0 .5 .5 .5", "label line without exactly five numbers"),
    ("0 .5 .5 .5 .5 .9", "label line without exactly five numbers"),
    ("0 .1 .1 .9 .1 .9 .9", "label line with a polygon instead of a box"),
    ("cat .5 .5 .5 .5", "label line with a word that is no number"),
    ("0.5 .5 .5 .5 .5", "label line whose class is no whole number"),
    ("0 .5 .5 1.5 .5", "box with a value outside [0, 1]"),
    ("0 -.5 .5 .5 .5", "box with a value outside [0, 1]"),
    ("0 .5 .5 0 .5", "box of zero or negative size"),
    ("0 .5 .5 nan .5", "box not made of four finite numbers"),
])
def test_d7_faulty_lines_are_counted_and_named(opened, tmp_path, line, reason):
    train, _ = opened([GOOD + line + "\n" + GOOD, line])
    assert train.census.boxes_dropped == {reason: 2}
    assert train.census.boxes_used == 2 and train.census.boxes_listed == 4
    assert train.census.examples[reason] == tuple(
        f"{tmp_path}/labels/train/{place}" for place in ("0.txt:2", "1.txt:1")
    )
    assert train.census.emptied == 1  # the second picture would now pass for background
    assert train.census.examples["all boxes dropped"] == ("1.jpg",)


def test_d1_a_file_in_pixels_is_refused(opened):
    with pytest.raises(BadInput, match=r"0.txt: the boxes are in pixels.*shares.*2 such files"):
        opened(["0 20 10 8 4\n1 30 9 8 4\n1 2\n", "1 20 10 8 4\n", GOOD])
    train, _ = opened(["0 20 10 8 4\n" + GOOD, GOOD, GOOD])  # one line of a good file: a slip
    assert train.census.boxes_dropped == {"box with a value outside [0, 1]": 1}


def test_d2_a_class_out_of_range_is_refused(opened):
    with pytest.raises(
        BadInput, match=r"1.txt:2: class 2 lies outside the 2 classes of .*data.yaml, 0 to 1;"
    ):
        opened([GOOD, GOOD + "2 .5 .5 .5 .5\n0 .5 .5 .5 .5\n"])
    with pytest.raises(BadInput, match="do they count from 1"):
        opened([GOOD, GOOD + "2 .5 .5 .5 .5\n"])
    with pytest.raises(BadInput, match="class -1 lies outside"):
        opened([GOOD, "-1 .5 .5 .5 .5\n"])


def test_d8_no_label_folder_is_not_all_background(tmp_path):
    for split in ("train", "val"):
        write(tmp_path, f"images/{split}", f"elsewhere/{split}", [GOOD])
    (tmp_path / "data.yaml").write_text(YAML)
    with pytest.raises(BadInput, match=r"no labels for these pictures; they belong in .*labels"):
        yolo_txt.open_splits(Data(root=str(tmp_path)), 3)


def test_d6_d10_files_left_out_are_counted(opened, tmp_path):
    opened([GOOD] * 4)
    pictures = tmp_path / "images" / "train"
    (pictures / "0.jpg").unlink()  # its label stays behind
    (pictures / "1.jpg").write_bytes(b"")
    (pictures / "2.jpg").write_bytes(b"<html>404</html>")
    census = opened([])[0].census
    assert census.dropped == {
        "label file without a picture": 1, "empty image file": 1,
        "not a picture that can be opened": 1,
    }
    assert census.examples["not a picture that can be opened"] == ("2.jpg",)
    assert census.used == 1 and census.listed == 4


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_sizes_are_those_of_the_upright_picture_and_need_the_header_only(tmp_path, suffix):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / f"plain.{suffix}")
    picture.save(tmp_path / f"turned.{suffix}", exif=exif)
    for name in ("plain", "turned"):
        file = tmp_path / f"{name}.{suffix}"
        file.write_bytes(file.read_bytes()[:2000])  # the pixels are cut off
    paths = [tmp_path / f"{name}.{suffix}" for name in ("plain", "turned", "gone")]
    assert detection.read_sizes(paths) == [(70, 90), (90, 70), None]


@pytest.mark.parametrize("description, message", [
    ("train: images/nowhere\nval: images/val\nnames: [cat, dog]", "train: images/nowhere: no such"),
    ("train: images/train\nval: images/val", "has no `names`"),
    ("names: [cat, dog]\nnc: 3", "nc is 3, but there are 2 names"),
    ("names: {0: cat, 2: dog}", "must run from 0 to 1"),
    ("names: [cat, cat]", "class name 'cat' stands there twice"),
])
def test_faulty_yaml_is_named(opened, description, message):
    with pytest.raises(BadInput, match=message):
        opened([GOOD], description)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real COCO images are not here")
def test_real_labels_equal_the_coco_annotations():
    data = Data(root=str(REAL), train="train2017", val="val2017")
    for ours, theirs in zip(
        yolo_txt.open_splits(data, 3), coco.open_splits(data, 3), strict=True
    ):
        assert ours.paths == theirs.paths
        np.testing.assert_array_equal(ours.sizes, theirs.sizes)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        np.testing.assert_allclose(ours.boxes, theirs.boxes, rtol=0, atol=1e-6)
