"""The embedded scenes: the same in every process, what they promise, whole or not at all."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from lib.datasets import scenes, yolo_txt
from lib.params import Data

NUM_TRAIN, NUM_VAL = 40, 20


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    scenes.write_scenes(root, num_train=NUM_TRAIN, num_val=NUM_VAL)
    return root


def content(root) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in root.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def test_the_same_bytes_in_another_process(root, tmp_path):
    code = (
        "import sys; from pathlib import Path; from lib.datasets import scenes;"
        f"scenes.write_scenes(Path(sys.argv[1]), num_train={NUM_TRAIN}, num_val={NUM_VAL})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, timeout=120)
    assert content(tmp_path / "again") == content(root)


def test_what_is_in_them(root):
    train, val = scenes.open_splits(Data(root=str(root)), 3)
    assert len(train) == NUM_TRAIN and len(val) == NUM_VAL
    assert train.class_names == tuple("0123456789")
    assert train.census.negatives == 4 and train.census.crowd == 2
    assert train.census.most_boxes >= 12 and not train.census.boxes_dropped
    sides = train.boxes[:, 3] * train.sizes[np.repeat(np.arange(40), np.diff(train.offsets)), 1]
    assert 15 < sides.min() < 20 and 50 < sides.max() < 65  # pixels
    assert not train.bad_headers() and {tuple(size) for size in train.sizes.tolist()} <= {
        (128, 128), (160, 128), (192, 128)
    }


def test_opens_as_yolo_text_too(root):
    data = Data(root=str(root))
    for as_coco, as_yolo in zip(
        scenes.open_splits(data, 3), yolo_txt.open_splits(data, 3), strict=True
    ):
        assert as_yolo.class_names == as_coco.class_names
        assert as_yolo.paths == as_coco.paths
        for i in range(len(as_coco)):
            boxes, labels = as_coco.targets(i)
            np.testing.assert_allclose(as_yolo.targets(i)[0], boxes, rtol=0, atol=1e-6)
            np.testing.assert_array_equal(as_yolo.targets(i)[1], labels)


def test_a_box_holds_its_digit(root):
    """Ink stands out: a box varies far more than the same window does elsewhere, on average."""
    train, _ = scenes.open_splits(Data(root=str(root)), 3)
    rng = np.random.default_rng(0)
    inside, elsewhere = [], []
    for i in range(len(train)):
        pixels = np.asarray(train.pixels(train.open(i)), np.float64).mean(2)
        height, width = pixels.shape
        for cx, cy, w, h in train.targets(i)[0]:
            anywhere = rng.uniform(w / 2, 1 - w / 2), rng.uniform(h / 2, 1 - h / 2)
            for found, (x, y) in ((inside, (cx, cy)), (elsewhere, anywhere)):
                part = pixels[
                    round((y - h / 2) * height) : round((y + h / 2) * height),
                    round((x - w / 2) * width) : round((x + w / 2) * width),
                ]
                found.append(part.std() / pixels.std())
    assert np.mean(inside) > 1.5 * np.mean(elsewhere)


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    def fails(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes.convert, "to_yolo", fails)
    with pytest.raises(KeyboardInterrupt):
        scenes.write_scenes(tmp_path / "scenes", num_train=20, num_val=20)
    assert not list(tmp_path.iterdir())
