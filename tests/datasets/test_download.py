"""Downloads against a real server on this machine that cuts, refuses and lies on demand."""

import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lib import cli
from lib.datasets import coco, download
from lib.datasets.download import Archive, Progress, Source
from lib.errors import BadInput, ShakedownError
from lib.params import ROOT

ANNOTATIONS = "/annotations/annotations_trainval2017.zip"
VAL, TRAIN = "/zips/val2017.zip", "/zips/train2017.zip"
TINY = Source(
    "http://127.0.0.1:9",  # nothing answers there: each test says where its server is
    (Archive(ANNOTATIONS[1:], "annotations", 2), Archive(VAL[1:], "val2017", 2),
     Archive(TRAIN[1:], "train2017", 5)),
    coco.open_splits,
    {"train2017": {"used": 5, "boxes_listed": 10}, "val2017": {"used": 2, "boxes_listed": 4}},
)


class Server(ThreadingHTTPServer):
    """Serves `files`; `faults` tells, per path, what the next requests meet instead."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(files)
        self.faults: dict[str, Iterator[str]] = {}
        self.requests: list[tuple[str, int, int]] = []  # path, first byte asked for, status
        self.sent = 0  # bytes of bodies

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, path: str) -> list[tuple[int, int]]:
        return [(start, status) for at, start, status in self.requests if at == path]

    def handle_error(self, request, client_address):
        """A client that went away is what some tests do."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self):
        body = self.server.files.get(self.path)
        fault = next(self.server.faults.get(self.path, iter(())), "")
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(asked[1]) if asked else 0
        if fault.isdigit() or body is None:
            return self.answer(int(fault or 404), start, b"no")
        if "html" in fault:
            page = b"<html><title>Please log in</title></html>"
            return self.answer(200, start, page, "text/html")
        if "no length" in fault:
            return self.answer(200, start, body, length=False)
        if "garbage" in fault:
            self.wfile.write(b"what is this\r\n\r\n")
            return self.close()
        if "hang" in fault:
            time.sleep(1)
            return self.close()
        if asked and start >= len(body) and "ignore" not in fault:
            return self.answer(416, start, b"")
        status = 206 if asked and "ignore" not in fault else 200
        kept = body[start if status == 206 else 0:]
        cut = len(kept) // 2 if "cut" in fault else None
        self.answer(status, start, kept, cut=cut, slow="slow" in fault)

    def answer(
        self, status, start, body, kind="application/zip", length=True, cut=None, slow=False
    ):
        self.server.requests.append((self.path, start, status))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if status == 206:
            total = start + len(body)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for at in range(0, len(body[:cut]), 500 if slow else 2**20):
            part = body[:cut][at: at + (500 if slow else 2**20)]
            self.wfile.write(part)
            self.server.sent += len(part)
            if slow:
                time.sleep(0.05)
        if cut is not None or not length:
            self.close()

    def close(self):
        self.close_connection = True

    def log_message(self, *arguments):
        """Quiet."""


