"""Copies of records.jsonl for other tools: CSV, TensorBoard, Weights & Biases.

They are written by a process of their own, `python -m lib.watch.sinks RUN_DIR`, which follows the
records until its standard input closes; each copy has its own thread. So nothing that a tool does
(fail, hang, wait for the network) reaches the training or another copy. What became of each is in
sinks.json, and what went wrong in sinks.log.
"""

import csv
import hashlib
import logging
import netrc
import os
import queue
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from lib import params as params_module
from lib.params import ROOT, Params
from lib.run import Run, read_json, write_json
from lib.watch.tail import Tail, wall_clock_offset

POLL_SECONDS = 0.5
"""Seconds between looks at the records."""

DRAIN_SECONDS = 60.0
"""Most seconds the copies get to finish once the training process is gone."""

PROBE_SECONDS = 2.0
"""Most seconds the W&B host gets to answer; else the run is logged offline."""

INIT_SECONDS = 20.0
"""Most seconds an online wandb.init gets; else the run is logged offline."""

NICENESS = 10
"""How far the process stands back behind the training for the processor."""

NOT_SCALARS = ("kind", "stage", "step", "time")

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """One copy of the records."""

    def write(self, row: dict, wall_time: float) -> None:
        """Take one record; `wall_time` is when it was made, in Unix seconds."""

    def restart(self) -> None:
        """The records were rewritten and come again from their beginning."""

    def close(self) -> None:
        """All records were written."""

    def facts(self) -> dict[str, Any]:
        """What a later process or a person needs to know of this copy."""


def scalars(row: dict) -> dict[str, float]:
    """A step or eval record as {tag: number}: train/loss, val/top1, overfit/loss.

    Evaluations of the train stage keep their names; those of other stages carry the stage.
    """
    tags = {}
    for name, value in row.items():
        if name in NOT_SCALARS or isinstance(value, bool):
            continue
        try:
            number = float(value)  # "nan" and "inf" too, which the records hold by name
        except (TypeError, ValueError):
            continue
        if row["kind"] == "eval" and "/" not in name:
            name = f"val/{name}"
        in_train_eval = row["kind"] == "eval" and row["stage"] == "train"
        tags[name if in_train_eval else f"{row['stage']}/{name}"] = number
    return tags


# --------------------------------------------------------------------------------------------
# The copies
# --------------------------------------------------------------------------------------------


class CsvSink:
    """records.csv: step and eval records of the train stage, a column a value.

    A column that first appears later (the first evaluation's metrics) rewrites the file with it,
    so what is there is a valid table at any moment.
    """

    def __init__(self, run: Run, params: Params):
        self.path = run.path / "records.csv"
        self.restart()

    def restart(self) -> None:
        self._columns: list[str] = []
        self._file = self.path.open("w", newline="", encoding="utf-8", buffering=1)

    def write(self, row: dict, wall_time: float) -> None:
        if row["stage"] != "train" or row["kind"] not in ("step", "eval"):
            return
        values = {name: value for name, value in row.items() if name != "stage"}
        new = [name for name in values if name not in self._columns]
        if new:
            self._add_columns(new)
        csv.writer(self._file).writerow([values.get(name, "") for name in self._columns])

    def _add_columns(self, new: list[str]) -> None:
        self._file.close()
        self._columns += new
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with self.path.open(newline="", encoding="utf-8") as old, \
                temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self._columns)
            rows = csv.reader(old)
            next(rows, None)
            writer.writerows([*row, *[""] * len(new)] for row in rows)
        os.replace(temporary, self.path)
        self._file = self.path.open("a", newline="", encoding="utf-8", buffering=1)

    def close(self) -> None:
        self._file.close()

    def facts(self) -> dict[str, Any]:
        return {"path": self.path.name}


class TensorBoardSink:
    """tensorboard/: scalars of all stages, at their step and the time they were made.

    The folder is a copy of the records: it is written anew when they are.
    """

    def __init__(self, run: Run, params: Params):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._writer_class = Event, Summary, EventFileWriter
        self._session_start = SessionLog(status=SessionLog.START)
        self.folder = run.path / "tensorboard"
        self._open()

    def _open(self) -> None:
        for old in self.folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = self._writer_class(str(self.folder), flush_secs=5)
        # Tells a TensorBoard that is open on this folder to forget what it read before.
        self._writer.add_event(
            self._event(wall_time=time.time(), step=0, session_log=self._session_start)
        )

    def restart(self) -> None:
        self._writer.close()
        self._open()

    def write(self, row: dict, wall_time: float) -> None:
        if row["kind"] not in ("step", "eval"):
            return
        values = [
            self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars(row).items()
        ]
        self._writer.add_event(self._event(
            wall_time=wall_time, step=row["step"], summary=self._summary(value=values)
        ))

    def close(self) -> None:
        self._writer.close()

    def facts(self) -> dict[str, Any]:
        return {"path": self.folder.name, "show": shlex.join(
            ["tensorboard", "--logdir", str(self.folder)]
        )}


