"""Class folders: what is counted, what is refused, how each kind of picture is read."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib.datasets.folder import EXIF_ORIENTATION, choose_classes, open_splits
from lib.errors import BadInput
from lib.params import ROOT, Data

RAMP = np.stack([np.linspace(0, 250, 40 * 24).reshape(24, 40),
                 np.linspace(250, 0, 40 * 24).reshape(24, 40),
                 np.full((24, 40), 100.0)], -1).astype(np.uint8)
"""A picture 40 wide and 24 high whose corners differ."""


def write_tree(root: Path, train: dict[str, int], val: dict[str, int]) -> Path:
    """ROOT/SPLIT/CLASS with that many small pictures in each class folder."""
    for split, classes in (("train", train), ("val", val)):
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    return root


def splits(root: Path, num_channels: int = 3, **data):
    return open_splits(Data(format="folder", root=str(root), **data), num_channels)


def train_of_one(root: Path, file: str, content: bytes, num_channels: int = 3):
    """A data set whose only training picture is `content`."""
    write_tree(root, {"a": 0}, {"a": 1})
    (root / "train" / "a" / file).write_bytes(content)
    return splits(root, num_channels)[0]


def encoded(image: Image.Image, format_: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


# -- census ------------------------------------------------------------------------------------


def test_census_says_what_became_of_every_file(tmp_path):
    write_tree(tmp_path, {"a": 3, "b": 2}, {"a": 1, "b": 1})
    folder = tmp_path / "train" / "a"
    (folder / ".DS_Store").write_text("x")
    (folder / "notes.txt").write_text("x")
    (folder / "labels.csv").write_text("x")
    (folder / "0.jpg").touch()
    (folder / "more").mkdir()
    train, val = splits(tmp_path)
    assert train.census.per_class == {"a": 3, "b": 2}
    assert train.census.dropped == {
        "hidden file": 1, "not an image suffix": 2, "empty file": 1,
        "folder inside a class folder": 1,
    }
    assert (train.census.listed, train.census.used) == (10, 5)
    assert len(train) == 5 and train.labels.tolist() == [0, 0, 0, 1, 1]
    assert (val.census.listed, val.census.used, val.census.dropped) == (2, 2, {})


def test_files_come_in_an_order_that_does_not_depend_on_the_disk(tmp_path):
    write_tree(tmp_path, {"a": 0}, {"a": 1})
    for name in ("9.png", "1.png", "5.png", "B.png", "a.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / "a" / name)
    names = [path.name for path in splits(tmp_path)[0].paths]
    assert names == ["1.png", "5.png", "9.png", "B.png", "a.png"]


def test_validation_labels_are_those_of_training_also_where_its_folders_sort_otherwise(tmp_path):
    write_tree(tmp_path, {"a": 1, "b": 1, "c": 1}, {"c": 1, "a": 1, "b": 1})
    train, val = splits(tmp_path, classes=("c", "b"))
    assert train.class_names == val.class_names == ("b", "c")
    for split in (train, val):
        assert [path.parent.name for path in split.paths] == ["b", "c"]
        assert split.labels.tolist() == [0, 1]


def digest(root: Path) -> str:
    return splits(root)[0].census.digest


def test_digest_is_of_the_data_not_of_where_or_when_it_was_written(tmp_path):
    one = write_tree(tmp_path / "one", {"b": 2, "a": 2}, {"a": 1, "b": 1})
    two = write_tree(tmp_path / "two", {"a": 2, "b": 2}, {"a": 1, "b": 1})
    os.utime(two / "train" / "a" / "0.png", (0, 0))
    assert digest(one) == digest(two)


@pytest.mark.parametrize("change", ["removed", "added", "renamed", "moved", "resized"])
def test_digest_changes_with_the_data(tmp_path, change):
    write_tree(tmp_path, {"a": 2, "b": 2}, {"a": 1, "b": 1})
    before = digest(tmp_path)
    file = tmp_path / "train" / "a" / "0.png"
    if change == "removed":
        file.unlink()
    elif change == "added":
        Image.new("RGB", (8, 8)).save(file.with_name("7.png"))
    elif change == "renamed":
        file.rename(file.with_name("7.png"))
    elif change == "moved":
        file.rename(tmp_path / "train" / "b" / "7.png")
    else:
        Image.fromarray(RAMP).save(file)
    assert digest(tmp_path) != before


# -- bad input -----------------------------------------------------------------------------------


def refusal(root: Path, num_channels: int = 3, **data) -> str:
    with pytest.raises(BadInput) as caught:
        splits(root, num_channels, **data)
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 2
    return message


def test_missing_root_is_named_with_what_belongs_there(tmp_path):
    message = refusal(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "train") in message and "CLASS/IMAGE" in message


def test_missing_validation_folder_is_named(tmp_path):
    write_tree(tmp_path, {"a": 1}, {"a": 1})
    assert str(tmp_path / "test") in refusal(tmp_path, val="test")


def test_split_without_class_folders_is_named(tmp_path):
    write_tree(tmp_path, {}, {"a": 1})
    (tmp_path / "train").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "loose.png")
    assert f"{tmp_path / 'train'}: no class folder" in refusal(tmp_path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class_folder_is_named(tmp_path, split):
    write_tree(tmp_path, {"a": 2, "b": 2}, {"a": 1, "b": 1})
    for file in (tmp_path / split / "b").iterdir():
        file.rename(file.with_suffix(".txt"))
    assert f"{tmp_path / split / 'b'}: no image" in refusal(tmp_path)


def test_class_that_only_validation_has_is_named(tmp_path):
    write_tree(tmp_path, {"a": 1}, {"a": 1, "zebra": 1})
    message = refusal(tmp_path)
    assert "'zebra'" in message and str(tmp_path / "val") in message


def test_class_that_validation_lacks_is_named(tmp_path):
    write_tree(tmp_path, {"a": 1, "yak": 1}, {"a": 1})
    message = refusal(tmp_path)
    assert "'yak'" in message and str(tmp_path / "val") in message
    splits(tmp_path, classes=("a",))  # the way out that the message names


@pytest.mark.parametrize("key", ["num_train_images", "num_val_images"])
@pytest.mark.parametrize("stated", [3, 5])
def test_other_number_of_images_than_the_params_state(tmp_path, key, stated):
    write_tree(tmp_path, {"a": 2, "b": 2}, {"a": 2, "b": 2})
    message = refusal(tmp_path, **{key: stated})
    assert f"4 images, data.{key} says {stated}" in message
    splits(tmp_path, num_train_images=4, num_val_images=4)


def test_channels_that_no_picture_file_has(tmp_path):
    write_tree(tmp_path, {"a": 1}, {"a": 1})
    assert "model.in_chans is 4" in refusal(tmp_path, num_channels=4)


# -- reading a picture -----------------------------------------------------------------------------

HTML = b"<html><body>404 Not Found</body></html>"
PNG, JPEG = encoded(Image.fromarray(RAMP), "PNG"), encoded(Image.fromarray(RAMP), "JPEG")
DEEP = np.arange(24 * 40, dtype=np.uint16).reshape(24, 40) * 60
BROKEN = {
    "an error page": ("x.jpg", HTML),
    "no picture at all": ("x.png", bytes(200)),
    "a truncated jpeg": ("x.jpg", JPEG[: len(JPEG) // 2]),
    "a truncated png": ("x.png", PNG[: len(PNG) // 2]),
    "a png with a damaged chunk": ("x.png", PNG[:60] + b"\0\0\0\0" + PNG[64:]),
    "a bmp of a billion pixels":
        ("x.bmp", b"BM" + encoded(Image.fromarray(RAMP), "BMP")[2:18] + b"\0\0\1\0\0\0\1\0"
         + encoded(Image.fromarray(RAMP), "BMP")[26:]),
    "16 bits a pixel, png": ("x.png", encoded(Image.fromarray(DEEP), "PNG")),
    "16 bits a pixel, tiff": ("x.tif", encoded(Image.fromarray(DEEP), "TIFF")),
    "float pixels": ("x.tif", encoded(Image.fromarray(DEEP.astype(np.float32)), "TIFF")),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_picture_that_cannot_be_used_is_named_with_its_path(tmp_path, tiny_params, kind):
    """Through the reader that trains and the one that judges; never a silent blank image."""
    import torch

    from lib.datasets.loader import Request
    from lib.tasks import build_task

    file, content = BROKEN[kind]
    write_tree(tmp_path / "data", {"a": 1}, {"a": 1})
    bad = tmp_path / "data" / "train" / "a" / file
    bad.write_bytes(content)
    params = tiny_params(tmp_path, data__root=str(tmp_path / "data"), train__batch_size=2)
    task = build_task(params, torch.device("cpu"))
    for batches in (
        task.train_batches([Request(0, 0, np.arange(2), (16, 16), range(2))]),
        task.eval_batches("train"),
    ):
        with pytest.raises(BadInput, match="cannot be decoded") as caught:
            list(batches)
        assert str(bad) in str(caught.value)
    if "bits" in kind or "float" in kind:
        assert "8 bits" in str(caught.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_picture_stored_lying_or_mirrored_is_set_upright(tmp_path, orientation):
    """Each of EXIF's eight orientations gives back the picture as it was seen."""
    undo = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270}[orientation]
    upright = Image.fromarray(RAMP)
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    train = train_of_one(tmp_path, "x.png", encoded(stored, "PNG", exif=exif))
    assert np.array_equal(np.asarray(train.pixels(train.open(0))), RAMP)


