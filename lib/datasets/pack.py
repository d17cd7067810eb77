"""A data set as a few large files: small JPEG records in shards, with an index.

    ROOT/pack.json                the settings, the splits and their digests; written last
    ROOT/SPLIT/shard_00000.bin    records one after another
    ROOT/SPLIT/index.npz          where each record lies, and everything the format says of it

A record is read by (shard, offset, length), so a range request will serve as well as a file. The
pack opens as what it was made from; only where the bytes come from differs.
"""

import fcntl
import io
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
import xxhash
from PIL import Image

from lib.datasets import detection, pictures
from lib.datasets.decode import SIDEWAYS, Header, decode_region, read_header
from lib.datasets.detection import DetectionDataset, Listing, Tally
from lib.datasets.folder import Census, FolderDataset, choose_classes
from lib.datasets.stage import FULL, Progress, Show, file_digest, print_line
from lib.errors import BadInput
from lib.params import Data, resolve_path

VERSION = 1
SHARD_BYTES = 256 << 20
ROW = np.dtype([
    ("shard", "<i4"), ("offset", "<i8"), ("length", "<i8"), ("digest", "<u8"),
    ("width", "<i4"), ("height", "<i4"),
])
"""One record: where it lies, its xxh3, and the size of the upright picture it was made from."""
OF_PICTURES, OF_BOXES = ("sizes", "image_ids"), ("corners", "labels", "is_crowd", "areas")
"""The arrays of a Listing, by what a row of theirs is of."""


@dataclass(frozen=True)
class Packed:
    """What became of a split's pictures."""

    split: str
    records: int
    untouched: int
    """Records that are the file's own bytes."""
    left_out: dict[str, int]
    """Pictures, by reason; those that the format left out already among them."""
    examples: dict[str, tuple[str, ...]]
    """The first few of each reason."""
    bytes_before: int
    bytes_after: int


# --------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """The pictures of a split. `sizes` are those that the boxes are given for, or None."""

    split: str
    names: list[str]
    files: list[Path]
    file_sizes: list[int]
    sizes: np.ndarray | None


