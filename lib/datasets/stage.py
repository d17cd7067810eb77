"""A copy of a data set where it is read fast: memory or a local disk.

Each file is copied under a temporary name, hashed on the way, read back, compared and renamed, and
then noted in a journal. So a killed copy goes on where it was, a finished one is verified and used
again, and a changed source costs only the changed files.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import xxhash

from lib.errors import BadInput

FOLDER = "shakedown_stage"  # what stage makes at a target, and clean removes
JOURNAL = ".staged.jsonl"
NUM_THREADS = 16  # small files are waiting, not work
CHUNK = 4 << 20  # bytes
MEMORY = {"tmpfs", "ramfs"}
LOCAL = {"ext4", "xfs", "btrfs", "f2fs"}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # what writing raises where there is no room

Show = Callable[[str], None]
"""Takes the progress line, a few times a second."""


def print_line(line: str) -> None:
    """Over the line before, on standard error."""
    print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)


@dataclass
class Progress:
    """A line with the rate and the time left. Threads may add at once."""

    what: str
    total: int
    unit: str
    show: Show
    per_unit: int = 1

    def __post_init__(self):
        self.done, self.start, self.shown = 0, time.monotonic(), 0.0
        self.lock = threading.Lock()

    def add(self, count: int) -> None:
        with self.lock:
            self.done += count
            now = time.monotonic()
            if now - self.shown < 0.2 and self.done < self.total:
                return
            self.shown = now
            rate = max(self.done, 1) / max(now - self.start, 1e-3)
            done, total, per_second = (
                f"{n / self.per_unit:,.0f}" for n in (self.done, self.total, rate)
            )
            self.show(f"{self.what}: {done} of {total} {self.unit}, {per_second} {self.unit}/s, "
                      f"{(self.total - self.done) / rate:,.0f} s left")


# --------------------------------------------------------------------------------------------
# Where
# --------------------------------------------------------------------------------------------


def mounts() -> list[tuple[str, Path, str]]:
    """Device, mount point and file-system type of everything mounted, in order."""
    rows = (line.split() for line in Path("/proc/mounts").read_text().splitlines())
    unescape = re.compile(r"\\([0-7]{3})")  # a space is written \040
    return [
        (row[0], Path(unescape.sub(lambda m: chr(int(m[1], 8)), row[1])), row[2]) for row in rows
    ]


def file_system(path: Path) -> str:
    """The type of the file system that holds `path`, which need not exist yet."""
    path = path.resolve()
    around = [(len(point.parts), i, kind) for i, (_, point, kind) in enumerate(mounts())
              if path.is_relative_to(point)]
    return max(around)[2]  # the innermost; of two at one place the later


def memory() -> tuple[int, int]:
    """Total and available bytes, of the machine or of the container, whichever is less."""
    rows = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    total, available = int(rows["MemTotal"]) * 1024, int(rows["MemAvailable"]) * 1024
    groups = Path("/sys/fs/cgroup")
    for limit, used in (
        (groups / "memory.max", groups / "memory.current"),
        (groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes"),
    ):
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
            available = min(available, total - int(used.read_text()))
    return total, available


def places() -> list[Path]:
    """Where `auto` may stage: shared memory, then local solid-state disks by free space."""
    disks = {}
    for device, point, kind in mounts():
        block = Path("/sys/class/block") / Path(device).resolve().name
        queues = [q for q in (block / "queue", block.resolve().parent / "queue") if q.is_dir()]
        folder = Path("/var/tmp") if point == Path("/") else point
        if kind in LOCAL and queues and folder.is_dir() and os.access(folder, os.W_OK):
            if (queues[0] / "rotational").read_text().strip() == "0":
                disks.setdefault(device, folder)  # a container has one file of a disk mounted, too
    shared = [path for path in (Path("/dev/shm"),) if path.is_dir()]
    return shared + sorted(disks.values(), key=lambda path: -shutil.disk_usage(path).free)


def choose_target(num_bytes: int, source: Path) -> Path:
    """Shared memory if half of the memory stays free, else a local disk. Raises BadInput: none."""
    total, available = memory()
    device = source.stat().st_dev
    for place in places():
        if file_system(place) in MEMORY and available - num_bytes < total / 2:
            continue
        if place.stat().st_dev != device and shutil.disk_usage(place).free > num_bytes:
            return place
    raise BadInput(
        f"data.stage_to: auto finds no place for {num_bytes / 1e9:,.1f} GB: {available / 1e9:,.0f} "
        f"of {total / 1e9:,.0f} GB memory are available (half must stay), and no other local disk "
        "has room; train from where the data is, or pack it"
    )


# --------------------------------------------------------------------------------------------
# Copying
# --------------------------------------------------------------------------------------------


def stage(
    source: Path, target: Path | str, num_threads: int = NUM_THREADS, show: Show = print_line
) -> Path:
    """Copy the folder `source` below `target` ("auto": a place is chosen) and return the copy.

    Raises BadInput: a source that is missing or in memory already, a target without room. The
    source is only read.
    """
    source = Path(source)
    if not source.is_dir():
        raise BadInput(f"{source}: no such folder to stage; objects are streamed, which has its "
                       "own cache")
    if file_system(source) in MEMORY:
        raise BadInput(f"{source}: lies in memory already ({file_system(source)}); a second copy "
                       "would only take memory from the training: leave data.stage_to out")
    source = source.resolve()
    wanted = _listing(source)
    name = f"{source.name}-{xxhash.xxh3_64_hexdigest(os.fsencode(source))}"
    if target == "auto":  # where a copy is, or the part of one; else where there is room
        begun = [place for place in places() if (place / FOLDER / name).is_dir()]
        target = begun[0] if begun else choose_target(_bytes(wanted, wanted), source)
    home = Path(target).resolve() / FOLDER / name
    if home.is_relative_to(source):
        raise BadInput(f"{target}: lies inside {source}, which is to be staged")
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home):
        known = _read_journal(home)
        same = [name for name, entry in wanted.items() if known.get(name, ())[:2] == entry]
        kept: set[str] = set()
        progress = Progress(f"verifying {home.name}", _bytes(wanted, same), "MB", show, 10**6)

        def verify(name: str) -> None:
            if file_digest(home / name) == known[name][2]:
                kept.add(name)
            progress.add(wanted[name][0])

        _in_threads(verify, same, num_threads)
        for path in list(home.rglob("*")):  # what the source no longer has, what a kill left behind
            name = path.relative_to(home).as_posix()
            if path.is_file() and name != JOURNAL and name not in kept:
                path.unlink()
        missing = [name for name in wanted if name not in kept]
        _check_room(home, _bytes(wanted, missing), source)
        _copy_all(source, home, missing, wanted, num_threads, show)
    return home


def clean(target: Path | str) -> list[Path]:
    """Remove what `stage` made at `target` ("auto": wherever it may have); returns the copies."""
    removed = []
    for place in places() if target == "auto" else [Path(target)]:
        for journal in sorted((place / FOLDER).glob(f"*/{JOURNAL}")):
            with _locked(journal.parent):
                shutil.rmtree(journal.parent)
            removed.append(journal.parent)
        if (place / FOLDER).is_dir() and not any((place / FOLDER).iterdir()):
            (place / FOLDER).rmdir()
    return removed


Entry = tuple[int, int]  # size in bytes and modification time in ns of a file


def _listing(source: Path) -> dict[str, Entry]:
    """Every file of the source, by relative path."""
    found = {}
    for folder, _, names in os.walk(source, followlinks=True):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.exists(path):  # else a link to nothing
                status = os.stat(path)
                found[os.path.relpath(path, source)] = status.st_size, status.st_mtime_ns
    return dict(sorted(found.items()))


def _bytes(wanted: dict[str, Entry], names: Iterable[str]) -> int:
    return sum(wanted[name][0] for name in names)


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One process at a time; the next waits, and finds the copy made."""
    with (home / JOURNAL).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read_journal(home: Path) -> dict[str, tuple[int, int, str]]:
    """Size, modification time and digest of what was copied; the last entry of a name counts."""
    known = {}
    for line in (home / JOURNAL).read_text("utf-8").splitlines():
        try:
            name, *entry = json.loads(line)
        except ValueError:  # the line that a kill or a full disk cut short
            continue
        known[name] = tuple(entry)
    return known