def readable_modes() -> dict[str, tuple[bytes, float]]:
    """Files of one picture in many pixel formats, and the mean absolute difference allowed."""
    picture = Image.fromarray(RAMP)
    transparent = picture.convert("RGBA")
    grey = np.repeat(np.asarray(picture.convert("L"))[..., None], 3, 2)
    return {
        "rgb.png": (PNG, RAMP, 0),
        "rgb.jpg": (encoded(picture, "JPEG", quality=95), RAMP, 2),
        "rgba.png": (encoded(transparent, "PNG"), RAMP, 0),
        "grey.png": (encoded(picture.convert("L"), "PNG"), grey, 0),
        "grey_alpha.png": (encoded(picture.convert("LA"), "PNG"), grey, 0),
        "palette.png": (encoded(picture.quantize(256), "PNG"), RAMP, 8),
        "palette.gif": (encoded(picture.quantize(256), "GIF"), RAMP, 8),
        "cmyk.jpg": (encoded(picture.convert("CMYK"), "JPEG", quality=95), RAMP, 3),
        "cmyk.tif": (encoded(picture.convert("CMYK"), "TIFF"), RAMP, 1),
        "two_pages.tif": (encoded(picture, "TIFF", save_all=True,
                                  append_images=[Image.new("RGB", (40, 24))]), RAMP, 0),
    }


