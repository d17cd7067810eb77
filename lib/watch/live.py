"""Where a stage is, while it runs and afterwards: from records.jsonl alone.

`Status` computes the numbers, record by record; `Progress` shows them under a notebook cell,
`TerminalProgress` on a terminal, `line` as one line of text.
"""

import contextvars
import html
import logging
import math
import shutil
import statistics
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TextIO

from IPython.display import display

from lib.params import Params
from lib.run import Run, duration, shown
from lib.watch.tail import Tail

TICK_SECONDS = 0.5
"""Seconds between looks at the records."""

IDLE_TICK_SECONDS = 2.0
"""Seconds between updates that only move the clock."""

WARMUP_STEPS = 20
"""Steps after a start or resume that speed leaves out, at most; a tenth of a shorter run."""

RECENT_STEPS = 101
"""Steps whose median time the time left is computed from."""

LOSS_DECAY = 0.95
"""Decay of the shown loss's exponential smoothing."""

logger = logging.getLogger(__name__)


def number(value: object) -> float:
    """A record's number; JSON has no non-finite ones, so those are there by name."""
    return float(value) if isinstance(value, int | float | str) else math.nan


class Speed:
    """Images, seconds and waiting over the steps of one try, its warm-up left out."""

    def __init__(self) -> None:
        self.num_steps = 0
        self._first: list[tuple[float, float, float]] = []
        self._later = (0.0, 0.0, 0.0)

    def add(self, images: float, seconds: float, wait: float) -> None:
        self.num_steps += 1
        if self.num_steps <= WARMUP_STEPS:
            self._first.append((images, seconds, wait))
        else:
            self._later = _sum(self._later, (images, seconds, wait))

    def totals(self, num_planned: int) -> tuple[float, float, float]:
        """(images, seconds, waiting) after the warm-up of a try of `num_planned` steps."""
        warmup = min(WARMUP_STEPS, max(num_planned, self.num_steps) // 10)
        return _sum(self._later, *self._first[warmup:])


def _sum(*triples: tuple[float, float, float]) -> tuple[float, float, float]:
    return tuple(map(sum, zip(*triples, strict=True)))


@dataclass
class Status:
    """Where one stage is. `add` takes the run's records in order, each at a constant cost."""

    stage: str
    total_steps: int | None = None
    total_epochs: float | None = None
    eval_every_epochs: float | None = None
    dollars_per_hour: float = 0.0

    state: str = "waiting"
    """waiting, running, stopped, passed, failed; Progress also ends in done."""
    step: int = 0
    epoch: float | None = None
    loss: float | None = None
    """Smoothed; the plain value where that is not finite."""
    lr: float | None = None
    headline: tuple[str, float] | None = None
    """Name and value of the headline metric in the latest evaluation."""
    headline_name: str = ""
    elapsed: float = 0.0
    """Seconds of running up to the last record, over all resumed tries."""

    _elapsed_before: float = 0.0
    _try_started: float = 0.0
    _first_step: int = 1
    _loss_weight: float = 0.0
    _loss_mean: float = 0.0
    _speed: Speed = field(default_factory=Speed)
    _speed_before: tuple[float, float, float] = (0.0, 0.0, 0.0)
    _recent: deque = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _eval_seconds: deque = field(default_factory=lambda: deque(maxlen=5))
    _last_eval_step: int = 0

    @classmethod
    def planned(cls, params: Params, stage: str) -> "Status":
        """The status of a stage that has no records yet."""
        steps = {"train": params.train.steps, "overfit": params.overfit.steps,
                 "lr_finder": params.lr_finder.steps}
        train = stage == "train"
        return cls(
            stage=stage,
            total_steps=steps.get(stage),
            total_epochs=params.train.epochs if train else None,
            eval_every_epochs=params.train.eval_every_epochs if train else None,
            dollars_per_hour=params.machine.dollars_per_hour,
            headline_name=params.headline,
        )

    # -- taking records in ----------------------------------------------------------------------

    def add(self, row: dict) -> None:
        """Take one record; those of other stages change nothing."""
        if row.get("stage") != self.stage:
            return
        moment = number(row.get("time", 0.0))
        if row.get("event") == "stage started":
            self._begin_try(moment)
        elif row["kind"] == "event":
            self._add_event(row)
        elif row["kind"] == "step":
            self._add_step(row)
        elif row["kind"] == "eval":
            self._add_eval(row)
        self.elapsed = self._elapsed_before + moment - self._try_started

    def _begin_try(self, moment: float) -> None:
        self.state = "running"
        self._elapsed_before = self.elapsed
        self._try_started = moment
        self._speed_before = _sum(self._speed_before, self._speed.totals(self._num_planned))
        self._speed = Speed()
        self._recent.clear()

    def _add_event(self, row: dict) -> None:
        if row["event"] == "train planned":
            self.total_steps = row.get("steps", self.total_steps)
            self.total_epochs = row.get("epochs", self.total_epochs)
        elif row["event"] == "stopped":
            self.state = "stopped"
        elif row["event"] == "stage finished":
            self.state = "passed" if row.get("passed") else "failed"

    def _add_step(self, row: dict) -> None:
        if row["step"] <= self.step:
            self._begin_again()
        if self._speed.num_steps == 0:
            self._first_step = row["step"]
        self.state = "running"
        self.step = row["step"]
        self.epoch = row.get("epoch")
        self.lr = number(row["lr"]) if "lr" in row else None
        if "loss" in row:
            self._smooth_loss(number(row["loss"]))
        seconds = number(row.get("seconds", 0.0))
        self._speed.add(number(row.get("images", 0)), seconds, number(row.get("wait", 0.0)))
        self._recent.append(seconds)

    def _begin_again(self) -> None:
        """The stage runs anew from its first step: nothing of the earlier try counts."""
        self.headline = None
        self._elapsed_before = 0.0
        self._loss_weight = self._loss_mean = 0.0
        self._speed = Speed()
        self._speed_before = (0.0, 0.0, 0.0)
        self._recent.clear()
        self._eval_seconds.clear()
        self._last_eval_step = 0

    def _smooth_loss(self, loss: float) -> None:
        if math.isfinite(loss):
            self._loss_weight = LOSS_DECAY * self._loss_weight + 1 - LOSS_DECAY
            self._loss_mean = LOSS_DECAY * self._loss_mean + (1 - LOSS_DECAY) * loss
            loss = self._loss_mean / self._loss_weight
        self.loss = loss

    def _add_eval(self, row: dict) -> None:
        self._last_eval_step = row.get("step", self.step)
        self._eval_seconds.append(number(row.get("seconds", 0.0)))
        if self.headline_name in row:
            self.headline = (self.headline_name, number(row[self.headline_name]))

    # -- what follows from them -----------------------------------------------------------------

    @property
    def _num_planned(self) -> int:
        """Steps this try has to do."""
        return self.total_steps - self._first_step + 1 if self.total_steps else 0

    @property
    def _measured(self) -> tuple[float, float, float]:
        return _sum(self._speed_before, self._speed.totals(self._num_planned))

    @property
    def share(self) -> float | None:
        """Share of the steps that is done."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else None

    @property
    def images_per_second(self) -> float | None:
        """Over training steps after warm-up; evaluations and saves are not in it."""
        images, seconds, _ = self._measured
        return images / seconds if seconds > 0 else None

    @property
    def wait_share(self) -> float | None:
        """Share of the same steps' time spent waiting for data."""
        _, seconds, wait = self._measured
        return wait / seconds if seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Median step time x steps left + the evaluations left; None where nothing tells."""
        if self.state != "running" or self.total_steps is None or len(self._recent) < 3:
            return None
        steps_left, evals_left = max(0, self.total_steps - self.step), self._num_evals_left
        if not steps_left and not evals_left:
            return None
        evaluation = statistics.median(self._eval_seconds) if self._eval_seconds else 0.0
        return steps_left * statistics.median(self._recent) + evals_left * evaluation

    @property
    def _num_evals_left(self) -> int:
        if not (self.eval_every_epochs and self.epoch and self.total_steps):
            return 0
        if self._last_eval_step >= self.total_steps:
            return 0
        every_steps = self.eval_every_epochs * self.step / self.epoch
        planned = math.ceil(self.total_steps / every_steps - 1e-6)
        return max(0, planned - math.floor(self._last_eval_step / every_steps + 1e-6))

    # -- as text --------------------------------------------------------------------------------

    def parts(self, since_last_record: float = 0.0) -> list[tuple[str, str]]:
        """What is known, as (name, text), the most wanted first; `since_last_record` in seconds."""
        elapsed = self.elapsed + since_last_record
        left = self.seconds_left
        parts = []
        if self.step:
            total = f" / {self.total_steps:,}" if self.total_steps else ""
            parts.append(("step", f"{self.step:,}{total}"))
        if self.epoch is not None:
            total = f" / {self.total_epochs:g}" if self.total_epochs else ""
            parts.append(("epoch", f"{self.epoch:.2f}{total}"))
        if self.loss is not None:
            parts.append(("loss", shown(self.loss)))
        if self.headline:
            parts.append((self.headline[0], shown(self.headline[1])))
        if left is not None:
            left = max(0.0, left - since_last_record)
            parts.append(("left", duration(left)))
        if self.state != "waiting":
            parts.append(("elapsed", duration(elapsed)))
        if self.lr is not None:
            parts.append(("lr", f"{self.lr:.2e}"))
        if self.images_per_second:
            parts.append(("images/s", f"{self.images_per_second:,.4g}"))
            parts.append(("wait", f"{100 * self.wait_share:.0f} %"))
        if self.dollars_per_hour and self.state != "waiting":
            spent = f"${elapsed / 3600 * self.dollars_per_hour:.2f}"
            if left is not None:
                spent += f" of ${(elapsed + left) / 3600 * self.dollars_per_hour:.2f}"
            parts.append(("cost", spent))
        return parts


def text_of(status: Status, since_last_record: float = 0.0) -> str:
    """A status as one line."""
    percent = "" if status.share is None else f" {100 * status.share:3.0f} %"
    parts = [f"{name} {value}" for name, value in status.parts(since_last_record)]
    return " · ".join([f"{status.stage}{percent} {status.state}", *parts])


def line(run: Run, stage: str) -> str:
    """Where a stage of a run is, as one line; reads the records from their beginning."""
    status = Status.planned(run.params(), stage)
    tail = Tail(run.records_file)
    while rows := tail.poll()[1]:
        for row in rows:
            status.add(row)
    return text_of(status)


# --------------------------------------------------------------------------------------------
# Under a notebook cell
# --------------------------------------------------------------------------------------------

COLOURS = {"passed": "#2e9e5b", "done": "#2e9e5b", "failed": "#d64545", "stopped": "#c98a1b"}
"""Mid-tones, readable on white and on near-black; a running bar is blue."""


def html_of(status: Status, since_last_record: float = 0.0) -> str:
    """A status as HTML: a slim bar over one row of numbers, in the page's own text colour."""
    percent = 0.0 if status.share is None else 100 * status.share
    colour = COLOURS.get(status.state.split(":")[0], "#3b82c4")
    numbers = " ".join(  # the spaces are where the row may wrap
        f'<span style="white-space:nowrap;margin-right:1.2em">'
        f'<span style="opacity:0.65">{html.escape(name)}</span> {html.escape(value)}</span>'
        for name, value in status.parts(since_last_record)
    )
    return (
        '<div style="font-variant-numeric:tabular-nums;line-height:1.6;max-width:60em">'
        f"<div><b>{html.escape(status.stage)}</b> {html.escape(status.state)}"
        f'<span style="float:right">{percent:.0f} %</span></div>'
        '<div style="height:4px;border-radius:2px;background:rgba(128,128,128,0.3);'
        'margin:2px 0 4px 0">'
        f'<div role="progressbar" aria-valuenow="{percent:.0f}" style="height:4px;'
        f'border-radius:2px;width:{percent:.1f}%;background:{colour}"></div></div>'
        f"<div>{numbers}</div></div>"
    )


class Progress:
    """A progress line under a notebook cell: `with live.Progress(run, "train"): train(...)`.

    One output, updated by a daemon thread that only reads the records; it shows the final state
    however the block ends, and nothing that fails here reaches the block.
    """

    def __init__(self, run: Run, stage: str):
        self.run = run
        self.stage = stage
        self._params = run.params()
        self._status = Status.planned(self._params, stage)
        self._tail = Tail(run.records_file)
        self._ended = threading.Event()
        self._last_record = self._last_shown = time.monotonic()
        self._handle = None
        # In a copy of the cell's context ipykernel knows which cell the thread's updates belong to.
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._follow,), daemon=True,
            name="live progress",
        )

    def __enter__(self) -> "Progress":
        self.run.flush()
        while self._read():
            pass
        self._handle = display(self._bundle(), raw=True, display_id=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error, traceback) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self.run.flush()
            while self._read():
                pass
            self._status.state = self._final_state(kind)
            self._show()
        except Exception:  # whatever the block raised must come through
            logger.exception("the live view ended early")

    def _final_state(self, kind: type[BaseException] | None) -> str:
        if kind is KeyboardInterrupt or self._status.state.startswith("stopped"):
            return "stopped: interrupted" if kind is KeyboardInterrupt else self._status.state
        if kind is not None:
            return f"failed: {kind.__name__}"
        return "done" if self._status.state == "running" else self._status.state

    def _follow(self) -> None:
        try:
            while not self._ended.wait(TICK_SECONDS):
                idle = time.monotonic() - self._last_shown > IDLE_TICK_SECONDS
                if self._read() or idle:
                    self._show(time.monotonic() - self._last_record)
        except Exception:  # a view never stops what it shows
            logger.exception("the live view ended early")

    def _read(self) -> bool:
        """Take in one piece of new records; whether there were any."""
        restarted, rows = self._tail.poll()
        if restarted:
            self._status = Status.planned(self._params, self.stage)
        for row in rows:
            self._status.add(row)
        if rows:
            self._last_record = time.monotonic()
        return bool(rows)

    def _bundle(self, since_last_record: float = 0.0) -> dict[str, str]:
        return {
            "text/html": html_of(self._status, since_last_record),
            "text/plain": text_of(self._status, since_last_record),
        }

    def _show(self, since_last_record: float = 0.0) -> None:
        self._last_shown = time.monotonic()
        self._handle.update(self._bundle(since_last_record), raw=True)