def _check_room(home: Path, num_bytes: int, source: Path) -> None:
    free, kind = shutil.disk_usage(home).free, file_system(home)
    if kind in MEMORY:
        free = min(free, memory()[1])
    if num_bytes > free:
        raise BadInput(f"{source}: {num_bytes / 1e6:,.0f} MB to stage, {free / 1e6:,.0f} MB free "
                       f"on {kind} at {home.parents[1]}; choose another data.stage_to or pack the "
                       "data")


def _in_threads(work: Callable[[str], None], names: list[str], num_threads: int) -> None:
    """`work` on every name; the first error stops all threads and is raised."""
    queue, stop = iter(names), threading.Event()  # a list's iterator gives each name to one thread

    def run() -> None:
        for name in queue:
            if stop.is_set():
                return
            work(name)

    with ThreadPoolExecutor(num_threads, thread_name_prefix="stage") as pool:
        try:
            for thread in as_completed([pool.submit(run) for _ in range(num_threads)]):
                thread.result()
        finally:
            stop.set()


def _copy_all(
    source: Path, home: Path, names: list[str], wanted: dict[str, Entry], num_threads: int,
    show: Show,
) -> None:
    progress = Progress(f"staging {source.name}", _bytes(wanted, names), "MB", show, 10**6)
    lock = threading.Lock()

    def copy(name: str) -> None:
        digest = _copy(source / name, home / name, progress)
        with lock, (home / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps([name, *wanted[name], digest]) + "\n")

    try:
        for folder in {(home / name).parent for name in names}:
            folder.mkdir(parents=True, exist_ok=True)
        _in_threads(copy, names, num_threads)
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise BadInput(f"{home}: no room left ({error.strerror}) after {progress.done / 1e6:,.0f} "
                       f"of {progress.total / 1e6:,.0f} MB; free some and run the same again, it "
                       "goes on from there. The source is untouched") from None


def _copy(source: Path, dest: Path, progress: Progress) -> str:
    """Copy one file, whole or not at all; returns its digest. The copy is read back."""
    part = dest.with_name(f"{dest.name}.part")
    digest = xxhash.xxh3_128()
    try:
        with source.open("rb", buffering=0) as reader, part.open("wb") as writer:
            for chunk in _chunks(reader):
                digest.update(chunk)
                writer.write(chunk)
                progress.add(len(chunk))
            # What is copied need not be cached twice.
            os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if file_digest(part) != digest.hexdigest():
            raise BadInput(f"{part}: differs from {source} when read back: the disk or the memory "
                           "is faulty")
        part.rename(dest)
    finally:
        part.unlink(missing_ok=True)
    return digest.hexdigest()


def file_digest(path: Path) -> str | None:
    """xxh3 of a file; None: there is no such file."""
    if not path.is_file():
        return None
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as reader:
        for chunk in _chunks(reader):
            digest.update(chunk)
    return digest.hexdigest()


def _chunks(reader: FileIO) -> Iterator[memoryview]:
    """The file in parts that share one memory."""
    memory = memoryview(bytearray(min(CHUNK, os.fstat(reader.fileno()).st_size) + 1))
    while count := reader.readinto(memory):
        yield memory[:count]