@pytest.mark.parametrize("file", readable_modes())
def test_every_pixel_format_is_read_as_the_picture_it_shows(tmp_path, file):
    content, wanted, most = readable_modes()[file]
    train = train_of_one(tmp_path, file, content)
    pixels = np.asarray(train.pixels(train.open(0)))
    assert pixels.shape == (24, 40, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - wanted).mean() <= most


def test_one_channel_reads_grey(tmp_path):
    train = train_of_one(tmp_path, "x.png", PNG, num_channels=1)
    pixels = np.asarray(train.pixels(train.open(0)))
    assert np.array_equal(pixels, np.asarray(Image.fromarray(RAMP).convert("L")))


# -- a subset of the classes ---------------------------------------------------------------------

NAMES = [f"n{i:05d}" for i in range(60)]


def test_subset_of_classes_is_the_same_in_every_process():
    """D11 of the failures: Python's own hash() is salted anew in each process."""
    code = ("from pathlib import Path; from lib.datasets.folder import choose_classes;"
            f"print(*choose_classes({NAMES!r}, 7, Path('x')))")
    chosen = []
    for salt in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": salt, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, text=True,
                              capture_output=True, check=True)
        chosen.append(tuple(done.stdout.split()))
    assert chosen[0] == chosen[1] == choose_classes(NAMES, 7, Path("x"))
    assert len(set(chosen[0])) == 7


def test_subset_is_a_sample_and_a_larger_one_holds_the_smaller():
    few, more = (choose_classes(NAMES, count, Path("x")) for count in (5, 20))
    assert set(few) < set(more) < set(NAMES)
    assert few == tuple(sorted(few)) and more != tuple(NAMES[:20])
    assert choose_classes(NAMES[::-1], 5, Path("x")) == few
    assert choose_classes(NAMES, None, Path("x")) == tuple(NAMES)


def test_subset_gets_labels_from_zero_without_gaps(tmp_path):
    names = ("ant", "bee", "cat", "dog", "elk")
    write_tree(tmp_path, dict.fromkeys(names, 2), dict.fromkeys(names, 1))
    for wanted in (3, ("elk", "bee", "cat")):
        train, val = splits(tmp_path, classes=wanted)
        assert len(train.class_names) == 3
        for split, each in ((train, 2), (val, 1)):
            assert split.labels.tolist() == sorted([0, 1, 2] * each)
            assert [path.parent.name for path in split.paths] == [
                train.class_names[label] for label in split.labels
            ]
    assert train.class_names == ("bee", "cat", "elk")


def test_more_classes_than_there_are_and_unknown_ones_are_refused(tmp_path):
    write_tree(tmp_path, {"a": 1, "b": 1}, {"a": 1, "b": 1})
    assert "has 2 classes, data.classes asks for 3" in refusal(tmp_path, classes=3)
    assert "no class folder 'gnu'" in refusal(tmp_path, classes=("a", "gnu"))