def pack(
    splits: Sequence[FolderDataset | Listing], dest: Path, max_side: int = 400, quality: int = 90,
    subsampling: str = "420", num_workers: int = 4, shard_bytes: int = SHARD_BYTES,
    show: Show = print_line,
) -> list[Packed]:
    """Write the splits of one data set into the new folder `dest`, whole or not at all.

    A picture with a side above `max_side` pixels is shrunk to it; a JPEG that is small and upright
    already keeps its bytes; everything else is encoded at that size, with `subsampling` of the
    colours "420" or "444". What cannot be decoded is left out and counted. The work is done in a
    hidden folder beside `dest`; stopped at any moment, the same call goes on with the next shard.
    Raises BadInput: `dest` is there already, another process packs to it, its disk is full.
    """
    settings = {"max_side": max_side, "quality": quality, "subsampling": subsampling}
    if dest.exists():
        raise BadInput(f"{dest}: is there already; move it away or choose another destination")
    work = dest.with_name(f".{dest.name}.packing")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with (work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BadInput(f"{dest}: another process is packing to it") from None
            described, packed = {}, []
            for split in splits:
                source = _source(split)
                described[source.split], result = _pack_split(
                    split, source, work / source.split, settings, num_workers, shard_bytes, show
                )
                packed.append(result)
            kind = "detection" if isinstance(splits[0], Listing) else "folder"
            _write(work / "pack.json", json.dumps(
                {"version": VERSION, "kind": kind, "settings": settings, "splits": described},
                indent=1,
            ).encode())
            (work / "lock").unlink()
            work.rename(dest)
            for sidecar in dest.glob("*/shard_*.json"):  # kept to here: a later split may fail
                sidecar.unlink()
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise BadInput(
            f"{dest}: no room left ({error.strerror}); free some and run the same again: it goes "
            "on with the shards that are complete. The pictures are untouched"
        ) from None
    return packed


def _source(split: FolderDataset | Listing) -> _Source:
    if isinstance(split, Listing):
        return _Source(split.split, split.paths, [split.root / path for path in split.paths],
                       split.file_sizes, split.sizes)
    names = [f"{split.class_names[label]}/{path.name}"
             for label, path in zip(split.labels.tolist(), split.paths, strict=True)]
    try:
        sizes = [path.stat().st_size for path in split.paths]
    except OSError as error:
        raise BadInput(f"{error.filename}: cannot be read ({error.strerror})") from None
    return _Source(split.census.split, names, split.paths, sizes, None)


def _pack_split(
    split: FolderDataset | Listing, source: _Source, work: Path, settings: dict, num_workers: int,
    shard_bytes: int, show: Show,
) -> tuple[dict, Packed]:
    work.mkdir(exist_ok=True)
    progress = Progress(f"packing {source.split}", len(source.names), "pictures", show)
    shards: list[dict] = []
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="pack")
    try:
        for number, members in enumerate(_shards(source, settings["max_side"], shard_bytes)):
            shards.append(_pack_shard(number, members, source, work, settings, pool, progress))
    finally:
        pool.shutdown(cancel_futures=True)
    for file in sorted(work.glob("shard_*"))[2 * len(shards) :]:  # of a run with other settings
        file.unlink()
    rows = np.zeros(len(source.names), ROW)
    tally = Tally()
    for number, shard in enumerate(shards):
        for member, row in zip(shard["members"], shard["rows"], strict=True):
            rows[member] = (number, *row)
        for member, reason in shard["left_out"]:
            tally.drop(reason, source.names[member])
    used = rows["length"] > 0
    text, arrays = _describe(split, used, tally)
    index = io.BytesIO()
    coded = np.frombuffer(json.dumps(text).encode(), np.uint8)
    np.savez(index, rows=rows[used], text=coded, **arrays)
    _write(work / "index.npz", index.getvalue())
    described = {
        "records": int(used.sum()), "index": file_digest(work / "index.npz"),
        "shards": [{key: shard[key] for key in ("bytes", "digest")} for shard in shards],
    }
    return described, Packed(
        source.split, int(used.sum()), sum(shard["untouched"] for shard in shards), tally.dropped,
        {reason: tuple(names) for reason, names in tally.examples.items()},
        sum(source.file_sizes), sum(shard["bytes"] for shard in shards),
    )


def _shards(source: _Source, max_side: int, shard_bytes: int) -> list[list[int]]:
    """Which pictures go into which shard: a function of the source alone, so that a second run
    cuts as the first did. A record's size is guessed from above.
    """
    shards: list[list[int]] = []
    room = 0
    for member, size in enumerate(source.file_sizes):
        size = min(size, max_side**2)  # a byte a pixel: twice what quality 95 takes
        if size > room or not shards:
            shards.append([])
            room = shard_bytes
        shards[-1].append(member)
        room -= size
    return shards