def zipped(members: dict[str, bytes], method=zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.fixture(scope="module")
def archives() -> dict[str, bytes]:
    """COCO 2017 with seven pictures of noise, two boxes in each."""
    rng = np.random.default_rng(0)
    files, annotations = {}, {}
    for split, path, num_images in (("train2017", TRAIN, 5), ("val2017", VAL, 2)):
        pictures, images, boxes = {f"{split}/": b""}, [], []
        for i in range(num_images):
            picture, name = io.BytesIO(), f"{i:012}.jpg"
            noise = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
            noise.save(picture, "JPEG", quality=95)
            pictures[f"{split}/{name}"] = picture.getvalue()
            images.append({"id": i, "file_name": name, "width": 60, "height": 40})
            boxes += [{"id": 2 * i + k, "image_id": i, "category_id": 7, "bbox": [k, 2, 30, 20],
                       "area": 600, "iscrowd": 0} for k in range(2)]
        files[path] = zipped(pictures)
        annotations[f"annotations/instances_{split}.json"] = json.dumps({
            "images": images, "annotations": boxes, "categories": [{"id": 7, "name": "noise"}],
        }).encode()
    return {ANNOTATIONS: zipped(annotations, zipfile.ZIP_DEFLATED)} | files


@pytest.fixture
def server(archives, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "WAITS", (0, 0, 0))
    with Server(archives) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


def fetched(server: Server, root: Path, keep_archives: bool = False) -> tuple:
    return download.download(TINY, root, server.url, keep_archives)


def refused(server: Server, root: Path, error: type = BadInput) -> str:
    with pytest.raises(error) as caught:
        fetched(server, root)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


def visible(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*")
                  if path.is_file() and not path.name.startswith("."))


COMPLETE = sorted([
    "annotations/instances_train2017.json", "annotations/instances_val2017.json",
    *(f"train2017/{i:012}.jpg" for i in range(5)), *(f"val2017/{i:012}.jpg" for i in range(2)),
])


def test_all_of_it_arrives_once(server, tmp_path):
    train, val = fetched(server, tmp_path / "new" / "coco")
    assert (train.census.used, train.census.boxes_used, train.census.listed) == (5, 10, 5)
    assert (val.census.used, val.census.boxes_listed) == (2, 4)
    assert visible(tmp_path / "new" / "coco") == COMPLETE
    assert [path for path, _, _ in server.requests] == [ANNOTATIONS, VAL, TRAIN]
    with zipfile.ZipFile(io.BytesIO(server.files[TRAIN])) as archive:
        for name in archive.namelist()[1:]:
            assert (tmp_path / "new" / "coco" / name).read_bytes() == archive.read(name)
    fetched(server, tmp_path / "new" / "coco")
    assert len(server.requests) == 3, "what is complete is not asked for again"


def test_archives_are_kept_if_asked_for(server, tmp_path):
    fetched(server, tmp_path, keep_archives=True)
    for path in (ANNOTATIONS, VAL, TRAIN):
        assert (tmp_path / Path(path).name).read_bytes() == server.files[path]


def test_the_public_table_is_coco_2017():
    source = download.SOURCES["coco"]
    assert source.base_url == "http://images.cocodataset.org"
    assert {archive.path for archive in source.archives} == {ANNOTATIONS[1:], VAL[1:], TRAIN[1:]}
    assert {archive.folder: archive.num_files for archive in source.archives} == {
        "annotations": 6, "val2017": 5_000, "train2017": 118_287}
    assert list(source.counts) == ["train2017", "val2017"]
    assert source.counts["train2017"] == {"used": 118_287, "boxes_listed": 860_001}
    assert source.counts["val2017"] == {"used": 5_000, "boxes_listed": 36_781}


# --------------------------------------------------------------------------------------------
# Resuming
# --------------------------------------------------------------------------------------------


def test_a_cut_connection_is_gone_on_with(server, tmp_path, capsys):
    server.faults[TRAIN] = iter(["cut", "cut"])
    fetched(server, tmp_path)
    size = len(server.files[TRAIN])
    (first, _), (second, _), (third, _) = server.asked(TRAIN)
    assert first == 0 and second == size // 2 - 1 and second < third < size
    assert server.sent == sum(map(len, server.files.values())) + 2, "each byte once, and two again"
    assert f"connection cut at {size // 2:,} of {size:,} bytes" in capsys.readouterr().err


@pytest.mark.parametrize("ignores_range", [False, True])
@pytest.mark.parametrize("share", [0.4, 1.0, 1.2])
def test_what_an_earlier_command_left_is_used(server, tmp_path, capsys, share, ignores_range):
    """Part of it, all of it, and more than there is: that cannot be this file."""
    content = server.files[TRAIN]
    left = (content + bytes(len(content)))[: int(len(content) * share)]
    (tmp_path / "train2017.zip.part").write_bytes(left)
    server.faults[TRAIN] = iter(["ignore"] * ignores_range)
    fetched(server, tmp_path, keep_archives=True)
    assert (tmp_path / "train2017.zip").read_bytes() == content
    asked = server.asked(TRAIN)
    assert asked[0][0] == len(left) - 1
    statuses = [200] if ignores_range else [206] if share <= 1 else [416, 200]
    assert [status for _, status in asked] == statuses
    received = "\ntrain2017.zip: 100%" in capsys.readouterr().err
    assert received == (share != 1), "what is complete is not received again"


def test_an_archive_that_is_there_is_not_fetched(server, tmp_path):
    (tmp_path / "train2017.zip").write_bytes(server.files[TRAIN])
    fetched(server, tmp_path)
    assert not server.asked(TRAIN) and visible(tmp_path) == COMPLETE


def test_a_server_that_never_gets_past_its_half_is_given_up(server, tmp_path):
    server.faults[TRAIN] = repeat("cut ignore")
    message = refused(server, tmp_path, ShakedownError)
    assert "connection cut" in message and len(server.asked(TRAIN)) == 4
    part = tmp_path / "train2017.zip.part"
    assert part.read_bytes() == server.files[TRAIN][: len(server.files[TRAIN]) // 2]


def test_progress_renews_the_patience(server, tmp_path, monkeypatch):
    """Six cuts are more than three, but each brought a chunk that was not there."""
    monkeypatch.setattr(download, "CHUNK", 100)
    server.faults[TRAIN] = iter(["cut"] * 6)
    fetched(server, tmp_path)
    assert len(server.asked(TRAIN)) == 7


def test_unpacking_goes_on(server, tmp_path):
    """Files of the right size stay untouched, the others are written again."""
    good, bad, stale = (tmp_path / "train2017" / name for name in (
        "000000000000.jpg", "000000000001.jpg", ".000000000002.jpg.part"))
    good.parent.mkdir()
    with zipfile.ZipFile(io.BytesIO(server.files[TRAIN])) as archive:
        good.write_bytes(archive.read("train2017/000000000000.jpg"))
        content = archive.read("train2017/000000000001.jpg")
    bad.write_bytes(content[:-1])
    stale.write_bytes(b"half")
    os.utime(good, (1, 1))
    fetched(server, tmp_path)
    assert good.stat().st_mtime == 1 and bad.read_bytes() == content
    assert not list(tmp_path.rglob(".*.part"))


# --------------------------------------------------------------------------------------------
# What goes wrong is named
# --------------------------------------------------------------------------------------------


def test_a_missing_file_is_not_asked_for_twice(server, tmp_path):
    del server.files[VAL]
    message = refused(server, tmp_path)
    assert f"{server.url}{VAL}: HTTP 404 Not Found" in message and "--base-url" in message
    assert len(server.asked(VAL)) == 1


def test_a_busy_server_is_asked_again(server, tmp_path, capsys):
    server.faults[VAL] = iter(["503", "429"])
    fetched(server, tmp_path)
    assert [status for _, status in server.asked(VAL)] == [503, 429, 200]
    assert "HTTP 503 Service Unavailable; again in 0 s" in capsys.readouterr().err


def test_a_server_that_stays_busy_is_given_up(server, tmp_path, monkeypatch):
    server.faults[VAL] = repeat("503")
    waits = []
    monkeypatch.setattr(download, "WAITS", (1, 2, 4, 8, 16))
    monkeypatch.setattr(download.time, "sleep", waits.append)
    (tmp_path / "val2017.zip.part").write_bytes(b"PK\x03\x04 begun")
    assert "HTTP 503" in refused(server, tmp_path, ShakedownError)
    assert waits == [1, 2, 4, 8, 16] and len(server.asked(VAL)) == 6
    assert (tmp_path / "val2017.zip.part").read_bytes() == b"PK\x03\x04 begun"


def test_silence_is_a_failed_attempt(server, tmp_path, monkeypatch, capsys):
    assert download.TIMEOUT == 60
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.faults[VAL] = iter(["hang"])
    fetched(server, tmp_path)
    assert "connection failed (timed out)" in capsys.readouterr().err


def test_an_answer_that_is_no_http_is_a_failed_attempt(server, tmp_path, capsys):
    server.faults[VAL] = iter(["garbage"])
    fetched(server, tmp_path)
    assert "connection failed (what is this" in capsys.readouterr().err


def test_nobody_listening_is_named(tmp_path, server, monkeypatch):
    with pytest.raises(ShakedownError, match="connection failed.*refused"):
        download.download(TINY, tmp_path, "http://127.0.0.1:9", False)


def test_d13_a_page_in_place_of_an_archive_is_named(server, tmp_path):
    """And what had arrived before it is not overwritten."""
    begun = server.files[TRAIN][:1000]
    (tmp_path / "train2017.zip.part").write_bytes(begun)
    server.faults[TRAIN] = iter(["html"])
    message = refused(server, tmp_path)
    assert "text/html in place of a zip" in message and "Please log in" in message
    assert (tmp_path / "train2017.zip.part").read_bytes() == begun


def test_a_length_that_is_not_told_is_refused(server, tmp_path):
    server.faults[VAL] = iter(["no length"])
    assert "does not say how long" in refused(server, tmp_path)


def test_a_damaged_archive_is_removed_and_fetched_again(server, tmp_path):
    whole = server.files[TRAIN]
    middle = whole.index(b"\xff\xd8", len(whole) // 2) + 200  # inside a picture
    server.files[TRAIN] = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:]
    assert "damaged (Bad CRC-32" in refused(server, tmp_path)
    assert not (tmp_path / "train2017.zip").exists()
    assert 0 < sum(name.startswith("train2017/") for name in visible(tmp_path)) < 5
    server.files[TRAIN] = whole
    fetched(server, tmp_path)
    assert visible(tmp_path) == COMPLETE


def test_no_archive_at_all_is_removed(server, tmp_path):
    server.files[VAL] = b"PK, but nothing else of a zip"
    assert "damaged (File is not a zip file)" in refused(server, tmp_path)
    assert not list(tmp_path.glob("val2017*"))


@pytest.mark.parametrize("name", ["../outside", "val2017/../../outside", "/tmp/outside", "link"])
def test_an_archive_cannot_write_elsewhere(server, tmp_path, name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("val2017/first.jpg", b"picture")
        member = zipfile.ZipInfo(name)
        member.external_attr = 0o120777 << 16 if name == "link" else 0
        archive.writestr(member, "..")
    server.files[VAL] = file.getvalue()
    message = refused(server, tmp_path / "root")
    assert f"{name} in it leads elsewhere" in message
    assert not (tmp_path / "root" / "val2017").exists() and not (tmp_path / "outside").exists()


@pytest.mark.parametrize("unpacking", [False, True])
def test_a_disk_too_small_is_named_before_anything_is_written(
    server, tmp_path, monkeypatch, unpacking
):
    if unpacking:
        (tmp_path / "train2017.zip").write_bytes(server.files[TRAIN])
    size = len(server.files[TRAIN])
    free = size - 2000 if unpacking else 2 * size - 1
    monkeypatch.setattr(
        download.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(free))
    message = refused(server, tmp_path)
    assert "train2017.zip" in message and " need 0.0 GB, 0.0 GB are free" in message
    assert not (tmp_path / "train2017.zip.part").exists() and not (tmp_path / "train2017").exists()


def test_wrong_counts_are_named(server, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY.counts["train2017"], "used", 6)
        patch.setitem(TINY.counts["val2017"], "boxes_listed", 1_000)
        message = refused(server, tmp_path)
    assert "train2017: used is 5 instead of 6" in message
    assert "val2017: boxes_listed is 4 instead of 1,000" in message
    assert (tmp_path / "train2017.zip").exists(), "kept until everything is counted"
    fetched(server, tmp_path)
    assert not (tmp_path / "train2017.zip").exists() and len(server.requests) == 3


def test_a_lost_picture_is_fetched_again(server, tmp_path):
    """Also one that a power cut left empty."""
    fetched(server, tmp_path)
    (tmp_path / "val2017" / "000000000000.jpg").unlink()
    (tmp_path / "train2017" / "000000000003.jpg").write_bytes(b"")
    fetched(server, tmp_path)
    assert visible(tmp_path) == COMPLETE
    assert [path for path, _, _ in server.requests[3:]] == [VAL, TRAIN]


def test_two_downloads_into_one_folder_are_refused(server, tmp_path):
    with (tmp_path / ".download.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another download is writing here" in refused(server, tmp_path)
    fetched(server, tmp_path)


def test_a_root_that_is_a_file_is_named(server, tmp_path):
    (tmp_path / "root").write_text("in the way")
    assert "root: cannot be written" in refused(server, tmp_path / "root")


# --------------------------------------------------------------------------------------------
# Progress
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_terminal", [False, True])
def test_progress_says_share_rate_and_time_left(monkeypatch, capsys, on_terminal):
    now = [100.0]
    monkeypatch.setattr(download.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal)
    progress = Progress("train2017.zip", 5_000_000_000, 20_000_000_000)
    for _ in range(300):  # five minutes at 50 MB/s, resumed at a quarter
        now[0] += 1
        progress.update(progress.done + 50_000_000)
    printed = capsys.readouterr().err
    lines = printed.split("\n")[:-1]
    assert "train2017.zip: 100% of 20,000.0 MB, 50.0 MB/s, 0.0 s left" in lines[-1]
    if on_terminal:
        assert printed.count("\x1b[A\x1b[K") == len(lines) - 1 == 299
        assert "train2017.zip: 62% of 20,000.0 MB, 50.0 MB/s, 2 min 30 s left" in lines[149]
    else:
        assert "\x1b" not in printed and "\r" not in printed and len(lines) == 31
        assert lines[15] == "train2017.zip: 63% of 20,000.0 MB, 50.0 MB/s, 2 min 29 s left"


def test_a_narrow_terminal_gets_one_line(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    Progress("unpacking annotations_trainval2017.zip", 0, 1000).update(1000)
    assert len(capsys.readouterr().err) == 40


# --------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------


def test_command_prints_the_census(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(download.SOURCES, "coco", TINY)
    arguments = ["download", "coco", "--root", str(tmp_path / "coco"), "--base-url", server.url]
    assert cli.main([*arguments, "--keep-archives"]) == 0
    printed = capsys.readouterr().out
    assert "coco train2017: 5 of 5 pictures used, 10 of 10 boxes" in printed
    assert "coco val2017: 2 of 2 pictures used, 4 of 4 boxes" in printed
    assert (tmp_path / "coco" / "val2017.zip").exists()
    assert cli.main(arguments) == 0 and visible(tmp_path / "coco") == COMPLETE


@pytest.mark.parametrize("arguments, expected", [
    (["imagenot"], "choose from coco"),
    (["coco", "--base-url", "file:///etc"], "http:// or https://"),
])
def test_command_refuses_in_one_line(tmp_path, capsys, arguments, expected):
    assert cli.main(["download", *arguments, "--root", str(tmp_path / "x")]) == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1 and not (tmp_path / "x").exists()


def started(server: Server, root: Path, table: str = "") -> subprocess.Popen:
    """The command in a process of its own; `table` is code that replaces COCO's."""
    code = f"import sys; {table}; from lib import cli; sys.exit(cli.main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, "download", "coco", "--root", str(root), "--base-url",
         server.url],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"no_proxy": "*"},
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_has_arrived_and_exits_5(server, tmp_path, number):
    table = ("from tests.datasets import test_download as t; from lib.datasets import download; "
             "download.SOURCES['coco'] = t.TINY")
    part = tmp_path / "train2017.zip.part"
    server.faults[TRAIN] = iter(["slow"])
    command = started(server, tmp_path, table)
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size > 1000) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(command.pid, number)
    _, message = command.communicate(timeout=20)
    assert command.returncode == 5, message
    assert "the same command goes on" in message and "Traceback" not in message
    arrived = part.read_bytes()
    assert 1000 < len(arrived) < len(server.files[TRAIN])
    assert server.files[TRAIN].startswith(arrived)

    command = started(server, tmp_path, table)
    printed, message = command.communicate(timeout=20)
    assert command.returncode == 0, message
    assert server.asked(TRAIN)[-1] == (len(arrived) - 1, 206)
    assert "coco train2017: 5 of 5 pictures used" in printed and visible(tmp_path) == COMPLETE


def test_other_data_than_coco_exits_2(server, tmp_path):
    """The real table, from a mirror whose archives are whole and hold seven pictures."""
    command = started(server, tmp_path, "pass")
    _, message = command.communicate(timeout=20)
    assert command.returncode == 2
    assert "train2017: used is 5 instead of 118,287" in message and "Traceback" not in message