class WandbSink:
    """wandb/: the train stage as one Weights & Biases run.

    Online where there is an API key and the host answers, else offline, to be synced later. The
    run's id and the last step logged stay in sinks.json: a resumed run goes on in the same W&B run
    and steps that W&B already has, which it could not take back, are left out.
    """

    def __init__(self, run: Run, params: Params):
        os.environ |= {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
        import wandb

        before = (read_json(run.path / "sinks.json") or {}).get("wandb", {})
        self._path = run.path
        self._id = before.get("id") or _run_id(run, params)
        self._last = {"step": 0, "eval": 0} | before.get("last", {})
        online = wandb_key_present() and wandb_host_answers()
        try:
            self._run = self._init(wandb, run, params, "online" if online else "offline")
        except Exception as error:
            if not online:
                raise
            logger.warning("wandb: online failed, so logging offline: %s", error)
            wandb.teardown()  # its service still holds the id
            self._run = self._init(wandb, run, params, "offline")
        if self._run.resumed:
            self._last = {
                kind: max(step, self._run.starting_step - 1) for kind, step in self._last.items()
            }

    def _init(self, wandb, run: Run, params: Params, mode: str):
        self._mode = mode
        return wandb.init(
            project=params.logging.wandb_project,
            name=run.name,
            id=self._id,
            resume="allow" if mode == "online" else None,
            dir=run.path,
            config=params_module.flatten(params),
            mode=mode,
            # No git facts: a remote's address may hold a token; the manifest has the commit.
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, save_code=False,
                init_timeout=INIT_SECONDS,
            ),
        )

    def restart(self) -> None:
        pass  # `write` leaves out what was logged

    def write(self, row: dict, wall_time: float) -> None:
        kind, step = row["kind"], row.get("step")
        if row["stage"] != "train" or kind not in self._last or step <= self._last[kind]:
            return
        self._run.log(scalars(row), step=step)
        self._last[kind] = step

    def close(self) -> None:
        self._run.finish()

    def facts(self) -> dict[str, Any]:
        facts = {"mode": self._mode, "id": self._id, "last": dict(self._last)}
        if self._mode == "offline":
            folders = shlex.quote(str(self._path / "wandb")) + f"/offline-run-*-{self._id}"
            facts["sync"] = f"wandb sync {folders}"
        return facts


def _run_id(run: Run, params: Params) -> str:
    """An id for a run folder's first W&B run; one made anew at the same path is another run."""
    of = f"{run.path.resolve()} {params_module.digest(params)} {time.time_ns()}"
    return hashlib.sha256(of.encode()).hexdigest()[:12]


def _wandb_host() -> str:
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def wandb_key_present() -> bool:
    """Whether the environment or the netrc file holds an API key; it is not read any further."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    file = os.environ.get("NETRC") or Path.home() / ".netrc"
    try:
        return netrc.netrc(file).authenticators(urlsplit(_wandb_host()).hostname) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb_host_answers() -> bool:
    """Whether the W&B host, or the proxy on the way to it, takes a connection soon enough."""
    host = urlsplit(_wandb_host())
    proxy = urllib.request.getproxies().get(host.scheme)
    if proxy and not urllib.request.proxy_bypass(host.hostname):
        host = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = host.port or {"http": 80, "https": 443}.get(host.scheme, 443)
    answered = threading.Event()

    def probe() -> None:
        try:
            with socket.create_connection((host.hostname, port), timeout=PROBE_SECONDS):
                answered.set()
        except OSError:
            pass

    # A thread, since looking up a name has no timeout of its own.
    threading.Thread(target=probe, daemon=True).start()
    return answered.wait(PROBE_SECONDS)


SINKS: dict[str, type] = {"csv": CsvSink, "tensorboard": TensorBoardSink, "wandb": WandbSink}


def wanted(params: Params) -> list[str]:
    """Names of the copies that the params ask for."""
    return [name for name in SINKS if getattr(params.logging, name)]


# --------------------------------------------------------------------------------------------
# Their process
# --------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """One copy, made and written in a thread of its own."""

    name: str
    run: Run
    params: Params
    state: str = "starting"
    """starting, running, finished, failed."""
    error: str | None = None
    num_rows: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pieces: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name=self.name).start()

    def _work(self) -> None:
        try:
            sink: Sink = SINKS[self.name](self.run, self.params)
            self.facts = sink.facts()
            self.state = "running"
            while (piece := self.pieces.get()) is not None:
                restarted, rows, wall_clock = piece
                if restarted:
                    sink.restart()
                    self.num_rows = 0
                for row in rows:
                    sink.write(row, row["time"] + wall_clock)
                self.num_rows += len(rows)
                self.facts = sink.facts()
            sink.close()
            self.state = "finished"
        except BaseException as error:  # also SystemExit of a library: it ends this copy only
            logger.exception("%s: ended early", self.name)
            self.error = f"{type(error).__name__}: {error}"
            self.state = "failed"

    def status(self) -> dict[str, Any]:
        return {"state": self.state, "error": self.error, "rows": self.num_rows} | self.facts


def _lasting(facts: dict[str, Any]) -> dict[str, Any]:
    """What of an earlier process's facts holds even where its successor never gets to start."""
    return {name: facts[name] for name in ("id", "last") if name in facts}


