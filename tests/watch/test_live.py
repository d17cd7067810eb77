"""The live view: its numbers, record by record, and what a notebook and a terminal show of it."""

import io
import json
import math
import textwrap
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from nbclient import NotebookClient

from lib import params as params_module
from lib.params import ROOT
from lib.run import Run, open_run
from lib.watch import live
from lib.watch.live import Status


class Records:
    """Records as a run writes them, on a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.rows: list[dict] = []

    def event(self, event: str, **values) -> None:
        self.rows.append({"kind": "event", "stage": "train", "time": self.now, "event": event}
                         | values)

    def steps(self, first: int, last: int, seconds: float, **values) -> None:
        for step in range(first, last + 1):
            self.now += seconds
            self.rows.append({
                "kind": "step", "stage": "train", "step": step, "time": self.now, "loss": 1.0,
                "lr": 0.1, "epoch": step / 100, "images": 10, "seconds": seconds,
                "wait": seconds / 4,
            } | values)

    def eval(self, step: int, seconds: float, **metrics) -> None:
        self.now += seconds
        self.rows.append({"kind": "eval", "stage": "train", "step": step, "time": self.now,
                          "seconds": seconds} | metrics)

    def status(self, **planned) -> Status:
        status = Status(stage="train", **planned)
        for row in self.rows:
            status.add(row)
        return status


@pytest.fixture
def run(tmp_path) -> Run:
    file = tmp_path / "params.yaml"
    file.write_text(json.dumps({"machine": {"dollars_per_hour": 3.6}}))
    return open_run(params_module.load(file), tmp_path / "run", owner="test")


# -- the numbers ------------------------------------------------------------------------------


def test_speed_leaves_out_warm_up_and_evaluations():
    records = Records()
    records.event("stage started")
    records.event("train planned", steps=400, epochs=4.0)
    records.steps(1, 20, seconds=5.0, wait=5.0)
    for epoch in range(3):
        records.steps(epoch * 100 + 21, epoch * 100 + 120, seconds=0.1)
        records.eval(epoch * 100 + 120, seconds=50.0, **{"val/top1": 0.5})
    status = records.status()
    assert status.images_per_second == pytest.approx(100.0)
    assert status.wait_share == pytest.approx(0.25)
    assert status.elapsed == pytest.approx(20 * 5 + 300 * 0.1 + 3 * 50)


def test_a_short_stage_leaves_out_a_tenth():
    records = Records()
    records.event("stage started")
    records.steps(1, 3, seconds=5.0)
    records.steps(4, 10, seconds=0.1)
    assert records.status(total_steps=30).images_per_second == pytest.approx(100.0)
    assert records.status(total_steps=20).images_per_second == pytest.approx(80 / 5.7)
    # Of unknown length: a tenth of what there is.
    assert records.status().images_per_second == pytest.approx(90 / 10.7)
    assert Status(stage="train", total_steps=30).images_per_second is None


def test_a_resumed_try_warms_up_anew_and_time_goes_on():
    records = Records()
    records.event("stage started")
    records.event("train planned", steps=1000, epochs=10.0)
    records.steps(1, 20, seconds=5.0)
    records.steps(21, 500, seconds=0.1)
    before = records.now
    records.now += 3.0  # another stage's
    records.event("stage started")
    records.event("resumed")
    assert records.status().step == 500
    records.steps(501, 520, seconds=8.0)
    records.steps(521, 600, seconds=0.1)
    status = records.status()
    assert status.step == 600 and status.share == 0.6
    assert status.images_per_second == pytest.approx(100.0)
    assert status.elapsed == pytest.approx(before + 20 * 8 + 80 * 0.1)
    assert status.seconds_left == pytest.approx(400 * 0.1)


def test_a_stage_run_anew_forgets_the_try_before():
    records = Records()
    records.event("stage started")
    records.steps(1, 100, seconds=1.0, loss=50.0)
    records.eval(100, seconds=10.0, **{"val/top1": 0.9})
    records.event("stage finished", passed=False)
    records.event("stage started")
    records.steps(1, 50, seconds=0.1, loss=2.0)
    status = records.status(total_steps=100)
    assert status.state == "running" and status.step == 50 and status.headline is None
    assert status.loss == pytest.approx(2.0)
    assert status.images_per_second == pytest.approx(100.0)
    assert status.elapsed == pytest.approx(5.0)


def test_time_left_is_steps_and_evaluations():
    records = Records()
    records.event("stage started")
    records.event("train planned", steps=350, epochs=3.5)
    records.steps(1, 100, seconds=0.1)
    records.steps(101, 101, seconds=9.0)  # a hiccup does not move a median
    plan = {"eval_every_epochs": 1.0}
    assert records.status(**plan).seconds_left == pytest.approx(249 * 0.1)
    records.rows.pop()
    records.eval(100, seconds=7.0, **{"val/top1": 0.5})
    # Evaluations after steps 200, 300 and the last.
    assert records.status(**plan).seconds_left == pytest.approx(250 * 0.1 + 3 * 7.0)
    records.steps(101, 200, seconds=0.1)
    assert records.status(**plan).seconds_left == pytest.approx(150 * 0.1 + 3 * 7.0)
    records.eval(200, seconds=7.0)
    assert records.status(**plan).seconds_left == pytest.approx(150 * 0.1 + 2 * 7.0)
    records.steps(201, 350, seconds=0.1)
    records.eval(300, seconds=7.0)
    assert records.status(**plan).seconds_left == pytest.approx(7.0)
    records.eval(350, seconds=7.0)
    assert records.status(**plan).seconds_left is None


def test_loss_is_smoothed_from_the_first_step_and_nan_is_shown():
    records = Records()
    records.steps(1, 1, seconds=0.1, loss=4.0)
    assert records.status().loss == pytest.approx(4.0)
    records.steps(2, 2, seconds=0.1, loss=2.0)
    assert 2.9 < records.status().loss < 3.0
    records.steps(3, 3, seconds=0.1, loss="nan")
    assert math.isnan(records.status().loss)
    assert "loss nan" in live.text_of(records.status())
    records.steps(4, 4, seconds=0.1, loss=2.0)
    assert 2.5 < records.status().loss < 3.0


def test_the_line_says_everything():
    records = Records()
    records.event("stage started")
    records.event("train planned", steps=2000, epochs=20.0)
    records.steps(1, 1000, seconds=1.0, lr=0.0123)
    records.eval(1000, seconds=20.0, **{"val/loss": 0.1, "val/top1": 0.91234, "val/top5": 1.0})
    text = live.text_of(records.status(dollars_per_hour=36.0, eval_every_epochs=10.0,
                                       headline_name="val/top1"))
    assert text == (
        "train  50 % running · step 1,000 / 2,000 · epoch 10.00 / 20 · loss 1 · val/top1 0.9123 · "
        "left 17 min 0 s · elapsed 17 min 0 s · lr 1.23e-02 · images/s 10 · wait 25 % · "
        "cost $10.20 of $20.40"
    )
    assert "cost" not in live.text_of(records.status())


@pytest.mark.parametrize("headline, value", [("val/mAP", 0.25), ("val/mAP50", 0.5)])
def test_the_metric_shown_is_the_headline_of_the_params(headline, value):
    records = Records()
    records.event("stage started")
    records.steps(1, 10, seconds=1.0)
    records.eval(10, seconds=1.0, **{"val/loss": 2.0, "val/mAP": 0.25, "val/mAP50": 0.5})
    assert records.status(headline_name=headline).headline == (headline, value)
    assert records.status(headline_name="val/top1").headline is None


def test_html_escapes_and_sets_no_text_colour():
    status = Status(stage="train", state="failed: <Oops>")
    page = live.html_of(status)
    assert "&lt;Oops&gt;" in page and "<Oops>" not in page
    assert ";color:" not in page and '"color:' not in page
    assert live.COLOURS["failed"] in page


def test_a_hundred_thousand_records_stay_cheap(run):
    run.start("train")
    run.flush()
    row = {"kind": "step", "stage": "train", "loss": 1.234567, "cross_entropy": 1.234567,
           "lr": 0.1, "grad_norm": 1.0, "images": 256, "seconds": 0.1, "wait": 0.01}
    with run.records_file.open("a") as file:
        for step in range(1, 100_001):
            file.write(json.dumps(row | {"step": step, "epoch": step / 5000, "time": step}) + "\n")
    progress = live.Progress(run, "train")
    while progress._read():
        pass
    assert progress._status.step == 100_000
    slowest = 0.0
    for tick in range(5):
        with run.records_file.open("a") as file:
            for step in range(100_001 + tick * 20, 100_021 + tick * 20):
                file.write(json.dumps(row | {"step": step, "epoch": 1.0, "time": step}) + "\n")
        began = time.process_time()
        assert progress._read()
        progress._bundle()
        slowest = max(slowest, time.process_time() - began)
    assert progress._status.step == 100_100
    assert slowest < 0.05


def test_a_piece_of_the_backlog_is_bounded_too(run):
    with run.records_file.open("w") as file:
        for step in range(1, 20_001):
            file.write(json.dumps({"kind": "step", "stage": "train", "step": step, "time": step,
                                   "pad": "x" * 200}) + "\n")
    progress = live.Progress(run, "train")
    progress._read()
    assert 0 < progress._status.step < 20_000


# -- in a notebook ----------------------------------------------------------------------------


def execute(tmp_path: Path, monkeypatch, body: str) -> tuple[nbformat.NotebookNode, list[dict]]:
    """Run a notebook whose cell trains under Progress; (the notebook saved, updates sent)."""
    cells = [
        f"""
        import sys; sys.path.insert(0, {str(ROOT)!r})
        import time
        from lib.run import Run
        from lib.watch import live
        run = Run({str(tmp_path / 'run')!r})
        run.start("train")
        run.record("event", event="train planned", steps=200, epochs=2.0)
        def train(run, last):
            for step in range(1, last + 1):
                run.record("step", step=step, loss=1 / step, lr=0.1, epoch=step / 100, images=8,
                           seconds=0.01, wait=0.001)
                time.sleep(0.01)
                if step % 10 == 0:
                    run.flush()
        """,
        body,
    ]
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(textwrap.dedent(cell).strip()) for cell in cells],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3",
                                 "language": "python"}},
    )
    nbformat.write(notebook, tmp_path / "in.ipynb")
    updates = []
    real = NotebookClient._update_display_id

    def spy(self, display_id, message):
        if message["msg_type"] == "update_display_data":
            updates.append(message["content"]["data"])
        return real(self, display_id, message)

    monkeypatch.setattr(NotebookClient, "_update_display_id", spy)
    try:
        papermill.execute_notebook(
            tmp_path / "in.ipynb", tmp_path / "out.ipynb", progress_bar=False,
            coalesce_streams=True,
        )
    except papermill.PapermillExecutionError:
        pass
    return nbformat.read(tmp_path / "out.ipynb", 4), updates


def test_papermill_gets_updates_and_keeps_one_output(tmp_path, monkeypatch, run):
    run.unlock()
    notebook, updates = execute(tmp_path, monkeypatch, """
        with live.Progress(run, "train"):
            train(run, 200)
    """)
    middle = [data["text/plain"] for data in updates if "running" in data["text/plain"]]
    assert 2 <= len(middle) <= 10, middle
    assert len({text.split(" · ")[1] for text in middle}) >= 2  # the step moves
    (output,) = notebook.cells[-1].outputs
    assert output.output_type == "display_data"
    assert output.data["text/plain"].startswith("train 100 % done · step 200 / 200")
    assert 'aria-valuenow="100"' in output.data["text/html"]


def test_the_final_state_shows_when_training_raises(tmp_path, monkeypatch, run):
    run.unlock()
    notebook, _ = execute(tmp_path, monkeypatch, """
        with live.Progress(run, "train"):
            train(run, 57)
            raise FloatingPointError("loss is nan")
    """)
    shown, raised = (cell for cell in notebook.cells[-1].outputs)
    assert shown.data["text/plain"].startswith(
        "train  28 % failed: FloatingPointError · step 57 / 200"
    )
    assert "left" not in shown.data["text/plain"]
    assert raised.output_type == "error" and raised.ename == "FloatingPointError"


def test_a_view_that_breaks_does_not_break_training(run, monkeypatch, capsys, caplog):
    run.start("train")

    def broken(self):
        raise OSError("the disk is gone")

    with pytest.raises(KeyboardInterrupt):
        with live.Progress(run, "train") as progress:
            monkeypatch.setattr(live.Tail, "poll", broken)
            progress._thread.join(5)
            assert not progress._thread.is_alive()
            raise KeyboardInterrupt
    assert "the disk is gone" in caplog.text


# -- on a terminal ----------------------------------------------------------------------------


class Shown:
    """What a notebook would show of one display, each state in turn."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def display(self, bundle: dict, raw: bool, display_id: bool) -> "Shown":
        assert raw and display_id
        self.update(bundle, raw)
        return self

    def update(self, bundle: dict, raw: bool) -> None:
        self.texts.append(bundle["text/plain"])
        assert bundle["text/html"] == f"<div>{bundle['text/plain']}</div>"