def _pack_shard(
    number: int, members: list[int], source: _Source, work: Path, settings: dict,
    pool: ThreadPoolExecutor, progress: Progress,
) -> dict:
    """Write one shard, or take the one that a stopped run completed. Its sidecar says what is in
    it: {"plan", "members", "rows" (all of ROW but the shard), "left_out", "bytes", "digest", ...}.
    """
    file, sidecar = work / f"shard_{number:05d}.bin", work / f"shard_{number:05d}.json"
    plan = xxhash.xxh3_128_hexdigest(json.dumps([
        VERSION, settings, [(source.names[i], source.file_sizes[i]) for i in members]
    ]).encode())
    if sidecar.is_file():
        shard = json.loads(sidecar.read_text("utf-8"))
        if shard["plan"] == plan and file_digest(file) == shard["digest"]:
            progress.add(len(members))
            return shard

    def encode(member: int) -> tuple[bytes, int, int, bool] | str:
        size = None if source.sizes is None else tuple(source.sizes[member].tolist())
        record = _record(source.files[member], size, **settings)
        progress.add(1)
        return record

    digest, offset = xxhash.xxh3_128(), 0
    shard = {"plan": plan, "members": [], "rows": [], "left_out": [], "untouched": 0}
    part = file.with_suffix(".part")
    try:
        with part.open("wb") as stream:
            for member, record in zip(members, pool.map(encode, members), strict=True):
                if isinstance(record, str):
                    shard["left_out"].append((member, record))
                    continue
                data, width, height, is_untouched = record
                stream.write(data)
                digest.update(data)
                shard["members"].append(member)
                shard["rows"].append(
                    (offset, len(data), xxhash.xxh3_64_intdigest(data), width, height)
                )
                shard["untouched"] += is_untouched
                offset += len(data)
            stream.flush()
            os.fsync(stream.fileno())
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)
    shard |= {"bytes": offset, "digest": digest.hexdigest()}
    _write(sidecar, json.dumps(shard).encode())
    return shard