class Counter:
    """A line under a cell that counts: `with live.Counter("pictures read") as count: ...`, then
    `count(done, total)` as often as one likes.
    """

    def __init__(self, what: str):
        self.what = what
        self._began = self._shown_at = time.monotonic()
        self._done = self._total = 0
        self._handle = None

    def __enter__(self) -> "Counter":
        self._handle = display(self._bundle(), raw=True, display_id=True)
        return self

    def __call__(self, done: int, total: int) -> None:
        self._done, self._total = done, total
        if time.monotonic() - self._shown_at > TICK_SECONDS:
            self._shown_at = time.monotonic()
            self._handle.update(self._bundle(), raw=True)

    def __exit__(self, kind: type[BaseException] | None, error, traceback) -> None:
        self._handle.update(self._bundle(), raw=True)

    def _bundle(self) -> dict[str, str]:
        seconds = time.monotonic() - self._began
        said = f"{self._done:,} of {self._total:,} {self.what} in {duration(seconds)}"
        if 0 < self._done < self._total:
            rate = self._done / seconds
            said += f" ({rate:,.0f} a second, {duration((self._total - self._done) / rate)} left)"
        return {"text/plain": said, "text/html": f"<div>{html.escape(said)}</div>"}


# --------------------------------------------------------------------------------------------
# On a terminal
# --------------------------------------------------------------------------------------------


