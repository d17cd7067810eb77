"""Public data sets: fetched, unpacked and counted; the same command goes on where it was stopped.

An archive arrives as NAME.zip.part and is unpacked under temporary names: what has its final name
is complete. Archives are removed when everything is counted.
"""

import fcntl
import re
import shutil
import ssl
import stat
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen
from zipfile import BadZipFile, ZipFile

from lib.datasets import coco
from lib.datasets.detection import files_below
from lib.errors import BadInput, ShakedownError
from lib.params import Data
from lib.run import duration

TIMEOUT = 60.0  # seconds without a byte
WAITS = (1, 2, 4, 8, 16)  # seconds before each further attempt that brings nothing new
CHUNK = 2**20  # bytes read at most at once; an attempt that brings as many is progress
LINE_EVERY, REDRAW_EVERY = 10.0, 0.2  # seconds between progress lines: in a log, on a terminal


@dataclass(frozen=True)
class Archive:
    """A ZIP file at BASE_URL/`path`; unpacked, `num_files` are in ROOT/`folder`."""

    path: str
    folder: str
    num_files: int


@dataclass(frozen=True)
class Source:
    """A data set: where it is, and what must have arrived."""

    base_url: str
    archives: tuple[Archive, ...]  # the smallest first: what is wrong shows early
    open_splits: Callable[[Data, int], tuple]
    counts: dict[str, dict[str, int]]  # of the training and validation split: fields of its census


SOURCES = {
    "coco": Source(
        "http://images.cocodataset.org",
        (Archive("annotations/annotations_trainval2017.zip", "annotations", 6),
         Archive("zips/val2017.zip", "val2017", 5_000),
         Archive("zips/train2017.zip", "train2017", 118_287)),
        coco.open_splits,
        {"train2017": {"used": 118_287, "boxes_listed": 860_001},
         "val2017": {"used": 5_000, "boxes_listed": 36_781}},
    ),
}


def download(source: Source, root: Path, base_url: str, keep_archives: bool) -> tuple:
    """Complete `source` in `root`; returns its training and validation split, counted.

    Raises ShakedownError where the same command may do better later, BadInput where it would not.
    """
    files = [root / Path(archive.path).name for archive in source.archives]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".download.lock").open("w") as lock:  # two would write into one .part file
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for archive, file in zip(source.archives, files, strict=True):
                if _num_nonempty(root / archive.folder) < archive.num_files:
                    if not file.exists():
                        _fetch(f"{base_url.rstrip('/')}/{archive.path}", file)
                    _unpack(file, root)
    except BlockingIOError:
        raise BadInput(f"{root}: another download is writing here; wait for it") from None
    except OSError as error:
        raise BadInput(f"{root}: cannot be written ({error})") from None
    splits = _counted(source, root)
    for file in files if not keep_archives else ():
        file.unlink(missing_ok=True)
    return splits


def _counted(source: Source, root: Path) -> tuple:
    """Open the data as a run would; BadInput where a count is not its publisher's."""
    train, val = source.counts
    splits = source.open_splits(Data(root=str(root), train=train, val=val), 3)
    wrong = [
        f"{split.census.split}: {name} is {getattr(split.census, name):,} instead of {count:,}"
        for split, counts in zip(splits, source.counts.values(), strict=True)
        for name, count in counts.items() if getattr(split.census, name) != count
    ]
    if wrong:
        raise BadInput(f"{root}: {'; '.join(wrong)}. Move that folder and its archive away, rerun")
    return splits


def _fetch(url: str, file: Path) -> None:
    """Download `url` as `file` by way of `file`.part, which an earlier attempt may have begun."""
    part = file.with_name(f"{file.name}.part")
    failures, furthest = 0, _size(part)
    while problem := _receive(url, part):
        size = _size(part)  # a server that sends the same first half again makes no progress
        failures, furthest = 1 if size >= furthest + CHUNK else failures + 1, max(furthest, size)
        if failures > len(WAITS):
            raise ShakedownError(f"{url}: {problem}, {failures} times. The same command goes on")
        print(f"{file.name}: {problem}; again in {WAITS[failures - 1]} s", file=sys.stderr)
        time.sleep(WAITS[failures - 1])
    part.rename(file)