def follow(run: Run) -> None:
    """Write the copies until standard input closes or the parent is gone, then drain them."""
    params = run.params()
    parent = os.getppid()
    before = read_json(run.path / "sinks.json") or {}
    workers = [
        Worker(name, run, params, facts=_lasting(before.get(name, {}))) for name in wanted(params)
    ]
    tail = Tail(run.records_file)
    written: dict = {}

    def publish() -> None:
        nonlocal written
        status = {"pid": os.getpid()} | {worker.name: worker.status() for worker in workers}
        if status != written:
            write_json(run.path / "sinks.json", status)
            written = status

    ended = False
    while not ended:
        # Closed input is readable. Another process may hold the pipe after our parent's end.
        ready, _, _ = select.select([sys.stdin], [], [], POLL_SECONDS)
        ended = bool(ready and not os.read(sys.stdin.fileno(), 4096)) or os.getppid() != parent
        restarted, rows = tail.poll()
        while restarted or rows:
            piece = (restarted, rows, wall_clock_offset(run.records_file))
            for worker in workers:
                worker.pieces.put(piece)
            restarted, rows = tail.poll()
        publish()

    for worker in workers:
        worker.pieces.put(None)
    deadline = time.monotonic() + DRAIN_SECONDS
    while time.monotonic() < deadline and any(
        worker.state not in ("finished", "failed") for worker in workers
    ):
        publish()
        time.sleep(0.02)
    publish()


def main() -> None:
    os.nice(NICENESS)
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    try:
        follow(Run(sys.argv[1]))
    except BaseException:
        logger.exception("the copies ended early")
        os._exit(1)
    os._exit(0)  # past the exit hooks of a library that hangs


# --------------------------------------------------------------------------------------------
# The training process's side
# --------------------------------------------------------------------------------------------


class Sinks:
    """A handle on the process that writes the copies."""

    def __init__(self, run: Run, names: list[str], process: subprocess.Popen | None):
        self.run = run
        self.names = names
        self.process = process

    def finish(self, timeout_seconds: float = 60.0) -> dict[str, dict[str, Any]]:
        """Let the copies take in the last records and end; stop them after `timeout_seconds`.

        Returns {name: {"ok", "error", "rows", …}}.
        """
        if self.process is None:
            return {}
        self.run.flush()
        self.process.stdin.close()
        try:
            self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._stop()
            return self._status(f"stopped after {timeout_seconds:g} s")
        return self._status(f"the process ended with code {self.process.returncode}")

    def _stop(self) -> None:
        """End the whole group: W&B has a process of its own in it."""
        for kill, seconds in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(self.process.pid, kill)
                self.process.wait(seconds)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def _status(self, end: str) -> dict[str, dict[str, Any]]:
        found = read_json(self.run.path / "sinks.json") or {}
        if found.pop("pid", None) != self.process.pid:
            found = {}
        status = {}
        for name in self.names:
            entry = found.get(name, {"state": "not started", "error": None, "rows": 0})
            state = entry.pop("state")
            if state not in ("finished", "failed"):
                entry["error"] = f"{state}, {end}; see {self.run.path / 'sinks.log'}"
            status[name] = {"ok": state == "finished"} | entry
        return status


def start(run: Run) -> Sinks:
    """Start the process that writes the copies that the run's params ask for; returns at once."""
    names = wanted(run.params())
    if not names:
        return Sinks(run, names, None)
    with (run.path / "sinks.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lib.watch.sinks", str(run.path.resolve())],
            stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=ROOT, start_new_session=True,
        )
    return Sinks(run, names, process)


if __name__ == "__main__":
    main()
