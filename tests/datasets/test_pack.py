"""Packs: the same data set from a few files, whatever happens while they are written."""

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from lib.datasets import coco, folder, pack
from lib.datasets.detection import DetectionDataset
from lib.datasets.pictures import EXIF_ORIENTATION
from lib.errors import BadInput
from lib.params import ROOT, Data

PHOTO = Image.open(Path(sklearn.datasets.__file__).parent / "images" / "flower.jpg")
SMALL_SHARDS = 60_000  # bytes


def quiet(line: str) -> None:
    pass


def photo(number: int, size: tuple[int, int]) -> Image.Image:
    """A part of the photograph, another for each number."""
    left, top = number * 13 % (640 - size[0]), number * 7 % (427 - size[1])
    return PHOTO.crop((left, top, left + size[0], top + size[1]))


def write_folder(root: Path, num_train: int = 12, size=(160, 120)) -> Path:
    for split, count in (("train", num_train), ("val", 4)):
        for number in range(count):
            name = ("cat", "dog", "emu")[number % 3]
            path = root / split / name / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(number, size).save(path, quality=92)
    return root


def folder_splits(root: Path, **data):
    return folder.open_splits(Data(format="folder", root=str(root), **data), 3)


def open_pack(root: Path, num_channels: int = 3, **data):
    return pack.open_splits(Data(root=str(root), **data), num_channels)


def pixels(dataset, index: int) -> np.ndarray:
    return np.asarray(dataset.pixels(dataset.open(index)))


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(root.rglob("*")) if path.is_file()}


# -- class folders -----------------------------------------------------------------------------


def test_packed_folders_open_as_the_folders_did(tmp_path):
    source = folder_splits(write_folder(tmp_path / "data"))
    results = pack.pack(source, tmp_path / "packed", max_side=400, show=quiet)
    assert pack.is_pack(tmp_path / "packed") and not pack.is_pack(tmp_path / "data")
    for original, packed, result in zip(source, open_pack(tmp_path / "packed"), results,
                                        strict=True):
        assert packed.class_names == original.class_names and len(packed) == len(original)
        assert packed.labels.dtype == np.int64
        assert np.array_equal(packed.labels, original.labels)
        assert packed.census.per_class == original.census.per_class
        assert packed.census.split == original.census.split
        assert [(p.parent.name, p.name) for p in packed.paths] == [
            (p.parent.name, p.name) for p in original.paths]
        for i, path in enumerate(original.paths):  # small JPEG: the very bytes
            assert bytes(packed.data(i)) == path.read_bytes()
            assert np.array_equal(pixels(packed, i), pixels(original, i))
        assert result.untouched == result.records == len(original)


@pytest.mark.parametrize("classes", [2, ("emu", "cat")])
def test_subset_of_classes_is_that_of_the_folder(tmp_path, classes):
    write_folder(tmp_path / "data")
    pack.pack(folder_splits(tmp_path / "data"), tmp_path / "packed", show=quiet)
    for original, packed in zip(folder_splits(tmp_path / "data", classes=classes),
                                open_pack(tmp_path / "packed", classes=classes), strict=True):
        assert packed.class_names == original.class_names and len(packed.class_names) == 2
        assert packed.labels.tolist() == original.labels.tolist()
        for i, path in enumerate(original.paths):
            assert bytes(packed.data(i)) == path.read_bytes()


