"""The embedded digits: real pictures, written once and whole."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from lib.datasets import demo
from lib.params import Data


def test_all_digits_are_there_a_fifth_of_each_in_validation(digits):
    train, val = demo.open_splits(Data(root=str(digits)), 3)
    assert len(train) + len(val) == 1797 == len(load_digits().target)
    assert train.class_names == tuple("0123456789")
    for name in train.class_names:
        there = train.census.per_class[name] + val.census.per_class[name]
        assert there == (load_digits().target == int(name)).sum()
        assert val.census.per_class[name] == there // 5
    assert not train.census.dropped and not val.census.dropped


def test_a_file_shows_the_scan_it_was_made_from(digits):
    """Each class's first file, shrunk to 8 x 8 again, is nearest to that class's first scan."""
    scans = load_digits()
    for label in range(10):
        picture = Image.open(digits / "train" / str(label) / f"digit_{label}_001.jpg")
        assert picture.size == (demo.SIDE, demo.SIDE)
        small = np.asarray(picture.resize((8, 8), Image.Resampling.BOX), float) / 255 * 16
        distances = np.abs(scans.images - small).mean((1, 2))
        assert scans.target[distances.argmin()] == label
        assert distances.argmin() == np.flatnonzero(scans.target == label)[0]


def test_no_picture_is_in_both_splits(digits):
    names = [{path.name for path in (digits / split).rglob("*.jpg")} for split in ("train", "val")]
    assert len(names[0]) == 1442 and len(names[1]) == 355 and not names[0] & names[1]


def test_digits_are_written_once(tmp_path):
    data = Data(root=str(tmp_path / "digits"), num_train_images=1442)
    demo.open_splits(data, 1)
    dates = {path: path.stat().st_mtime_ns for path in (tmp_path / "digits").rglob("*.jpg")}
    demo.open_splits(data, 1)
    assert dates == {p: p.stat().st_mtime_ns for p in (tmp_path / "digits").rglob("*.jpg")}
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_half_written_digits_are_never_taken_for_the_data(tmp_path, monkeypatch):
    """Killed on the way, the folder itself is not there, and the next call writes all of it."""
    saved, real = [], Image.Image.save

    def save_a_few(self, path, **options):
        saved.append(path)
        if len(saved) > 30:
            raise KeyboardInterrupt
        real(self, path, **options)

    root = tmp_path / "digits"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", save_a_few)
        demo.write_digits(root)
    assert not root.exists()
    assert len(demo.open_splits(Data(root=str(root)), 3)[0]) == 1442


def test_a_process_that_comes_second_leaves_the_digits_of_the_first(tmp_path):
    root = tmp_path / "digits"
    demo.write_digits(root)
    dates = {path: path.stat().st_mtime_ns for path in root.rglob("*.jpg")}
    demo.write_digits(root)  # it saw no folder either, and wrote its own copy
    assert dates == {path: path.stat().st_mtime_ns for path in root.rglob("*.jpg")}
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
