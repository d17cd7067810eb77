"""COCO JSON as the field lays it out, and every fault in it named (D2, D3, D4, D6, D7, D8, D10)."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.datasets import coco
from lib.errors import BadInput
from lib.params import Data

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco128"
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}]  # gapped, not in order


def box(image_id: int, bbox, category_id: int = 2, **more) -> dict:
    return {"id": 1, "image_id": image_id, "category_id": category_id, "bbox": bbox} | more


def write_split(
    root: Path, split: str, annotations: list[dict], num_images: int = 3, **changes
) -> None:
    """Pictures of 40 x 20 pixels and their JSON; `changes` replace its lists."""
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    images = []
    for i in range(num_images):
        Image.new("RGB", (40, 20), (i * 20, 0, 0)).save(root / split / f"{i}.jpg")
        images.append({"id": 100 + i, "file_name": f"{i}.jpg", "width": 40, "height": 20})
    document = {"images": images, "annotations": annotations, "categories": CATEGORIES} | changes
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


@pytest.fixture
def splits(tmp_path):
    """`splits(train annotations, ...)` opens them beside a clean validation split."""

    def make(annotations: list[dict], data: dict | None = None, **changes):
        write_split(tmp_path, "train", annotations, **changes)
        write_split(tmp_path, "val", [box(100, [10, 5, 20, 10])])
        return coco.open_splits(Data(root=str(tmp_path), **(data or {})), 3)

    return make


def test_boxes_are_normalized_and_ids_mapped(splits):
    train, val = splits([
        box(101, [10, 5, 20, 10], 7, area=123.5, segmentation=[[1.0, 2.5, 3], [-4e1, 5, 6]]),
        box(100, [0, 0, 40, 20], 2),
    ])
    assert train.class_names == ("dog", "cat") and train.category_ids == (2, 7)
    assert train.census.mapping == {"2 dog": "0", "7 cat": "1"}
    assert train.paths == ["0.jpg", "1.jpg", "2.jpg"]
    assert train.boxes.dtype == np.float32 and train.labels.dtype == np.int64
    np.testing.assert_array_equal(train.annotations(0).boxes, [[0.5, 0.5, 1, 1]])
    np.testing.assert_array_equal(train.annotations(1).boxes, [[0.5, 0.5, 0.5, 0.5]])
    assert train.labels.tolist() == [0, 1]
    assert train.areas.tolist() == [800.0, 123.5]  # without one: the box's
    assert train.image_ids.tolist() == [100, 101, 102]
    assert train.census.negatives == 1 and len(train.targets(2)[0]) == 0
    assert train.census.per_class == {"dog": 1, "cat": 1}
    assert train.census.dropped == {} == train.census.boxes_dropped
    assert train.pixels(train.open(2)).size == (40, 20)


def test_crowds_are_kept_apart(splits):
    train, _ = splits([box(100, [0, 0, 9, 9]), box(100, [0, 0, 40, 20], iscrowd=1)])
    assert train.annotations(0).is_crowd.tolist() == [False, True]
    assert len(train.targets(0)[0]) == 1
    assert train.census.crowd == 1 and train.census.boxes_used == 2
    assert train.census.per_class["dog"] == 1 and train.census.most_boxes == 1


@pytest.mark.parametrize("bbox, reason", [
    ([5, 5, 0, 10], "box of zero or negative size"),
    ([5, 5, 10, -1], "box of zero or negative size"),
    ([5, 5, float("nan"), 1], "box not made of four finite numbers"),
    ([5, 5, float("inf"), 1], "box not made of four finite numbers"),
    ([5, 5, 1], "box not made of four finite numbers"),
    (None, "box not made of four finite numbers"),
    ([5, "x", 1, 1], "box not made of four finite numbers"),
    ([50, 5, 10, 10], "box outside the picture"),
    ([-20, 5, 20, 10], "box outside the picture"),
])
def test_d7_faulty_boxes_are_counted_and_named(splits, bbox, reason):
    train, _ = splits([box(100, [1, 1, 5, 5]), box(101, bbox)])
    census = train.census
    assert census.boxes_dropped == {reason: 1} and census.boxes_used == 1
    assert census.boxes_listed == 2
    assert census.examples[reason] == ("1.jpg",)
    assert census.emptied == 1 and census.examples["all boxes dropped"] == ("1.jpg",)
    assert len(train) == 3  # the picture stays


def test_d7_a_box_over_the_edge_is_cut_and_counted(splits):
    train, _ = splits([box(100, [30, 10, 20, 20]), box(101, [0, 0, 40.1, 20])])
    np.testing.assert_allclose(train.annotations(0).boxes, [[0.875, 0.75, 0.25, 0.5]])
    assert train.boxes.max() <= 1 and train.census.boxes_clipped == 1  # 0.1 pixels is rounding
    assert train.census.examples["clipped at the edge"] == ("0.jpg",)


def test_d3_an_unknown_category_is_an_error(splits):
    message = r"1 of 2 annotations have a category_id.*\(2 to 7\): 3; .*1\.jpg"
    with pytest.raises(BadInput, match=message):
        splits([box(100, [1, 1, 5, 5]), box(101, [1, 1, 5, 5], 3)])


def test_an_unknown_image_is_an_error(splits):
    with pytest.raises(BadInput, match=r"image_id that is not in 'images'.*100 to 102.*: 999"):
        splits([box(100, [1, 1, 5, 5]), box(999, [1, 1, 5, 5])])


def test_d4_splits_with_other_categories(splits):
    shifted = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}]
    with pytest.raises(BadInput, match="id 2 is 'cat' in train and 'dog' in val; id 7"):
        splits([box(100, [1, 1, 5, 5])], categories=shifted)


def test_d10_missing_empty_and_unlisted_pictures(splits, tmp_path):
    splits([box(100, [1, 1, 5, 5])])
    (tmp_path / "train" / "0.jpg").unlink()
    (tmp_path / "train" / "1.jpg").write_bytes(b"")
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "more.jpg")
    file = tmp_path / "annotations" / "instances_train.json"
    document = json.loads(file.read_text())
    document["annotations"] += [box(102, [1, 1, 5, 5]), box(101, [1, 1, 5, 5])]
    file.write_text(json.dumps(document))
    census = coco.open_splits(Data(root=str(tmp_path)), 3)[0].census
    assert census.dropped == {
        "missing image file": 1, "empty image file": 1,
        "image file that the annotations do not list": 1,
    }
    assert census.listed == 4 and census.used == 1
    assert census.examples["missing image file"] == ("0.jpg",)
    assert census.boxes_dropped == {"box of a picture that is left out": 2}
    assert census.boxes_used == 1 and census.boxes_listed == 3


def test_no_picture_at_all_is_an_error(splits, tmp_path):
    splits([box(100, [1, 1, 5, 5])])
    for file in (tmp_path / "train").iterdir():
        file.unlink()
    with pytest.raises(BadInput, match="no picture to use.*3 missing image file: 0.jpg"):
        coco.open_splits(Data(root=str(tmp_path)), 3)


def test_a_split_without_boxes_is_an_error(splits):
    with pytest.raises(BadInput, match="3 pictures and no box to learn or judge by"):
        splits([])


def test_d1_normalized_boxes_in_coco_are_refused(splits):
    with pytest.raises(BadInput, match="COCO wants pixels"):
        splits([box(100, [0.1, 0.1, 0.5, 0.5])])


@pytest.mark.parametrize("changes, message", [
    ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "category id 1 stands"),
    ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}, "category name 'a' stands"),
    ({"images": [{"file_name": "0.jpg"}]}, "image number 1 has no good 'id'"),
    ({"images": None}, "has no list 'images'"),
])
def test_malformed_json_is_named(splits, changes, message):
    with pytest.raises(BadInput, match=message):
        splits([box(100, [1, 1, 5, 5])], **changes)


def test_truncated_json_is_named(splits, tmp_path):
    splits([box(100, [1, 1, 5, 5])])
    file = tmp_path / "annotations" / "instances_train.json"
    file.write_text(file.read_text()[:-5])
    with pytest.raises(BadInput, match="instances_train.json: cannot be read as JSON"):
        coco.open_splits(Data(root=str(tmp_path)), 3)


def test_missing_annotations_are_named(tmp_path):
    with pytest.raises(BadInput, match="instances_train.json: no such file"):
        coco.open_splits(Data(root=str(tmp_path)), 3)


def test_a_picture_of_another_size_is_refused_when_it_is_opened(splits, tmp_path):
    train, _ = splits([box(100, [1, 1, 5, 5])])
    assert train.bad_headers() == []
    Image.new("RGB", (20, 40)).save(tmp_path / "train" / "1.jpg")
    (tmp_path / "train" / "2.jpg").write_bytes(b"<html>not found</html>")
    with pytest.raises(BadInput, match="1.jpg: 20 x 40 pixels, the annotations say 40 x 20"):
        train.open(1)
    wrong_size, no_picture = train.bad_headers()
    assert "1.jpg" in wrong_size and "2.jpg: cannot be decoded" in no_picture


@pytest.mark.parametrize("stored, upright", [((20, 40), True), ((40, 20), False)])
def test_d6_the_annotated_size_says_which_way_up(splits, tmp_path, stored, upright):
    """Some annotate the picture as it is stored, others as a viewer shows it."""
    train, _ = splits([box(100, [1, 1, 5, 5])])
    picture = Image.new("RGB", stored)
    picture.paste((255, 255, 255), (0, 0, 8, 8))  # marks the stored upper left corner
    exif = picture.getexif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    picture.save(tmp_path / "train" / "1.jpg", exif=exif, quality=95)
    image = train.pixels(train.open(1))
    assert image.size == (40, 20)
    corner = (36, 3) if upright else (3, 3)
    assert image.getpixel(corner)[0] > 200 and image.getpixel((20, 15))[0] < 50


def test_chosen_classes_keep_the_pictures(splits):
    annotations = [box(100, [1, 1, 5, 5], 2), box(101, [1, 1, 5, 5], 7)]
    with pytest.raises(BadInput, match="data.classes: 'horse' is not among the 2 classes"):
        splits(annotations, {"classes": ("horse",)})
    train, _ = splits(annotations, {"classes": ("dog",)})
    assert train.class_names == ("dog",) and train.labels.tolist() == [0]
    assert train.census.boxes_dropped == {"class not in data.classes": 1}
    assert len(train) == 3


def test_single_class(splits):
    annotations = [box(100, [1, 1, 5, 5], 2), box(101, [1, 1, 5, 5], 7)]
    train, _ = splits(annotations, {"single_class": True})
    assert train.class_names == ("object",) and train.labels.tolist() == [0, 0]
    assert train.census.mapping == {"2 dog": "0", "7 cat": "0"}


def test_the_digest_follows_boxes_labels_and_files(splits, tmp_path):
    first = splits([box(100, [1, 1, 5, 5])])[0].census.digest
    assert splits([box(100, [1, 1, 5, 5])])[0].census.digest == first
    assert splits([box(100, [1, 1, 5, 6])])[0].census.digest != first
    assert splits([box(100, [1, 1, 5, 5], 7)])[0].census.digest != first


def test_expected_numbers_of_images(splits):
    with pytest.raises(BadInput, match="3 images, data.num_train_images says 118,287"):
        splits([box(100, [1, 1, 5, 5])], {"num_train_images": 118_287})


@pytest.mark.skipif(not REAL.is_dir(), reason="the real COCO images are not here")
def test_real_coco():
    data = Data(root=str(REAL), train="train2017", val="val2017")
    train, val = coco.open_splits(data, 3)
    assert len(train) == len(val) == 64 and len(train.class_names) == 80
    assert train.category_ids[-1] == 90 and train.census.mapping["90 toothbrush"] == "79"
    assert train.census.boxes_used == 542 and val.census.boxes_used == 440
    assert not train.census.dropped and not train.census.boxes_dropped
    assert train.census.negatives == 1
    assert train.bad_headers() == val.bad_headers() == []
    assert 0 < train.boxes[:, 2:].min() and train.boxes.max() <= 1