def _record(
    file: Path, size: tuple[int, int] | None, max_side: int, quality: int, subsampling: str
) -> tuple[bytes, int, int, bool] | str:
    """The record, the size of the upright picture, whether these are the file's own bytes; or why
    there is none. A file that cannot be read at all stops the packing: that is no bad picture.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror})") from None
    try:
        header = read_header(data)
        width, height, orientation, frame = header
        if size is not None and size != (width, height):
            if size != ((height, width) if orientation in SIDEWAYS else None):
                return "not of the annotated size"
            # Annotated as it is stored, whatever its EXIF tag says: as DetectionDataset has it.
            header = Header(*size, 1, frame)
            width, height = size
        scale = min(max_side / max(width, height), 1)
        out_width, out_height = (max(round(side * scale), 1) for side in (width, height))
        is_grey = frame and data[frame + 9] == 1
        out = np.empty((out_height, out_width, 1 if is_grey else 3), np.uint8)
        decode_region(data, header, (0, 0, width, height), out, interpolation="bicubic")
    except pictures.BROKEN as error:
        return "more than 8 bits a channel" if "8 bits" in str(error) else "cannot be decoded"
    if scale == 1 and frame and orientation == 1:
        return data, width, height, True
    colours = ("GRAY", "Gray") if is_grey else ("RGB", subsampling)
    return simplejpeg.encode_jpeg(out, quality, *colours), width, height, False


def _describe(
    split: FolderDataset | Listing, used: np.ndarray, tally: Tally
) -> tuple[dict, dict[str, np.ndarray]]:
    """What the index says of a split besides its rows, a JSON tree and arrays. `tally` gets what
    the format has left out. used: (N,) bool.
    """
    is_listing = isinstance(split, Listing)
    known = split.tally.dropped if is_listing else split.census.dropped
    for reason, count in known.items():
        tally.dropped[reason] = tally.dropped.get(reason, 0) + count
    if not is_listing:
        names = [path.name for path, is_used in zip(split.paths, used, strict=True) if is_used]
        text = {"class_names": split.class_names, "names": names, "dropped": tally.dropped}
        return text, {"labels": split.labels[used]}
    keep = used[split.image_of_box]
    for i in np.flatnonzero(~keep):
        tally.drop_box("box of a picture that is left out", split.places[i])
    for reason, count in split.tally.boxes_dropped.items():
        tally.boxes_dropped[reason] = tally.boxes_dropped.get(reason, 0) + count
    for reason, names in split.tally.examples.items():
        for name in names:
            tally.example(reason, name)
    faults = np.full(len(keep), None) if split.faults is None else split.faults
    text = {
        "names": list(split.names), "category_ids": list(split.category_ids),
        "paths": np.asarray(split.paths, object)[used].tolist(),
        "file_sizes": np.asarray(split.file_sizes)[used].tolist(),
        "places": np.asarray(split.places, object)[keep].tolist(),
        "faults": faults[keep].tolist(), "in_pixels": split.in_pixels, "tally": vars(tally),
    }
    arrays = {name: np.asarray(getattr(split, name))[used] for name in OF_PICTURES}
    arrays |= {name: np.asarray(getattr(split, name))[keep] for name in OF_BOXES}
    return text, arrays | {"image_of_box": (np.cumsum(used) - 1)[split.image_of_box[keep]]}


def _write(file: Path, data: bytes) -> None:
    """Whole or not at all, and on the disk."""
    part = file.with_suffix(".part")
    try:
        with part.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------


class PackReader:
    """The records of one split, at random, from any thread.

    They are read by position. A memory map would save a copy of some microseconds, but wait for
    the disk with Python's lock held, and end the process where a shard is cut while it is mapped.
    """

    def __init__(self, root: Path, rows: np.ndarray, shards: list[dict]):
        """rows (N,) of dtype ROW; shards {"bytes", "digest"} as pack.json has them."""
        self.root, self.rows, self.shards = root, rows, shards
        self._files: dict[int, BinaryIO] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, i: int) -> bytes:
        """The JPEG bytes of record `i`, verified. Raises BadInput: the shard is damaged."""
        number, offset, length, digest, _, _ = self.rows[i].tolist()
        data = os.pread(self._opened(number).fileno(), length, offset)
        if xxhash.xxh3_64_intdigest(data) != digest:
            raise BadInput(f"{self._file(number)}: damaged at byte {offset:,} (record {i} has "
                           "another digest); copy this file again, or pack again")
        return data

    def damaged(self) -> list[Path]:
        """The shards whose bytes are not those that were written."""
        return [
            self._file(number) for number, shard in enumerate(self.shards)
            if file_digest(self._file(number)) != shard["digest"]
        ]

    def _file(self, number: int) -> Path:
        return self.root / f"shard_{number:05d}.bin"

    def _opened(self, number: int) -> BinaryIO:
        with self._lock:
            if number not in self._files:
                file, wanted = self._file(number), self.shards[number]["bytes"]
                try:
                    stream = file.open("rb", buffering=0)
                except OSError as error:
                    raise BadInput(f"{file}: cannot be read ({error.strerror})") from None
                if (found := os.fstat(stream.fileno()).st_size) != wanted:
                    raise BadInput(f"{file}: {found:,} bytes, the pack says {wanted:,}; copy this "
                                   "file again, or pack again")
                self._files[number] = stream
            return self._files[number]


class _Records:
    """A data set whose pictures are records; what it is otherwise, its format says."""

    reader: PackReader
    positions: np.ndarray
    """(N,) the record of each sample."""

    def data(self, index: int) -> bytes:
        """The encoded picture `index`, verified."""
        return self.reader.record(int(self.positions[index]))

    def open(self, index: int) -> Image.Image:
        """Picture `index`, header read and pixels still encoded."""
        try:
            return Image.open(io.BytesIO(self.data(index)))
        except pictures.BROKEN as error:
            raise self.unreadable(index, error) from None


class PackedFolder(_Records, FolderDataset):
    """A split of class folders. `paths` are those it would have if the pack were unpacked."""

    def __init__(
        self, reader: PackReader, text: dict, labels: np.ndarray, data: Data, num_channels: int
    ):
        self.reader, self.mode = reader, pictures.MODES[num_channels]
        names = text["class_names"]
        self.class_names = choose_classes(names, data.classes, reader.root)
        new_label = np.full(len(names), -1)
        new_label[[names.index(name) for name in self.class_names]] = range(len(self.class_names))
        self.positions = np.flatnonzero(new_label[labels] >= 0)
        self.labels = new_label[labels][self.positions]
        self.paths = [
            reader.root / self.class_names[label] / text["names"][i]
            for label, i in zip(self.labels.tolist(), self.positions.tolist(), strict=True)
        ]
        counts = np.bincount(self.labels, minlength=len(self.class_names)).tolist()
        listing = "".join(f"{path.relative_to(reader.root)}\n" for path in self.paths).encode()
        digests = reader.rows["digest"][self.positions].tobytes()
        self.census = Census(
            split=reader.root.name,
            listed=len(self.paths) + sum(text["dropped"].values()),
            used=len(self.paths),
            dropped=text["dropped"],
            per_class=dict(zip(self.class_names, counts, strict=True)),
            digest=xxhash.xxh3_64_hexdigest(listing + digests),
        )


class PackedDetection(_Records, DetectionDataset):
    """A split of pictures with boxes, made from the format's own listing, faulty boxes and all.

    `sizes` are those of the original pictures: a record is smaller, its boxes are normalized.
    """

    def __init__(
        self, reader: PackReader, text: dict, arrays: dict[str, np.ndarray], data: Data,
        num_channels: int,
    ):
        tally = Tally()
        vars(tally).update(text.pop("tally"))
        faults = np.asarray(text.pop("faults"), object)
        listing = Listing(
            split=reader.root.name, root=reader.root, tally=tally, faults=faults, **text, **arrays
        )
        super().__init__(listing, data, num_channels)
        self.reader = reader
        position = {path: i for i, path in enumerate(listing.paths)}
        self.positions = np.asarray([position[path] for path in self.paths])


def is_pack(root: Path) -> bool:
    return (root / "pack.json").is_file()


def open_splits(
    data: Data, num_channels: int
) -> tuple["PackedFolder | PackedDetection", "PackedFolder | PackedDetection"]:
    """The training and validation split of the pack at `data.root`, as their format opens them.

    Raises BadInput: no pack, a split that is not in it, a damaged index, and what the format
    refuses.
    """
    root = resolve_path(data.root)
    detection.check_channels(num_channels)
    try:
        manifest = json.loads((root / "pack.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{root / 'pack.json'}: cannot be read ({error})") from None
    if manifest["version"] != VERSION:
        raise BadInput(f"{root}: a pack of version {manifest['version']}; this Shakedown reads "
                       f"{VERSION}: pack again")
    opened = []
    for split in (data.train, data.val):
        described = manifest["splits"].get(split)
        if described is None:
            raise BadInput(f"{root}: has the splits {detection.listed(list(manifest['splits']))}, "
                           f"not {split!r}; see data.train and data.val")
        file = root / split / "index.npz"
        if file_digest(file) != described["index"]:
            raise BadInput(f"{file}: missing or damaged; copy this file again, or pack again")
        with np.load(file) as arrays:
            index = dict(arrays)
        text = json.loads(index.pop("text").tobytes())
        reader = PackReader(root / split, index.pop("rows"), described["shards"])
        if manifest["kind"] == "folder":
            opened.append(PackedFolder(reader, text, index["labels"], data, num_channels))
        else:
            opened.append(PackedDetection(reader, text, index, data, num_channels))
    train, val = opened
    if manifest["kind"] == "folder":
        _check_folders(train, val, data)
    else:
        detection.check_splits(train, val, data)
    return train, val


def _check_folders(train: PackedFolder, val: PackedFolder, data: Data) -> None:
    for dataset, expected in ((train, data.num_train_images), (val, data.num_val_images)):
        empty = [name for name, count in dataset.census.per_class.items() if not count]
        if empty:
            raise BadInput(f"{dataset.reader.root}: no picture of class {detection.listed(empty)}; "
                           f"left out: {dataset.census.dropped}")
        if expected not in (None, len(dataset)):
            raise BadInput(f"{dataset.reader.root}: {len(dataset):,} images, the params say "
                           f"{expected:,}; pack the whole data or correct the key")
