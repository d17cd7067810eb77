"""Staging: a verified copy, whatever happens on the way, and a source that is only read."""

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lib.datasets import stage as stage_module
from lib.datasets.stage import (
    FOLDER,
    JOURNAL,
    MEMORY,
    choose_target,
    clean,
    file_system,
    memory,
    places,
    stage,
)
from lib.errors import BadInput
from lib.params import ROOT


def quiet(line: str) -> None:
    pass


@pytest.fixture
def folder(tmp_path):
    """A folder on a disk: a source in memory is refused, and /tmp may be memory."""
    if file_system(tmp_path) not in MEMORY:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        yield Path(name)


def write_files(root: Path, count: int = 20, num_bytes: int = 50_000) -> Path:
    rng = np.random.default_rng(0)
    for number in range(count):
        path = root / ("train", "val")[number % 2] / f"class {number % 3}" / f"{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.bytes(num_bytes + number))
    (root / "empty.txt").touch()
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(root.rglob("*")) if path.is_file() and path.name != JOURNAL}


def states(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every file: what a second copy would change."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in root.rglob("*.bin")}


def test_copy_is_the_source(folder):
    source = write_files(folder / "data")
    copy = stage(source, folder / "fast", show=quiet)
    assert copy.is_relative_to(folder / "fast" / FOLDER)
    assert contents(copy) == contents(source) and len(contents(copy)) == 21


def test_links_are_followed_and_dead_ones_left_out(folder):
    source = write_files(folder / "data", 2)
    other = write_files(folder / "elsewhere", 2)
    (source / "linked").symlink_to(other)
    (source / "dead").symlink_to(folder / "nothing")
    copy = stage(source, folder / "fast", show=quiet)
    assert contents(copy / "linked") == contents(other)
    assert not (copy / "dead").exists() and not (copy / "linked").is_symlink()


def test_copy_that_is_there_and_right_is_used_again(folder):
    source = write_files(folder / "data")
    copy = stage(source, folder / "fast", show=quiet)
    before = states(copy)
    assert stage(source, folder / "fast", show=quiet) == copy
    assert states(copy) == before


def test_only_what_differs_is_copied_again(folder):
    """A bit that flipped in the copy, a file changed, a file more and a file less in the source."""
    source = write_files(folder / "data")
    copy = stage(source, folder / "fast", show=quiet)
    before = states(copy)
    flipped = copy / "train" / "class 0" / "0.bin"
    content = bytearray(flipped.read_bytes())
    content[1000] ^= 1
    flipped.write_bytes(content)
    (source / "val" / "class 1" / "1.bin").write_bytes(b"other content")
    (source / "more.bin").write_bytes(b"more")
    (source / "train" / "class 2" / "2.bin").unlink()
    stage(source, folder / "fast", show=quiet)
    assert contents(copy) == contents(source)
    after = states(copy)
    assert {name for name in before if after.get(name) != before[name]} == {
        "0.bin", "1.bin", "2.bin"}


def test_two_folders_of_one_name_do_not_share_a_copy(folder):
    one, two = write_files(folder / "a" / "data", 3), write_files(folder / "b" / "data", 5)
    copies = [stage(source, folder / "fast", show=quiet) for source in (one, two)]
    assert [contents(copy) for copy in copies] == [contents(one), contents(two)]


def test_the_source_is_not_kept_in_memory_twice(folder, monkeypatch):
    """Every file of the source is given back to the kernel, none before it was read."""
    source = write_files(folder / "data", 4)
    told = []
    real = os.posix_fadvise
    monkeypatch.setattr(
        os, "posix_fadvise",
        lambda fd, *rest: told.append((os.readlink(f"/proc/self/fd/{fd}"), *rest))
        or real(fd, *rest),
    )
    stage(source, folder / "fast", show=quiet)
    assert {name for name, *_ in told} == {
        str(path.resolve()) for path in source.rglob("*") if path.is_file()}
    assert {tuple(rest) for _, *rest in told} == {(0, 0, os.POSIX_FADV_DONTNEED)}


# -- stopped, at once, full ------------------------------------------------------------------------

KILLED = """
import sys
from pathlib import Path
from lib.datasets.stage import stage
stage(Path(sys.argv[1]), sys.argv[2], num_threads=1, show=lambda line: None)
"""


def test_killed_copy_goes_on_where_it_was(folder):
    source = write_files(folder / "data", 40, 2_000_000)
    process = subprocess.Popen([sys.executable, "-c", KILLED, source, folder / "fast"],
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    while True:
        journals = list((folder / "fast").glob(f"*/*/{JOURNAL}"))
        if journals and journals[0].read_text().count("\n") >= 5:
            break
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    home = journals[0].parent
    done = journals[0].read_text().count("\n")
    assert 5 <= done < 41
    (home / "train" / "left.part").write_bytes(b"half")  # as a kill within a write leaves it
    before = states(home)
    assert stage(source, folder / "fast", show=quiet) == home
    assert contents(home) == contents(source)
    after = states(home)
    kept = sum(after[name] == state for name, state in before.items())
    assert kept >= done - 1


def test_two_at_once_make_one_copy(folder):
    """As the processes of one machine do: the second waits and finds it made."""
    source = write_files(folder / "data", 30)
    copies, copied = [], []
    real = stage_module._copy
    stage_module._copy = lambda *args: copied.append(args[0]) or real(*args)
    try:
        threads = [
            threading.Thread(target=lambda: copies.append(stage(source, folder / "fast", 2, quiet)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stage_module._copy = real
    assert len(set(copies)) == 1 and len(copies) == 2
    assert len(copied) == 31 and contents(copies[0]) == contents(source)


def test_full_disk_is_said_and_space_lets_it_go_on(folder):
    source = write_files(folder / "data", 10)
    (source / "large.bin").write_bytes(bytes(3_000_000))
    before = contents(source)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        with pytest.raises(BadInput, match="no room left") as caught:
            stage(source, folder / "fast", show=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert str(folder / "fast") in str(caught.value)
    assert not list((folder / "fast").rglob("*.part"))
    assert contents(source) == before
    assert contents(stage(source, folder / "fast", show=quiet)) == before


@pytest.fixture
def small_disk(folder):
    """A file system of 1 MB, where this user may mount one."""
    place = folder / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_what_does_not_fit_is_refused_before_a_byte_is_copied(folder, small_disk):
    source = write_files(folder / "data", 30)
    with pytest.raises(BadInput, match="2 MB to stage, 1 MB free on tmpfs") as caught:
        stage(source, small_disk, show=quiet)
    assert str(source) in str(caught.value) and str(small_disk) in str(caught.value)
    assert not list(small_disk.rglob("*.bin"))


def test_disk_that_fills_up_meanwhile(folder, small_disk, monkeypatch):
    source = write_files(folder / "data", 30)
    monkeypatch.setattr(stage_module, "_check_room", lambda *args: None)
    with pytest.raises(BadInput, match=os.strerror(errno.ENOSPC)):
        stage(source, small_disk, show=quiet)
    monkeypatch.undo()
    assert len(contents(source)) == 31


# -- where -----------------------------------------------------------------------------------------


def test_source_in_memory_is_refused(folder, small_disk):
    source = write_files(small_disk / "data", 2)
    with pytest.raises(BadInput, match="in memory already"):
        stage(source, folder / "fast", show=quiet)
    assert not (folder / "fast").exists()


@pytest.mark.parametrize("source", ["s3://bucket/data", "nowhere"])
def test_source_that_is_no_folder_is_refused(folder, source):
    with pytest.raises(BadInput, match="no such folder to stage"):
        stage(source, folder / "fast", show=quiet)


def test_target_inside_the_source_is_refused(folder):
    source = write_files(folder / "data", 2)
    with pytest.raises(BadInput, match="inside"):
        stage(source, source / "fast", show=quiet)


def test_file_systems_are_those_the_kernel_says(folder, small_disk):
    assert file_system(small_disk / "not" / "there" / "yet") == "tmpfs"
    assert file_system(Path("/proc/self")) == "proc"
    found = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True)
    assert file_system(folder).startswith(found.stdout.split("/")[0].strip()[:3])


def test_auto_takes_memory_only_while_half_of_it_stays_free(folder, monkeypatch):
    total, available = memory()
    assert 0 < available <= total
    shared = places()[0]
    assert shared == Path("/dev/shm") and file_system(shared) in MEMORY
    monkeypatch.setattr(stage_module, "memory", lambda: (1000 * 2**20, 800 * 2**20))
    assert choose_target(200 * 2**20, folder) == shared
    monkeypatch.setattr(stage_module, "places", lambda: [shared])
    with pytest.raises(BadInput, match="auto finds no place for 0.4 GB"):
        choose_target(400 * 2**20, folder)


def test_auto_takes_another_disk_but_never_the_sources_own(folder, small_disk, monkeypatch):
    monkeypatch.setattr(stage_module, "places", lambda: [folder, small_disk])
    monkeypatch.setattr(stage_module, "memory", lambda: (2**40, 2**40))
    assert choose_target(1000, folder) == small_disk
    with pytest.raises(BadInput, match="no place"):
        choose_target(2_000_000, folder)


def test_auto_finds_its_copy_again_though_that_now_takes_the_room(folder, small_disk, monkeypatch):
    monkeypatch.setattr(stage_module, "places", lambda: [folder, small_disk])
    source = write_files(folder / "data", 10)
    copy = stage(source, "auto", show=quiet)
    assert copy.is_relative_to(small_disk)
    before = states(copy)
    (small_disk / "more").write_bytes(bytes(300_000))
    assert stage(source, "auto", show=quiet) == copy and states(copy) == before
    assert clean("auto") == [copy] and (small_disk / "more").exists()


def test_clean_removes_what_was_staged_and_nothing_else(folder):
    sources = [write_files(folder / name, 3) for name in ("one", "two")]
    copies = [stage(source, folder / "fast", show=quiet) for source in sources]
    (folder / "fast" / "mine.txt").write_text("x")
    (folder / "fast" / FOLDER / "not staged").mkdir()
    assert clean(folder / "fast") == sorted(copies)
    assert not any(copy.exists() for copy in copies)
    assert (folder / "fast" / "mine.txt").exists()
    assert (folder / "fast" / FOLDER / "not staged").is_dir()
    (folder / "fast" / FOLDER / "not staged").rmdir()
    assert clean(folder / "fast") == [] and not (folder / "fast" / FOLDER).exists()
    assert all(len(contents(source)) == 4 for source in sources)


def test_progress_says_how_far_how_fast_and_how_long(folder):
    lines = []
    stage(write_files(folder / "data", 4, 1_000_000), folder / "fast", show=lines.append)
    assert lines[-1].startswith("staging data: 4 of 4 MB, ") and lines[-1].endswith(" s left")
