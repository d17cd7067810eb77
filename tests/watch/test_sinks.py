"""The copies of the records, made by their real process."""

import csv
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from lib import params as params_module
from lib.params import ROOT
from lib.run import Run, open_run, read_json
from lib.watch import sinks
from lib.watch.tail import CHUNK_BYTES, Tail, wall_clock_offset


@pytest.fixture(autouse=True)
def no_wandb_account(tmp_path, monkeypatch):
    """No key and no settings of whoever runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def make_run(tmp_path: Path, **logging: bool) -> Run:
    file = tmp_path / "params.yaml"
    file.write_text(json.dumps({"logging": {"csv": False, "tensorboard": False} | logging}))
    run = open_run(params_module.load(file), tmp_path / "run", owner="test")
    run.start("train")
    return run


def record_steps(run: Run, first: int, last: int) -> None:
    """Steps `first`..`last` of the train stage, an evaluation after each tenth."""
    for step in range(first, last + 1):
        run.record("step", step=step, loss=1 / step, lr=0.1, epoch=step / 10, images=8,
                   seconds=0.01, wait=0.001)
        if step % 10 == 0:
            run.record("eval", step=step, **{"val/top1": step / 100, "val/loss": 0.5}, seconds=0.1)
    run.flush()


def csv_rows(run: Run) -> list[dict]:
    with (run.path / "records.csv").open(newline="") as file:
        return list(csv.DictReader(file, strict=True))


def scalars_of(run: Run, tag: str) -> list:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    return events.Reload().Scalars(tag)


def leveldb_records(data: bytes) -> list[bytes]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    records, place, record = [], 7, b""
    while place < len(data):
        if 32768 - place % 32768 < 7:  # a block's end too small for a header
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            records.append(record)
            record = b""
    return records


def wandb_history(run: Run) -> list[list[tuple[int, dict]]]:
    """(step, values) of every row, of every offline run in the folder, oldest first."""
    from wandb.proto import wandb_internal_pb2

    runs = []
    for file in sorted((run.path / "wandb").glob("offline-run-*/*.wandb")):
        rows = []
        for data in leveldb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                values = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                rows.append((record.history.step.num, values))
        runs.append(rows)
    return runs


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.05)


def fake_wandb(tmp_path: Path, monkeypatch, body: str) -> None:
    """A `wandb` that the sinks' process imports in place of the real one."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(textwrap.dedent(body))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))


# -- following the file -----------------------------------------------------------------------


def test_tail_reads_each_record_once_and_no_torn_line(tmp_path):
    file = tmp_path / "records.jsonl"
    tail = Tail(file)
    assert tail.poll() == (False, [])
    file.write_text('{"kind": "step", "step": 1}\n{"kind": "st')
    assert tail.poll() == (False, [{"kind": "step", "step": 1}])
    assert tail.poll() == (False, [])
    with file.open("a") as stream:
        stream.write('ep", "step": 2}\n\x00garbage\n')
    assert tail.poll() == (False, [{"kind": "step", "step": 2}])


def test_tail_starts_over_only_where_the_file_is_another(tmp_path):
    file = tmp_path / "records.jsonl"
    lines = [json.dumps({"kind": "step", "step": n, "time": n / 7}) + "\n" for n in range(100)]
    file.write_text("".join(lines[:60]))
    tail = Tail(file)
    tail.poll()

    copy = tmp_path / "fetched"  # a fetch puts a longer copy in its place
    copy.write_text("".join(lines[:70]))
    os.replace(copy, file)
    restarted, rows = tail.poll()
    assert not restarted and [row["step"] for row in rows] == list(range(60, 70))

    file.write_text("".join(lines[:30]))  # a resume drops steps
    restarted, rows = tail.poll()
    assert restarted and [row["step"] for row in rows] == list(range(30))

    file.write_text("".join(lines[:20] + lines[30:90]))  # and may be longer again when looked at
    restarted, rows = tail.poll()
    assert restarted and len(rows) == 80


def test_tail_reads_a_bounded_piece_at_a_time(tmp_path):
    file = tmp_path / "records.jsonl"
    line = json.dumps({"kind": "step", "pad": "x" * 1000}) + "\n"
    file.write_text(line * 3000)
    tail = Tail(file)
    sizes = []
    while rows := tail.poll()[1]:
        sizes.append(len(rows))
    assert sum(sizes) == 3000 and max(sizes) <= CHUNK_BYTES / len(line)


def test_wall_clock_offset_is_the_write_time_of_the_last_record(tmp_path):
    file = tmp_path / "records.jsonl"
    file.write_text('{"kind": "step", "time": 5.0}\n{"kind": "step", "time": 8.0}\n{"kin')
    os.utime(file, (1000.0, 1000.0))
    assert wall_clock_offset(file) == 992.0


# -- CSV and TensorBoard ----------------------------------------------------------------------