class TerminalProgress:
    """The same line on a terminal, for whichever stage runs; the caller calls `tick`.

    On a TTY the line is overwritten; elsewhere one is printed every `every_seconds`. Beginnings
    and ends of stages are lines of their own. What the records held before is not announced.
    """

    def __init__(self, run: Run, stream: TextIO = sys.stdout, every_seconds: float = 10.0):
        self.run = run
        self.stream = stream
        self.every_seconds = every_seconds
        self._params: Params | None = None
        self._tail = Tail(run.records_file)
        self._status: dict[str, Status] = {}
        self._stage: str | None = None
        self._announced = -1.0
        self._line_open = False
        self._last_record = self._last_printed = time.monotonic()
        while rows := self._tail.poll()[1]:
            self._announced = max([self._announced, *(row.get("time", 0.0) for row in rows)])
            self._take(rows)
        self._stage = None

    def tick(self) -> None:
        """Take in what is new and print what there is to say; call it about twice a second."""
        restarted, rows = self._tail.poll()
        if restarted:
            self._status = {}
        if rows:
            self._last_record = time.monotonic()
        self._take(rows)
        if self._stage is None:
            return
        since = time.monotonic() - self._last_record
        if self.stream.isatty():
            width = shutil.get_terminal_size().columns - 1
            self._write("\r" + text_of(self._status[self._stage], since)[:width] + "\x1b[K")
            self._line_open = True
        elif rows and time.monotonic() - self._last_printed >= self.every_seconds:
            self._last_printed = time.monotonic()
            self._write(text_of(self._status[self._stage], since) + "\n")

    def close(self) -> None:
        """Leave the terminal at the beginning of a fresh line."""
        self.tick()
        if self._line_open:
            self._write("\n")
            self._line_open = False

    def _take(self, rows: list[dict]) -> None:
        for row in rows:
            stage = row.get("stage")
            if stage not in self._status:
                if self._params is None:
                    self._params = self.run.params()
                self._status[stage] = Status.planned(self._params, stage)
            self._status[stage].add(row)
            if row.get("event") in ("stage started", "stage finished"):
                self._turn(row)

    def _turn(self, row: dict) -> None:
        """A stage begins or ends."""
        started = row["event"] == "stage started"
        self._stage = row["stage"] if started else None
        if row["time"] <= self._announced:
            return
        self._announced = row["time"]
        self._last_printed = time.monotonic()
        said = f"{row['stage']} started" if started else text_of(self._status[row["stage"]])
        self._write(("\r\x1b[K" if self._line_open else "") + said + "\n")
        self._line_open = False

    def _write(self, said: str) -> None:
        self.stream.write(said)
        self.stream.flush()