def test_large_pictures_are_shrunk_and_small_ones_kept(tmp_path):
    write_folder(tmp_path / "data", size=(160, 120))
    wide = tmp_path / "data" / "train" / "cat" / "0000.jpg"
    PHOTO.save(wide, quality=95)
    pack.pack(folder_splits(tmp_path / "data"), tmp_path / "packed", max_side=200, show=quiet)
    train, _ = open_pack(tmp_path / "packed")
    shrunk = pixels(train, 0)
    assert shrunk.shape == (133, 200, 3)
    assert train.reader.rows[0][["width", "height"]].tolist() == (640, 427)
    wanted = np.asarray(PHOTO.resize((200, 133), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(shrunk - wanted).mean() < 4
    assert len(train.data(0)) < wide.stat().st_size / 4
    assert all(pixels(train, i).shape == (120, 160, 3) for i in range(1, len(train)))


@pytest.mark.parametrize("subsampling, factors", [("420", (2, 2)), ("444", (1, 1))])
def test_colours_are_subsampled_as_asked(tmp_path, subsampling, factors):
    write_folder(tmp_path / "data", size=(300, 200))
    pack.pack(folder_splits(tmp_path / "data"), tmp_path / "packed", max_side=100,
              subsampling=subsampling, show=quiet)
    image = open_pack(tmp_path / "packed")[0].open(0)
    assert image.layer[0][1:3] == factors


def test_every_kind_of_picture_becomes_an_upright_jpeg(tmp_path):
    write_folder(tmp_path / "data")
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    here = tmp_path / "data" / "train" / "cat"
    photo(1, (90, 60)).save(here / "lying.jpg", exif=exif, quality=95)
    photo(2, (90, 60)).save(here / "png.png")
    photo(3, (90, 60)).convert("L").save(here / "grey.png")
    photo(4, (90, 60)).convert("CMYK").save(here / "cmyk.jpg", quality=95)
    original, _ = folder_splits(tmp_path / "data")
    pack.pack([original], tmp_path / "packed", quality=95, subsampling="444", show=quiet)
    packed, _ = open_pack(tmp_path / "packed", val="train")
    for i, path in enumerate(original.paths):
        image = packed.open(i)
        assert image.format == "JPEG" and EXIF_ORIENTATION not in image.getexif()
        assert np.abs(pixels(packed, i).astype(int) - pixels(original, i)).mean() < 2.5, path


def test_what_cannot_be_decoded_is_left_out_counted_and_named(tmp_path):
    write_folder(tmp_path / "data")
    here = tmp_path / "data" / "train" / "dog"
    whole = (here / "0001.jpg").read_bytes()
    (here / "0001.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.ones((9, 9), np.uint16)).save(here / "deep.png")
    (here / "empty.jpg").touch()
    train, val = folder_splits(tmp_path / "data")
    result = pack.pack([train, val], tmp_path / "packed", show=quiet)[0]
    assert result.left_out == {
        "cannot be decoded": 1, "more than 8 bits a channel": 1, "empty file": 1}
    assert result.examples["cannot be decoded"] == ("dog/0001.jpg",)
    packed, _ = open_pack(tmp_path / "packed")
    assert packed.census.dropped == result.left_out
    assert packed.census.used == len(packed) == len(train) - 2
    assert packed.census.listed == train.census.listed
    names = [path.name for path in packed.paths]
    assert "0001.jpg" not in names and "deep.png" not in names
    assert packed.labels[names.index("0004.jpg")] == 1


def test_source_file_that_cannot_be_read_stops_the_packing(tmp_path):
    """A mount that went away must not become a pack without its pictures."""
    splits = folder_splits(write_folder(tmp_path / "data"))
    splits[0].paths[5].unlink()
    with pytest.raises(BadInput, match="cannot be read"):
        pack.pack(splits, tmp_path / "packed", show=quiet)
    assert not (tmp_path / "packed").exists()


def test_expected_number_of_images_is_held_against_the_pack(tmp_path):
    pack.pack(folder_splits(write_folder(tmp_path / "data")), tmp_path / "packed", show=quiet)
    open_pack(tmp_path / "packed", num_train_images=12, num_val_images=4)
    with pytest.raises(BadInput, match="12 images, the params say 13"):
        open_pack(tmp_path / "packed", num_train_images=13)


# -- boxes ---------------------------------------------------------------------------------------


def write_coco(root: Path) -> Path:
    """Six pictures of 300 x 200: boxes, a faulty one, a crowd, a background, a truncated file."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    for split in ("train", "val"):
        (root / split).mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        images, annotations = [], []
        for i in range(6):
            # 4: lies on its side for a viewer, and is annotated as it is stored
            photo(i, (300, 200)).save(root / split / f"{i}.jpg", exif=exif if i == 4 else b"")
            images.append({"id": 9 - i, "file_name": f"{i}.jpg", "width": 300, "height": 200})
            if i != 3:
                annotations.append({"id": i, "image_id": 9 - i, "category_id": 2 + 5 * (i % 2),
                                    "bbox": [i * 10, 20, 33.3, 40 + i], "area": 99.5 + i,
                                    "iscrowd": int(i == 2)})
        annotations.append({"id": 77, "image_id": 9, "category_id": 2, "bbox": [5, 5, 0, 9]})
        cut = root / split / "5.jpg"
        cut.write_bytes(cut.read_bytes()[:3000])
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps({
            "images": images, "annotations": annotations,
            "categories": [{"id": 7, "name": "cat"}, {"id": 2, "name": "dog"}],
        }))
    return root


@pytest.mark.parametrize("classes, single", [(None, False), (("cat",), False), (None, True)])
def test_packed_boxes_are_those_of_the_annotations(tmp_path, classes, single):
    write_coco(tmp_path / "data")
    listings = [coco.read_listing(tmp_path / "data", split) for split in ("train", "val")]
    pack.pack(listings, tmp_path / "packed", max_side=150, show=quiet)
    data = Data(root=str(tmp_path / "packed"), classes=classes, single_class=single)
    packed, _ = pack.open_splits(data, 3)
    original = DetectionDataset(coco.read_listing(tmp_path / "data", "train"), data, 3)
    assert packed.class_names == original.class_names
    assert packed.category_ids == original.category_ids
    assert packed.paths == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg"]  # 5 is cut short
    assert packed.census.dropped == {"cannot be decoded": 1}
    for i in range(5):
        for ours, theirs in zip(packed.annotations(i), original.annotations(i), strict=True):
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
        assert packed.sizes[i].tolist() == [300, 200]
        assert packed.image_ids[i] == original.image_ids[i]
        image = packed.pixels(packed.open(i))
        assert image.size == (150, 100)
        wanted = original.pixels(original.open(i)).resize((150, 100), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(wanted)).mean() < 5
    reasons = packed.census.boxes_dropped
    assert reasons.get("box of zero or negative size") == (None if classes else 1)
    assert reasons["box of a picture that is left out"] == 1
    assert packed.census.boxes_listed == original.census.boxes_listed


def test_picture_of_another_size_than_annotated_is_left_out(tmp_path):
    write_coco(tmp_path / "data")
    photo(0, (200, 150)).save(tmp_path / "data" / "train" / "1.jpg")
    result = pack.pack([coco.read_listing(tmp_path / "data", "train")], tmp_path / "packed",
                       show=quiet)[0]
    assert result.left_out == {"cannot be decoded": 1, "not of the annotated size": 1}
    assert result.examples["not of the annotated size"] == ("1.jpg",)


# -- damage ----------------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path) -> Path:
    """A pack of several shards."""
    splits = folder_splits(write_folder(tmp_path / "data", 30))
    pack.pack(splits, tmp_path / "packed", shard_bytes=SMALL_SHARDS, show=quiet)
    assert len(list((tmp_path / "packed" / "train").glob("shard_*.bin"))) >= 3
    return tmp_path / "packed"


def test_damaged_shard_is_named_and_the_others_are_read(packed):
    train, _ = open_pack(packed)
    victim = packed / "train" / "shard_00001.bin"
    first = int(np.flatnonzero(train.reader.rows["shard"] == 1)[0])
    content = bytearray(victim.read_bytes())
    content[100] ^= 1  # one bit
    victim.write_bytes(content)
    train, _ = open_pack(packed)
    assert train.reader.damaged() == [victim]
    for i in range(len(train)):
        if i == first:
            with pytest.raises(BadInput, match="damaged") as caught:
                train.open(i)
            assert str(victim) in str(caught.value)
        else:
            train.open(i).load()


@pytest.mark.parametrize("how", ["cut", "missing"])
def test_shard_that_is_cut_or_missing_is_named(packed, how):
    victim = packed / "train" / "shard_00000.bin"
    if how == "cut":
        os.truncate(victim, 1000)
    else:
        victim.unlink()
    train, _ = open_pack(packed)
    with pytest.raises(BadInput) as caught:
        train.open(0)
    assert str(victim) in str(caught.value) and train.reader.damaged() == [victim]


@pytest.mark.parametrize("file", ["pack.json", "val/index.npz"])
def test_damaged_index_is_named(packed, file):
    content = bytearray((packed / file).read_bytes())
    content[len(content) // 2 :] = b"x" * 20
    (packed / file).write_bytes(content)
    with pytest.raises(BadInput) as caught:
        open_pack(packed)
    assert str(packed / file) in str(caught.value)


def test_split_that_is_not_in_the_pack_is_named(packed):
    with pytest.raises(BadInput, match="has the splits 'train', 'val', not 'test'"):
        open_pack(packed, val="test")


def test_records_are_read_at_random_by_many_threads(packed):
    train, _ = open_pack(packed)
    wanted = [bytes(train.data(i)) for i in range(len(train))]
    order = np.random.default_rng(0).integers(len(train), size=2000).tolist()
    fresh, _ = open_pack(packed)  # its shards are opened by whoever comes first
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: bytes(fresh.data(i)), order))
    assert got == [wanted[i] for i in order]


def test_a_range_request_would_do(packed):
    """(offset, length) alone give a whole JPEG."""
    train, _ = open_pack(packed)
    number, offset, length, *_ = train.reader.rows[7].tolist()
    with (packed / "train" / f"shard_{number:05d}.bin").open("rb") as file:
        file.seek(offset)
        Image.open(io.BytesIO(file.read(length))).load()


# -- stopped, full, twice --------------------------------------------------------------------------

KILLED = """
import sys
from lib.datasets import folder, pack
from lib.params import Data
splits = folder.open_splits(Data(format="folder", root=sys.argv[1]), 3)
from pathlib import Path
pack.pack(splits, Path(sys.argv[2]), num_workers=1, max_side=100, shard_bytes=int(sys.argv[3]),
          show=lambda line: None)
"""


def test_killed_packing_goes_on_and_gives_the_same_bytes(tmp_path):
    splits = folder_splits(write_folder(tmp_path / "data", 150, size=(300, 200)))
    options = {"max_side": 100, "shard_bytes": SMALL_SHARDS, "show": quiet}
    pack.pack(splits, tmp_path / "whole", **options)
    work = tmp_path / ".packed.packing" / "train"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path / "data", tmp_path / "packed", str(SMALL_SHARDS)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    while len(list(work.glob("shard_*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "packed").exists()
    complete = {file.with_suffix(".bin"): file.with_suffix(".bin").stat().st_mtime_ns
                for file in work.glob("shard_*.json")}
    num_shards = len(list((tmp_path / "whole" / "train").glob("*.bin")))
    assert 3 <= len(complete) < num_shards
    damaged = sorted(complete)[0]  # what the disk spoilt meanwhile is not taken over
    damaged.write_bytes(bytes(damaged.stat().st_size))
    del complete[damaged]

    pack.pack(splits, tmp_path / "packed", **options)
    assert contents(tmp_path / "packed") == contents(tmp_path / "whole")
    for file, written in complete.items():
        kept = tmp_path / "packed" / "train" / file.name
        assert kept.stat().st_mtime_ns == written
    assert not work.parent.exists()


def stopped_in_validation(splits, dest: Path, **options) -> dict[str, int]:
    """Pack until the validation split fails; when each finished training shard was written."""
    lost = splits[1].paths[0]
    content = lost.read_bytes()

    def lose(line: str) -> None:
        lost.unlink(missing_ok=True)

    with pytest.raises(BadInput, match="cannot be read"):
        pack.pack(splits, dest, show=lose, **options)
    lost.write_bytes(content)
    shards = (dest.parent / f".{dest.name}.packing" / "train").glob("*.bin")
    return {file.name: file.stat().st_mtime_ns for file in shards}


def test_failure_in_the_second_split_does_not_cost_the_first(tmp_path):
    splits = folder_splits(write_folder(tmp_path / "data", 30))
    options = {"max_side": 100, "shard_bytes": SMALL_SHARDS}
    written = stopped_in_validation(splits, tmp_path / "packed", **options)
    assert len(written) >= 2
    pack.pack(splits, tmp_path / "packed", show=quiet, **options)
    kept = (tmp_path / "packed" / "train").glob("*.bin")
    assert {file.name: file.stat().st_mtime_ns for file in kept} == written


def test_other_settings_do_not_take_over_what_a_stopped_run_left(tmp_path):
    splits = folder_splits(write_folder(tmp_path / "data", 30))
    many = stopped_in_validation(splits, tmp_path / "packed", max_side=100, shard_bytes=20_000)
    pack.pack(splits, tmp_path / "packed", max_side=80, show=quiet)
    train, _ = open_pack(tmp_path / "packed")
    assert {max(train.open(i).size) for i in range(len(train))} == {80}
    pack.pack(splits, tmp_path / "fresh", max_side=80, show=quiet)
    assert len(many) > 1 and contents(tmp_path / "packed") == contents(tmp_path / "fresh")


@contextmanager
def largest_file(num_bytes: int):
    """The kernel refuses to write more, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_is_said_the_source_stays_and_space_lets_it_go_on(tmp_path):
    splits = folder_splits(write_folder(tmp_path / "data", 30))
    before = contents(tmp_path / "data")
    with largest_file(40_000), pytest.raises(BadInput, match="no room left") as caught:
        pack.pack(splits, tmp_path / "packed", show=quiet)
    assert str(tmp_path / "packed") in str(caught.value)
    assert not (tmp_path / "packed").exists()
    assert not list(tmp_path.rglob("*.part"))
    assert contents(tmp_path / "data") == before
    pack.pack(splits, tmp_path / "packed", show=quiet)
    assert len(open_pack(tmp_path / "packed")[0]) == 30


def test_no_space_on_a_real_file_system(tmp_path):
    """The same with ENOSPC itself, where this user may mount a small one."""
    splits = folder_splits(write_folder(tmp_path / "data", 30))
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        with pytest.raises(BadInput, match=os.strerror(errno.ENOSPC)):
            pack.pack(splits, small / "packed", shard_bytes=SMALL_SHARDS, show=quiet)
        assert not (small / "packed").exists()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_destination_that_exists_is_left_alone(packed):
    before = contents(packed)
    with pytest.raises(BadInput, match="is there already"):
        pack.pack(folder_splits(packed.parent / "data"), packed, show=quiet)
    assert contents(packed) == before


def test_second_packer_of_the_same_destination_is_refused(tmp_path):
    splits = folder_splits(write_folder(tmp_path / "data"))
    seen = []

    def meanwhile(line: str) -> None:
        if not seen:
            with pytest.raises(BadInput, match="another process") as caught:
                pack.pack(splits, tmp_path / "packed", show=quiet)
            seen.append(caught)

    pack.pack(splits, tmp_path / "packed", num_workers=1, show=meanwhile)
    assert seen and len(open_pack(tmp_path / "packed")[0]) == 12


def test_progress_says_how_far_how_fast_and_how_long(tmp_path):
    lines = []
    splits = folder_splits(write_folder(tmp_path / "data"))
    pack.pack(splits, tmp_path / "packed", show=lines.append)
    assert "packing train: 12 of 12 pictures, " in "\n".join(lines)
    assert all("pictures/s, " in line and line.endswith(" s left") for line in lines)