def test_csv_and_tensorboard_hold_every_record(tmp_path):
    run = make_run(tmp_path, csv=True, tensorboard=True)
    began = time.time()
    handle = sinks.start(run)
    run.record("eval", stage="overfit", step=3, **{"overfit/top1": 1.0})
    record_steps(run, 1, 25)
    run.record("step", step=26, loss=float("nan"), lr=0.1)
    status = handle.finish()
    assert {name: entry["ok"] for name, entry in status.items()} == {
        "csv": True, "tensorboard": True,
    }

    rows = csv_rows(run)
    assert [int(row["step"]) for row in rows if row["kind"] == "step"] == list(range(1, 27))
    assert [(row["step"], row["val/top1"]) for row in rows if row["kind"] == "eval"] == [
        ("10", "0.1"), ("20", "0.2"),
    ]
    assert all(None not in row and None not in row.values() for row in rows)

    losses = scalars_of(run, "train/loss")
    assert [event.step for event in losses] == list(range(1, 27))
    assert losses[3].value == 0.25 and losses[-1].value != losses[-1].value
    assert all(began - 1 < event.wall_time < time.time() + 1 for event in losses)
    assert [event.value for event in scalars_of(run, "val/top1")] == pytest.approx([0.1, 0.2])
    assert scalars_of(run, "train/lr")[0].value == pytest.approx(0.1)


def test_csv_is_valid_at_every_moment(tmp_path):
    sink = sinks.CsvSink(Run(tmp_path), params_module.Params())
    header_and_row = []
    for step in range(1, 4):
        sink.write({"kind": "step", "stage": "train", "step": step, "loss": 1.0}, 0.0)
        sink.write({"kind": "eval", "stage": "train", "step": step, f"val/{step}": 0.5}, 0.0)
        with (tmp_path / "records.csv").open(newline="") as file:
            header_and_row.append({len(row) for row in csv.reader(file)})
    assert header_and_row == [{4}, {5}, {6}]


def test_a_resume_that_drops_steps_leaves_no_trace_of_them(tmp_path):
    run = make_run(tmp_path, csv=True, tensorboard=True)
    handle = sinks.start(run)
    record_steps(run, 1, 30)
    wait_for(lambda: (run.path / "records.csv").exists() and len(csv_rows(run)) == 33)
    run.rewind_records("train", 20)
    wait_for(lambda: len(csv_rows(run)) == 22)
    record_steps(run, 21, 25)
    handle.finish()
    assert [int(row["step"]) for row in csv_rows(run) if row["kind"] == "step"] == [*range(1, 26)]
    assert [event.step for event in scalars_of(run, "train/loss")] == list(range(1, 26))

    handle = sinks.start(run)  # and so does a second process, after a crash of the first
    record_steps(run, 26, 28)
    handle.finish()
    assert len(list((run.path / "tensorboard").iterdir())) == 1
    assert [event.step for event in scalars_of(run, "train/loss")] == list(range(1, 29))
    assert [int(row["step"]) for row in csv_rows(run) if row["kind"] == "step"] == [*range(1, 29)]


# -- Weights & Biases -------------------------------------------------------------------------


def test_wandb_without_a_key_logs_offline_and_goes_on_after_a_resume(tmp_path):
    run = make_run(tmp_path, wandb=True)
    handle = sinks.start(run)
    record_steps(run, 1, 20)
    began = time.monotonic()
    first = handle.finish()["wandb"]
    assert time.monotonic() - began < 45
    assert first["ok"] and first["mode"] == "offline", first
    assert first["sync"].startswith("wandb sync ") and first["id"] in first["sync"]

    run.rewind_records("train", 15)  # steps 16 to 20 are done again; W&B has them
    handle = sinks.start(run)
    record_steps(run, 16, 30)
    second = handle.finish()["wandb"]
    assert second["ok"] and second["id"] == first["id"]

    before, after = wandb_history(run)
    assert [step for step, _ in before] == list(range(1, 21))
    assert [step for step, _ in after] == list(range(21, 31))
    assert before[9][1]["train/loss"] == 0.1 and before[9][1]["val/top1"] == 0.1
    assert after[9][1]["val/top1"] == 0.3


def test_wandb_goes_online_only_with_a_key_and_an_answer(tmp_path, monkeypatch):
    import socket

    assert not sinks.wandb_key_present()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert sinks.wandb_key_present()
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
    assert not sinks.wandb_key_present()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert sinks.wandb_key_present()

    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", url)
        assert sinks.wandb_host_answers()
        monkeypatch.setenv("WANDB_BASE_URL", "http://host.invalid:1")
        monkeypatch.setenv("http_proxy", url)  # only the proxy can be reached
        assert sinks.wandb_host_answers()
    assert not sinks.wandb_host_answers()


