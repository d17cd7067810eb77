"""COCO JSON to YOLO text and back: the same boxes, and a census of what cannot be said."""

import json

import numpy as np
import pytest
from PIL import Image

from lib.datasets import coco, convert, yolo_txt
from lib.errors import BadInput
from lib.params import Data


@pytest.fixture
def data(tmp_path):
    """Twenty pictures of odd sizes with random boxes; one is a crowd, one is empty, one faulty."""
    rng = np.random.default_rng(0)
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / split / "sub").mkdir(parents=True)
        images, annotations = [], []
        for i in range(10):
            width, height = rng.integers(30, 700, 2).tolist()
            name = f"sub/{i}.jpg" if i % 2 else f"{i}.jpg"
            Image.new("L", (width, height)).save(tmp_path / split / name)
            images.append({"id": 50 - i, "file_name": name, "width": width, "height": height})
            for _ in range(i):
                w, h = rng.uniform(1, width), rng.uniform(1, height)
                annotations.append({
                    "id": len(annotations), "image_id": 50 - i, "area": 3.25, "iscrowd": 0,
                    "category_id": int(rng.choice((3, 11, 90))),
                    "bbox": [rng.uniform(0, width - w), rng.uniform(0, height - h), w, h],
                })
        annotations[5]["iscrowd"] = 1
        annotations[7]["bbox"][2] = 0
        categories = [{"id": k, "name": f"kind {k}"} for k in (11, 90, 3)]
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(
            {"images": images, "annotations": annotations, "categories": categories}
        ))
    return Data(root=str(tmp_path))


def test_round_trip(data, tmp_path):
    original = coco.open_splits(data, 3)
    there = convert.to_yolo(tmp_path, *original)
    as_yolo = yolo_txt.open_splits(data, 3)
    (tmp_path / "annotations").rename(tmp_path / "original")
    back = convert.to_coco(tmp_path, *as_yolo)
    again = coco.open_splits(data, 3)
    for conversion in there:
        assert conversion.images == 10 and conversion.boxes == 43
        assert conversion.left_out == {"crowd region": 1, "box of zero or negative size": 1}
    for conversion in back:
        assert conversion.images == 10 and conversion.boxes == 43 and conversion.left_out == {}
    for first, second, third in zip(original, as_yolo, again, strict=True):
        assert first.class_names == second.class_names == third.class_names
        assert first.class_names == ("kind 3", "kind 11", "kind 90")
        assert first.paths == second.paths == third.paths
        np.testing.assert_array_equal(first.sizes, third.sizes)
        for i in range(len(first)):
            boxes, labels = first.targets(i)
            for other in (second, third):
                np.testing.assert_allclose(other.targets(i)[0], boxes, rtol=0, atol=1e-6)
                np.testing.assert_array_equal(other.targets(i)[1], labels)
        assert third.census.negatives == second.census.negatives == 1


def test_coco_to_coco_keeps_crowds_ids_and_areas(data, tmp_path):
    original, _ = coco.open_splits(data, 3)
    document = convert.coco_document(original)
    assert sum(row["iscrowd"] for row in document["annotations"]) == 1
    assert {row["category_id"] for row in document["annotations"]} == {3, 11, 90}
    assert {row["area"] for row in document["annotations"]} == {3.25}
    assert sorted(row["id"] for row in document["images"]) == list(range(41, 51))


def test_nothing_is_overwritten(data, tmp_path):
    splits = coco.open_splits(data, 3)
    convert.to_yolo(tmp_path, *splits)
    with pytest.raises(BadInput, match="data.yaml: is there already"):
        convert.to_yolo(tmp_path, *splits)
    with pytest.raises(BadInput, match="instances_train.json: is there already"):
        convert.to_coco(tmp_path, *splits)


def test_two_pictures_of_one_name_cannot_share_a_label_file(data, tmp_path):
    file = tmp_path / "annotations" / "instances_train.json"
    document = json.loads(file.read_text())
    Image.new("L", (9, 9)).save(tmp_path / "train" / "0.png")
    document["images"].append({"id": 1, "file_name": "0.png", "width": 9, "height": 9})
    file.write_text(json.dumps(document))
    with pytest.raises(BadInput, match="0.jpg and 0.png would share one label file"):
        convert.to_yolo(tmp_path, *coco.open_splits(data, 3))
    assert not (tmp_path / "labels").exists()
