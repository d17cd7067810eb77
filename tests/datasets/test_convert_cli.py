"""`shakedown convert`: the census of both sides, and one clear line for what cannot be done."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lib import cli
from lib.datasets import coco, yolo_txt
from lib.params import Data


def write_coco(root: Path) -> None:
    """Three pictures a split: two boxes and a crowd, one good and one faulty box, none."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        images = []
        for i in range(3):
            Image.new("RGB", (40, 20)).save(root / split / f"{i}.jpg")
            images.append({"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 20})
        rows = [(0, [1, 2, 10, 10], 0), (0, [5, 5, 20, 10], 0), (0, [0, 0, 40, 20], 1),
                (1, [3, 3, 7, 7], 0), (1, [3, 3, 0, 7], 0)]
        annotations = [
            {"id": k, "image_id": image, "category_id": 18, "bbox": bbox, "iscrowd": crowd}
            for k, (image, bbox, crowd) in enumerate(rows)
        ]
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps({
            "images": images, "annotations": annotations,
            "categories": [{"id": 18, "name": "dog"}],
        }))


def converted(root: Path, to: str, train: str = "train2017", val: str = "val2017") -> int:
    return cli.main(["convert", str(root), "--to", to, "--train", train, "--val", val])


def test_to_yolo_and_back_says_what_became_of_every_box(tmp_path, capsys):
    write_coco(tmp_path)
    assert converted(tmp_path, "yolo") == 0
    printed = capsys.readouterr().out
    assert "from train2017: 3 of 3 pictures used, 4 of 5 boxes (1 crowd regions)" in printed
    assert "1 box of zero or negative size, such as 1.jpg" in printed
    assert "to val2017: 3 of 3 pictures used, 3 of 3 boxes (0 crowd regions)" in printed
    assert f"wrote {tmp_path / 'labels' / 'train2017'}" in printed
    assert yaml.safe_load((tmp_path / "data.yaml").read_text())["names"] == {0: "dog"}

    (tmp_path / "annotations").rename(tmp_path / "before")
    assert converted(tmp_path, "coco") == 0
    printed = capsys.readouterr().out
    assert "from train2017: 3 of 3 pictures used, 3 of 3 boxes" in printed
    assert "to train2017: 3 of 3 pictures used, 3 of 3 boxes" in printed
    data = Data(root=str(tmp_path), train="train2017", val="val2017")
    for one, other in zip(coco.open_splits(data, 3), yolo_txt.open_splits(data, 3), strict=True):
        assert one.paths == other.paths
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-6)


def test_nothing_is_overwritten(tmp_path, capsys):
    write_coco(tmp_path)
    (tmp_path / "data.yaml").write_text("names: [mine]\n")
    assert converted(tmp_path, "yolo") == 2
    assert "data.yaml: is there already" in capsys.readouterr().err
    assert (tmp_path / "data.yaml").read_text() == "names: [mine]\n"
    assert not (tmp_path / "labels").exists()


def test_a_picture_only_the_folder_has_is_named(tmp_path, capsys):
    """COCO leaves it out, to YOLO it is background: the two sides differ, and that is said."""
    write_coco(tmp_path)
    Image.new("RGB", (40, 20)).save(tmp_path / "train2017" / "unlisted.jpg")
    assert converted(tmp_path, "yolo") == 2
    said = capsys.readouterr()
    assert "from train2017: 3 of 4 pictures used" in said.out
    assert "to train2017: 4 of 4 pictures used" in said.out
    assert "3 pictures and 3 boxes were written" in said.err and "4 and 3" in said.err


@pytest.mark.parametrize("to, expected", [("yolo", "no such file"), ("coco", "no such folder")])
def test_what_is_not_there_is_one_line(tmp_path, capsys, to, expected):
    assert converted(tmp_path / "nothing", to) == 2
    message = capsys.readouterr().err
    assert expected in message and "nothing" in message and message.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    write_coco(tmp_path)
    (tmp_path / "labels").write_text("a file in the way")
    assert converted(tmp_path, "yolo") == 2
    message = capsys.readouterr().err
    assert "cannot be written" in message and message.count("\n") == 1