def test_a_host_that_swallows_everything_takes_two_seconds(monkeypatch):
    import socket

    def swallow(*args, **kwargs):
        time.sleep(5)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", swallow)
    began = time.monotonic()
    assert not sinks.wandb_host_answers()
    assert time.monotonic() - began < sinks.PROBE_SECONDS + 0.5


# -- one that fails ---------------------------------------------------------------------------


@pytest.mark.parametrize("body, error", [
    ("raise ImportError('no such backend')", "ImportError: no such backend"),
    ("raise SystemExit(3)", "SystemExit: 3"),
    ("""
     class Run:
         resumed = False
         def log(self, values, step): raise OSError('disk full')
     def init(**settings): return Run()
     def Settings(**settings): return settings
     """, "OSError: disk full"),
])
def test_a_sink_that_raises_leaves_the_others_whole(tmp_path, monkeypatch, body, error):
    fake_wandb(tmp_path, monkeypatch, body)
    run = make_run(tmp_path, csv=True, tensorboard=True, wandb=True)
    handle = sinks.start(run)
    record_steps(run, 1, 20)
    status = handle.finish()
    assert not status["wandb"]["ok"] and status["wandb"]["error"] == error
    assert error.split(": ")[1] in (run.path / "sinks.log").read_text()
    assert status["csv"]["ok"] and len(csv_rows(run)) == 22
    assert status["tensorboard"]["ok"] and len(scalars_of(run, "train/loss")) == 20


def test_a_sink_that_hangs_leaves_the_others_whole_and_the_end_bounded(tmp_path, monkeypatch):
    fake_wandb(tmp_path, monkeypatch, "import time\ntime.sleep(600)")
    run = make_run(tmp_path, csv=True, tensorboard=True, wandb=True)
    handle = sinks.start(run)
    record_steps(run, 1, 20)
    def rows_written() -> list:
        status = read_json(run.path / "sinks.json") or {}
        return [status.get(name, {}).get("rows") for name in ("csv", "tensorboard")]

    wait_for(lambda: rows_written() == [23, 23])  # the stage's start and 20 steps, 2 evaluations
    began = time.monotonic()
    status = handle.finish(timeout_seconds=3)
    assert time.monotonic() - began < 8
    assert handle.process.poll() is not None
    assert not status["wandb"]["ok"] and "stopped after 3 s" in status["wandb"]["error"]
    assert status["csv"]["ok"] and len(csv_rows(run)) == 22
    assert status["tensorboard"]["ok"] and len(scalars_of(run, "train/loss")) == 20


def test_a_process_that_never_starts_is_told(tmp_path):
    run = make_run(tmp_path, csv=True)
    handle = sinks.start(run)
    handle.process.kill()
    status = handle.finish()
    assert not status["csv"]["ok"] and "not started" in status["csv"]["error"]


def test_nothing_wanted_starts_nothing(tmp_path):
    handle = sinks.start(make_run(tmp_path))
    assert handle.process is None and handle.finish() == {}


# -- the process ------------------------------------------------------------------------------


def test_a_killed_trainer_leaves_whole_copies_and_no_process(tmp_path):
    run = make_run(tmp_path, csv=True, tensorboard=True)
    run.close_records()
    run.unlock()
    trainer = tmp_path / "trainer.py"
    trainer.write_text(textwrap.dedent("""
        import os, sys, time
        from lib.run import Run
        from lib.watch import sinks
        run = Run(sys.argv[1])
        handle = sinks.start(run)
        if os.fork() == 0:  # a worker that outlives the trainer holds the pipe open
            time.sleep(60)
            os._exit(0)
        run._stage = "train"
        for step in range(1, 501):
            run.record("step", step=step, loss=1.0)
        run.flush()
        print(handle.process.pid, flush=True)
        time.sleep(600)
    """))
    process = subprocess.Popen(
        [sys.executable, str(trainer), str(run.path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
    )
    child = psutil.Process(int(process.stdout.readline()))
    assert os.getsid(child.pid) == child.pid and child.is_running()
    wait_for(lambda: child.nice() == sinks.NICENESS)
    process.kill()
    process.wait()
    try:
        wait_for(  # less than the worker's 60 s; the copier is niced, and others may be busy
            lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, seconds=50
        )
        assert len(csv_rows(run)) == 500
        assert len(scalars_of(run, "train/loss")) == 500
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the worker


def test_starting_takes_the_trainer_no_time(tmp_path):
    run = make_run(tmp_path, csv=True)
    began = time.monotonic()
    handle = sinks.start(run)
    assert time.monotonic() - began < 0.5
    assert handle.finish()["csv"]["ok"]


def test_the_sinks_never_load_torch():
    code = (
        "import sys, tempfile; from lib import params; from lib.run import Run;"
        "from lib.watch import sinks; from pathlib import Path;"
        "sinks.TensorBoardSink(Run(tempfile.mkdtemp()), params.Params()).close();"
        "assert not {'torch', 'tensorflow', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