def test_a_counter_shows_how_far_it_is_and_what_is_left(monkeypatch):
    shown, clock = Shown(), [100.0]
    monkeypatch.setattr(live, "display", shown.display)
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    with live.Counter("pictures read") as counter:
        for done in range(1, 1001):
            clock[0] += 0.1
            counter(done, 2000)
    assert shown.texts[0] == "0 of 0 pictures read in 0.0 s"
    assert shown.texts[-1] == (
        "1,000 of 2,000 pictures read in 1 min 40 s (10 a second, 1 min 40 s left)")
    assert 3 < len(shown.texts) <= 3 + 100 / live.TICK_SECONDS  # not at every call


def test_a_counter_that_is_done_leaves_nothing_and_one_that_fails_says_how_far(monkeypatch):
    shown = Shown()
    monkeypatch.setattr(live, "display", shown.display)
    with live.Counter("pictures read") as counter:
        counter(7, 7)
    assert shown.texts[-1].startswith("7 of 7 pictures read") and "left" not in shown.texts[-1]
    with pytest.raises(ZeroDivisionError), live.Counter("pictures read") as counter:
        counter(3, 7)
        raise ZeroDivisionError
    assert shown.texts[-1].startswith("3 of 7 pictures read")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def record_steps(run: Run, first: int, last: int) -> None:
    for step in range(first, last + 1):
        run.record("step", step=step, loss=1.0, lr=0.1, epoch=step / 100, images=8, seconds=0.01,
                   wait=0.0)
    run.flush()