def _receive(url: str, part: Path) -> str | None:
    """One attempt to complete `part`; what went wrong, where another one may help."""
    # One byte more than is missing: to the empty range of a complete file servers' answers differ.
    start = max(_size(part) - 1, 0)
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urlopen(request, timeout=TIMEOUT) as response:
            return _store(response, url, part)
    except HTTPError as error:
        if error.code == 416:  # more is here than there
            part.unlink()
        elif error.code < 500 and error.code not in (408, 429):
            raise BadInput(f"{url}: HTTP {error.code} {error.reason}; see --base-url") from None
        return f"HTTP {error.code} {error.reason}"
    except (URLError, ConnectionError, TimeoutError, ssl.SSLError, HTTPException) as error:
        return f"connection failed ({getattr(error, 'reason', error)})"


def _store(response: HTTPResponse, url: str, part: Path) -> str | None:
    """Write the body where it belongs in `part`; what went wrong, where another try may help."""
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers["Content-Range"] or "")
    start, total = map(int, span.groups() if span else (0, response.headers["Content-Length"] or 0))
    chunk = response.read1(CHUNK)
    if start == 0 and not chunk.startswith(b"PK"[: len(chunk)]):  # before .part is overwritten
        raise BadInput(f"{url}: {response.headers.get_content_type()} in place of a zip, it begins "
                       f"{chunk[:100].decode('latin-1')!r}")
    if not total:
        raise BadInput(f"{url}: the answer does not say how long the file is (Content-Length)")
    if total == _size(part):
        return None
    # What an archive unpacks to is larger still, and both are there for a while.
    _need_space(part.parent, 2 * total - _size(part), f"{part.stem} and its content")
    progress = Progress(part.stem, start, total)
    with part.open("r+b" if start else "wb") as file:  # "wb": the server ignored the range
        done = file.seek(start)
        while chunk:
            done += file.write(chunk)
            progress.update(done)
            chunk = response.read1(min(CHUNK, total - done))
    return None if done == total else f"connection cut at {done:,} of {total:,} bytes"


def _unpack(archive: Path, root: Path) -> None:
    """Write what is not in `root` with its size yet; the CRC of each file is tested."""
    try:
        with ZipFile(archive) as zip_file:
            files = [member for member in zip_file.infolist() if not member.is_dir()]
            for path, mode in ((Path(file.filename), file.external_attr >> 16) for file in files):
                if path.is_absolute() or ".." in path.parts or stat.S_ISLNK(mode):
                    raise BadInput(f"{archive}: {path} in it leads elsewhere; nothing is unpacked")
            todo = [file for file in files if _size(root / file.filename) != file.file_size]
            size = sum(file.file_size for file in todo)
            _need_space(root, size, f"the {len(todo):,} files in {archive.name}")
            progress = Progress(f"unpacking {archive.name}", 0, size)
            for file in todo:
                target = root / file.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                hidden = target.with_name(f".{target.name}.part")  # no reader takes it for data
                with zip_file.open(file) as packed, hidden.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked)  # raises at its end where the CRC differs
                hidden.rename(target)
                progress.update(progress.done + file.file_size)
    except (BadZipFile, EOFError, zlib.error) as error:
        archive.unlink()
        raise BadInput(f"{archive}: damaged ({error}) and removed; run the same again") from None


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else -1  # bytes


def _num_nonempty(folder: Path) -> int:
    return sum(map(bool, files_below(folder).values())) if folder.is_dir() else 0


def _need_space(folder: Path, size: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise BadInput(f"{folder}: {what} need {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


class Progress:
    """Share done, rate, time left: one line redrawn on a terminal, a line every 10 s in a log."""

    def __init__(self, what: str, done: int, total: int):
        self.what, self.done, self.total = what, done, total  # bytes
        self._first, self._start, self._up = done, time.monotonic(), ""
        self._next = self._start + 1  # a rate over less says nothing

    def update(self, done: int) -> None:
        self.done, now, on_terminal = done, time.monotonic(), sys.stderr.isatty()
        if now < self._next and done < self.total:
            return
        self._next = now + (REDRAW_EVERY if on_terminal else LINE_EVERY)
        rate = max(done - self._first, 1) / max(now - self._start, 1e-9)  # bytes a second
        line = (f"{self.what}: {done / max(self.total, 1):.0%} of {self.total / 1e6:,.1f} MB, "
                f"{rate / 1e6:.1f} MB/s, {duration((self.total - done) / rate)} left")
        if on_terminal:  # each line ends, and the next one climbs back: nothing to close
            line = self._up + line[: shutil.get_terminal_size().columns - 1]
            self._up = "\x1b[A\x1b[K"
        print(line, file=sys.stderr, flush=True)