def test_without_a_terminal_lines_come_seldom_and_stages_are_announced(run):
    run.start("setup")
    run.record("event", event="stage finished", passed=True)
    stream = io.StringIO()
    progress = live.TerminalProgress(run, stream, every_seconds=0.2)
    progress.tick()
    assert stream.getvalue() == ""  # what was there before is not news
    run.start("overfit")
    progress.tick()
    for step in range(1, 31):
        record_steps(run, step, step)
        progress.tick()
        time.sleep(0.02)
    run.record("event", event="stage finished", passed=True)
    progress.tick()
    progress.tick()
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "overfit started"
    assert lines[-1].startswith("overfit  20 % passed · step 30 / 150")
    assert 1 <= len(lines) - 2 <= 4
    assert all(line.startswith("overfit") and "running" in line for line in lines[1:-1])


def test_on_a_terminal_one_line_is_overwritten(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    progress = live.TerminalProgress(run, stream)
    run.start("train")
    for step in range(1, 6):
        record_steps(run, step, step)
        progress.tick()
    run.record("event", event="stage finished", passed=False)
    progress.tick()
    progress.close()
    lines = stream.getvalue().split("\n")
    assert lines[0] == "train started" and len(lines) == 3
    overwritten = lines[1].split("\r")
    assert all(len(part.replace("\x1b[K", "")) < 60 for part in overwritten[:-1])
    assert lines[1].count("running") == 5
    assert "train failed" in overwritten[-1]


def test_a_rewind_is_not_announced_again(run):
    stream = io.StringIO()
    progress = live.TerminalProgress(run, stream, every_seconds=0.0)
    run.start("train")
    record_steps(run, 1, 30)
    progress.tick()
    run.rewind_records("train", 10)
    progress.tick()
    record_steps(run, 11, 12)
    progress.tick()
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if "started" in line] == ["train started"]
    assert "step 12" in lines[-1]


def test_line_is_the_same_for_a_dead_run(run):
    run.start("train")
    record_steps(run, 1, 30)
    run.close_records()
    assert live.line(run, "train").startswith("train running · step 30 · epoch 0.30 / 10 · loss 1")
    assert live.line(run, "analysis") == "analysis waiting"
