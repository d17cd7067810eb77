"""The run folder: what is written is read back, also by others, also after a death."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from lib import params as params_module
from lib import run as run_module
from lib.errors import BadInput, GateFailed
from lib.params import ROOT, Params
from lib.run import (
    STAGES,
    Check,
    Run,
    Verdict,
    duration,
    open_run,
    open_stage,
    read_json,
    read_records,
    shown,
    stage_seconds,
    write_json,
)

PASSED = Check("one", "first", 1, "1", True)
FAILED = Check("two", "second", 0.5, "> 1", False, advice="Do this.")
WARNING = Check("three", "third", 3, "2", False, "warning")
INFO = Check("four", "fourth", 4, "2", False, "info")


def make(tmp_path: Path, **overrides) -> Run:
    """A new run folder, locked by this process."""
    file = tmp_path / "p.yaml"
    file.write_text("train: {epochs: 1}\n")
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return open_run(params_module.load(file, dotted), tmp_path / "run", owner="test")


@contextmanager
def python(code: str, *arguments):
    """Another Python process; its standard output is read line by line. It ends in any case."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )
    limit = threading.Timer(60, process.kill)
    limit.start()
    try:
        yield process
    finally:
        limit.cancel()
        process.kill()
        process.communicate()


HOLD = """
    import sys
    from pathlib import Path
    from lib import params
    from lib.run import open_run
    run = open_run(params.load(sys.argv[1]), Path(sys.argv[2]), owner="the other one")
    print("held", flush=True)
    sys.stdin.readline()
    run.write_verdict("setup", [])
    print("freed", flush=True)
    sys.stdin.readline()
"""


# -- records ----------------------------------------------------------------------------------


def test_records_are_one_json_object_a_line_with_kind_stage_and_time(tmp_path):
    run = make(tmp_path)
    run.start("train")
    run.record("step", step=1, loss=0.5)
    run.record("eval", step=1, **{"val/top1": 0.25})
    run.close_records()
    rows = [json.loads(line) for line in run.records_file.read_text().splitlines()]
    assert rows == list(read_records(run.records_file))
    assert [row.pop("time") >= 0 for row in rows] == [True] * 3
    assert abs(rows[0].pop("unix") - time.time()) < 60
    assert rows == [
        {"kind": "event", "stage": "train", "event": "stage started"},
        {"kind": "step", "stage": "train", "step": 1, "loss": 0.5},
        {"kind": "eval", "stage": "train", "step": 1, "val/top1": 0.25},
    ]
    assert [row["kind"] for row in run.rows("train")] == ["event", "step", "eval"]
    assert run.rows("setup") == []
    assert [row["step"] for row in read_records(run.records_file, kind="step")] == [1]


def test_anything_but_a_step_reaches_other_readers_at_once_and_steps_at_a_flush(tmp_path):
    run = make(tmp_path)
    run.start("train")
    run.record("step", step=1)
    assert [row["kind"] for row in read_records(run.records_file)] == ["event"]
    run.flush()
    assert [row["kind"] for row in read_records(run.records_file)] == ["event", "step"]
    run.record("eval", step=1)
    assert [row["kind"] for row in read_records(run.records_file)] == ["event", "step", "eval"]


def test_numbers_that_json_lacks_are_written_as_their_names(tmp_path):
    run = make(tmp_path)
    run.record("step", step=1, loss=math.nan, terms={"a": [math.inf, -math.inf, 1.0]})
    run.flush()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    row = json.loads(run.records_file.read_text(), parse_constant=refuse)
    assert (row["loss"], row["terms"]) == ("nan", {"a": ["inf", "-inf", 1.0]})


def test_a_torn_last_line_is_left_out_when_read_and_removed_when_written_on(tmp_path):
    run = make(tmp_path)
    run.start("train")
    run.record("eval", step=1)
    run.close_records()
    whole = run.records_file.read_text()
    run.records_file.write_text(whole + '{"kind": "step", "stage": "train", "st')
    assert [row["kind"] for row in read_records(run.records_file)] == ["event", "eval"]
    again = Run(run.path)
    again.record("event", event="resumed")
    again.close_records()
    text = again.records_file.read_text()
    assert text.startswith(whole)
    assert [json.loads(line)["kind"] for line in text.splitlines()] == ["event", "eval", "event"]


def test_records_of_a_writer_that_was_killed_are_there_up_to_its_last_flush(tmp_path):
    run = make(tmp_path)
    run.unlock()
    code = """
        import os, signal, sys
        from lib.run import Run
        run = Run(sys.argv[1])
        for step in range(1, 200):
            run.record("step", step=step, loss=0.123456789)
        run.flush()
        run.record("step", step=200)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with python(code, run.path) as process:
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert [row["step"] for row in read_records(run.records_file)] == list(range(1, 200))


def test_the_clock_goes_on_from_the_last_record_when_a_run_is_opened_again(tmp_path):
    """Time spent dead is not time spent running, and no record is earlier than the one before."""
    run = make(tmp_path)
    run.record("event", event="a")
    run.close_records()
    first = next(read_records(run.records_file))
    run.records_file.write_text(json.dumps(first | {"time": 1000.0}) + "\n")
    again = Run(run.path)
    again.record("event", event="b")
    time.sleep(0.02)
    again.record("event", event="c")
    again.close_records()
    times = [row["time"] for row in read_records(run.records_file)]
    assert times[0] == 1000.0
    assert 1000.0 <= times[1] < 1030.0
    assert times[1] + 0.015 < times[2] < times[1] + 30


def test_the_clock_does_not_follow_the_wall_clock(tmp_path, monkeypatch):
    """A machine whose date is set back must not make a record of negative time."""
    run = make(tmp_path)
    run.record("event", event="a")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    run.record("event", event="b")
    run.flush()
    before, after = (row["time"] for row in read_records(run.records_file))
    assert 0 <= before <= after < 30


def test_rewind_drops_what_a_resumed_run_writes_again_and_nothing_else(tmp_path):
    run = make(tmp_path)
    run.start("overfit")
    run.record("step", step=9)
    run.start("train")
    for step in range(1, 6):
        run.record("step", step=step)
    run.record("eval", step=5)
    run.record("event", event="saved", step=5)
    run.rewind_records("train", 3)
    run.record("event", event="resumed", step=3)
    run.close_records()
    rows = [(row["stage"], row["kind"], row.get("step"))
            for row in read_records(run.records_file)]
    assert rows == [
        ("overfit", "event", None), ("overfit", "step", 9), ("train", "event", None),
        ("train", "step", 1), ("train", "step", 2), ("train", "step", 3), ("train", "event", 3),
    ]


def test_rewinding_a_folder_without_records_is_nothing(tmp_path):
    run = make(tmp_path)
    run.rewind_records("train", 0)
    assert list(read_records(run.records_file)) == []
    assert not run.records_file.exists()


def test_seconds_of_a_stage_are_those_of_all_its_tries_and_not_those_between():
    def row(stage, time_, event=""):
        return {"kind": "event", "stage": stage, "time": time_, "event": event}

    records = [
        row("setup", 0.0, "stage started"), row("setup", 2.0, "stage finished"),
        row("train", 10.0, "stage started"), row("train", 14.0),
        row("train", 100.0, "stage started"), row("train", 101.5, "stage finished"),
    ]
    assert stage_seconds(records) == {"setup": 2.0, "train": 5.5}


# -- write_json -------------------------------------------------------------------------------


def test_write_json_replaces_the_whole_file_or_nothing(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"x": [1, math.nan], "y": "é"})
    assert json.loads(path.read_text()) == {"x": [1, "nan"], "y": "é"}
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert path.read_bytes() == before
    write_json(path, 3)
    assert read_json(path) == 3
    assert read_json(tmp_path / "none.json") is None


def test_a_reader_in_another_process_never_sees_half_a_json_file(tmp_path):
    path, stop = tmp_path / "a.json", tmp_path / "stop"
    write_json(path, ["x" * 1000] * 200)
    code = """
        import json, sys
        from pathlib import Path
        path, stop, sizes = Path(sys.argv[1]), Path(sys.argv[2]), {}
        print("reading", flush=True)
        while not stop.exists():
            size = len(json.loads(path.read_text()))
            sizes[size] = sizes.get(size, 0) + 1
        print(json.dumps(sizes), flush=True)
    """
    with python(code, path, stop) as process:
        assert process.stdout.readline() == "reading\n"
        deadline = time.monotonic() + 0.7
        while time.monotonic() < deadline:
            write_json(path, ["x" * 1000] * 200)
            write_json(path, ["y" * 1000] * 400)
        stop.touch()
        sizes = json.loads(process.stdout.readline() or '"the reader failed"')
    assert set(sizes) == {"200", "400"}
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


# -- verdicts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "checks, passed",
    [
        ([], True), ([PASSED], True), ([PASSED, WARNING], True), ([INFO], True),
        ([PASSED, FAILED], False), ([WARNING, FAILED, INFO], False),
    ],
)
def test_only_a_failed_check_of_severity_error_fails_a_gate(checks, passed):
    verdict = Verdict("train", tuple(checks))
    assert verdict.passed is passed
    if passed:
        verdict.require()
    else:
        with pytest.raises(GateFailed):
            verdict.require()


def test_a_failed_verdict_names_the_error_first_its_limit_and_what_to_do():
    verdict = Verdict("train", (INFO, WARNING, PASSED, FAILED))
    assert verdict.failed_checks == [FAILED, WARNING, INFO]
    with pytest.raises(GateFailed, match=r"^train: second: 0\.5, must be > 1\. Do this\.$"):
        verdict.require()
    assert GateFailed.exit_code == 3


def test_a_verdict_comes_back_as_it_was_written_and_in_the_documented_form(tmp_path):
    run = make(tmp_path)
    run.start("setup")
    written = run.write_verdict("setup", [PASSED, WARNING])
    assert run.verdict("setup") == written == Verdict("setup", (PASSED, WARNING))
    assert read_json(run.verdicts / "setup.json") == {
        "stage": "setup", "passed": True,
        "checks": [
            {"id": "one", "title": "first", "value": 1, "limit": "1", "passed": True,
             "severity": "error", "advice": ""},
            {"id": "three", "title": "third", "value": 3, "limit": "2", "passed": False,
             "severity": "warning", "advice": ""},
        ],
    }


def test_a_stage_that_starts_again_has_no_verdict_until_it_ends(tmp_path):
    run = make(tmp_path)
    run.start("setup")
    run.write_verdict("setup", [PASSED])
    run.start("setup")
    assert run.verdict("setup") is None


def test_the_suggested_lr_is_the_finder_s_last_and_only_with_its_verdict(tmp_path):
    run = make(tmp_path)
    assert run.suggested_lr() is None
    run.start("lr_finder")
    run.record("event", event="suggestion", lr=0.03)
    assert run.suggested_lr() is None
    run.write_verdict("lr_finder", [PASSED])
    assert run.suggested_lr() == 0.03
    assert Run(run.path).suggested_lr() == 0.03
    run.start("lr_finder")
    run.record("event", event="suggestion", lr=None)
    run.write_verdict("lr_finder", [FAILED])
    assert run.suggested_lr() is None


# -- summary ----------------------------------------------------------------------------------


def test_the_summary_is_computed_from_verdicts_and_records_alone(tmp_path):
    run = make(tmp_path, machine__dollars_per_hour=3600.0)
    for stage in STAGES:
        run.start(stage)
        if stage == "train":
            time.sleep(0.02)
            run.record("eval", step=5, **{"val/top1": 0.5})
            run.record("eval", step=9, seconds=0.1, **{"val/top1": 0.7, "val/loss": 0.2})
        if stage == "analysis":
            run.record("eval", step=9, **{"val/top1": 0.9})
            run.record("eval", step=9, **{"train/top1": 1.0})
        run.write_verdict(stage, [PASSED, WARNING])
    summary = read_json(run.summary_file)
    assert list(summary) == ["run", "task", "passed", "stages", "metrics", "seconds", "dollars"]
    assert (summary["run"], summary["task"], summary["passed"]) == ("run", "classify", True)
    assert summary["stages"] == {
        stage: read_json(run.verdicts / f"{stage}.json") for stage in STAGES
    }
    assert summary["metrics"] == {"val/top1": 0.9, "train/top1": 1.0}
    assert summary["seconds"] == stage_seconds(list(read_records(run.records_file)))
    assert list(summary["seconds"]) == list(STAGES)
    assert summary["dollars"] == pytest.approx(sum(summary["seconds"].values()), abs=1e-3)
    assert summary["dollars"] >= 0.02


def test_without_the_analysis_the_summary_has_the_last_evaluation(tmp_path):
    run = make(tmp_path)
    run.start("train")
    run.record("eval", step=5, **{"val/top1": 0.5, "val/knn": 0.1})
    run.record("eval", step=9, seconds=0.1, **{"val/top1": 0.7})
    run.write_verdict("train", [PASSED])
    assert read_json(run.summary_file)["metrics"] == {"val/top1": 0.7}


@pytest.mark.parametrize("missing", STAGES)
def test_a_stage_without_its_verdict_file_has_failed(tmp_path, missing):
    """Papermill reports a killed kernel as completed; only the file counts."""
    run = make(tmp_path)
    for stage in STAGES:
        run.start(stage)
        run.write_verdict(stage, [PASSED])
    assert read_json(run.summary_file)["passed"] is True
    (run.verdicts / f"{missing}.json").unlink()
    summary = run.write_summary()
    assert summary["passed"] is False
    assert missing not in summary["stages"]


def test_a_failed_stage_fails_the_summary(tmp_path):
    run = make(tmp_path)
    for stage in STAGES:
        run.start(stage)
        run.write_verdict(stage, [FAILED] if stage == "train" else [PASSED])
    assert read_json(run.summary_file)["passed"] is False


# -- manifest ---------------------------------------------------------------------------------


def test_the_manifest_holds_code_versions_machine_params_and_seed(tmp_path):
    run = make(tmp_path, seed=7)
    manifest = run.manifest()
    assert list(manifest) == ["run", "params_digest", "seed", "code", "versions", "machine", "data"]
    assert (manifest["run"], manifest["seed"]) == ("run", 7)
    assert manifest["params_digest"] == params_module.digest(run.params())
    from importlib.metadata import version

    assert manifest["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    for package in ("torch", "timm", "numpy", "pillow", "papermill"):
        assert manifest["versions"][package] == version(package)
    machine = manifest["machine"]
    assert machine["host"] == os.uname().nodename
    assert machine["cores"] >= 1 and machine["cpu"]
    assert machine["memory_bytes"] > 2**28
    assert isinstance(machine["gpus"], list)


def test_updating_the_manifest_keeps_what_is_in_it(tmp_path):
    run = make(tmp_path)
    before = run.manifest()
    run.update_manifest(data=[{"split": "train", "digest": "abc"}])
    assert run.manifest() == before | {"data": [{"split": "train", "digest": "abc"}]}


def test_the_code_s_state_is_its_commit_what_is_uncommitted_and_a_digest(tmp_path, monkeypatch):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_text("x = 1\n")
    (tmp_path / "other.txt").write_text("1\n")
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]

    def git(*command):
        return subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True,
                              capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    monkeypatch.setattr(run_module, "ROOT", tmp_path)
    clean = run_module.code_state()
    assert (clean["git_sha"], clean["git_diff"]) == (git("rev-parse", "HEAD"), "")
    (tmp_path / "lib" / "a.py").write_text("x = 2\n")
    (tmp_path / "other.txt").write_text("2\n")
    dirty = run_module.code_state()
    assert dirty["git_sha"] == clean["git_sha"]
    assert "-x = 1\n+x = 2\n" in dirty["git_diff"] and "other.txt" not in dirty["git_diff"]
    assert dirty["digest"] != clean["digest"]
    (tmp_path / "lib" / "a.py").write_text("x = 1\n")
    assert run_module.code_state()["digest"] == clean["digest"]
    (tmp_path / "lib" / "new.py").write_text("")
    assert run_module.code_state()["digest"] != clean["digest"], "a new file git does not know"


def test_without_git_the_manifest_is_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", "")
    state = run_module.code_state()
    assert (state["git_sha"], state["git_diff"]) == ("", "")
    assert run_module.machine_facts()["gpus"] == []


# -- lock -------------------------------------------------------------------------------------


def test_a_second_process_is_refused_by_name_until_the_first_gives_its_verdict(tmp_path):
    file, path = tmp_path / "p.yaml", tmp_path / "run"
    file.write_text("seed: 1\n")
    with python(HOLD, file, path) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BadInput) as refused:
            open_run(params_module.load(file), path, owner="test")
        message = str(refused.value)
        assert f"{path}: in use by the other one (process {holder.pid} on " in message
        assert "choose another folder with --name / run_dir" in message and "\n" not in message
        assert not (path / "records.jsonl").exists()
        print(file=holder.stdin, flush=True)
        assert holder.stdout.readline() == "freed\n"
        run = open_run(params_module.load(file), path, owner="test")
        held = json.loads((path / "lock").read_text())
        assert (held["pid"], held["owner"]) == (os.getpid(), "test")
        run.unlock()


def test_a_killed_process_leaves_no_lock_behind(tmp_path):
    file, path = tmp_path / "p.yaml", tmp_path / "run"
    file.write_text("seed: 1\n")
    with python(HOLD, file, path) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
        holder.wait()
        open_run(params_module.load(file), path, owner="test").unlock()


def test_a_child_of_the_holder_is_let_in_and_does_not_free_the_folder(tmp_path):
    """The pipeline holds the folder for the kernels that it starts."""
    run = make(tmp_path)
    file = tmp_path / "p.yaml"
    with python(HOLD, file, run.path) as child:
        assert child.stdout.readline() == "held\n"
        print(file=child.stdin, flush=True)
        assert child.stdout.readline() == "freed\n"
    grandchild = f"""
        import subprocess, sys
        done = subprocess.run([sys.executable, "-c", {textwrap.dedent(HOLD)!r}, *sys.argv[1:]],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)
        print(done.stderr.splitlines()[-1], flush=True)
    """
    with python(grandchild, file, run.path) as stranger:
        assert f"in use by test (process {os.getpid()} on" in stranger.stdout.readline()


def test_a_child_on_another_host_is_not_taken_for_the_holder_s(tmp_path):
    """In containers that share a folder, two processes easily have the same number."""
    file, path = tmp_path / "p.yaml", tmp_path / "run"
    file.write_text("train: {epochs: 1}\n")
    run = make(tmp_path)
    held = json.loads((path / "lock").read_text())
    (path / "lock").write_text(json.dumps(held | {"host": "elsewhere"}))
    code = HOLD.replace("print(\"held\"", "print(\"let in\"")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), file, path], cwd=ROOT,
                          capture_output=True, text=True, input="\n\n")
    assert "let in" not in done.stdout
    assert "on elsewhere)" in done.stderr
    run.unlock()


def test_a_notebook_run_again_in_the_same_kernel_gets_its_folder_back(tmp_path):
    """After a cell failed there is no verdict, so the first `run` still holds the lock."""
    file, path = tmp_path / "p.yaml", tmp_path / "run"
    file.write_text("seed: 1\n")
    _, first = open_stage("setup", str(file), {}, str(path))
    _, run = open_stage("setup", str(file), {}, str(path))
    del first  # the notebook's name `run` now means the second
    code = textwrap.dedent(HOLD)
    started = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {code!r}, " \
        "*sys.argv[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode)"
    arguments = [sys.executable, "-c", started, file, path]
    assert subprocess.run(arguments, cwd=ROOT, stderr=subprocess.DEVNULL).returncode == 1
    run.write_verdict("setup", [PASSED])
    assert subprocess.run(arguments, cwd=ROOT).returncode == 0


# -- opening ----------------------------------------------------------------------------------


def test_making_a_run_object_touches_nothing(tmp_path):
    Run(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_holds_the_frozen_params_and_opens_again_with_the_same(tmp_path):
    run = make(tmp_path, optim__lr=0.3)
    frozen = run.params_file.read_bytes()
    assert run.params().optim.lr == 0.3
    manifest = run.manifest_file.read_bytes()
    run.unlock()
    again = make(tmp_path, optim__lr=0.3)
    assert (again.params_file.read_bytes(), again.manifest_file.read_bytes()) == (frozen, manifest)


def test_a_folder_of_another_run_is_refused_with_the_differences_and_stays_as_it_was(tmp_path):
    run = make(tmp_path, optim__lr=0.3)
    run.start("setup")
    run.write_verdict("setup", [PASSED])
    before = {path: path.read_bytes() for path in run.path.rglob("*")
              if path.is_file() and path.name != "lock"}
    with pytest.raises(BadInput) as refused:
        make(tmp_path, optim__lr=0.4, seed=3)
    message = str(refused.value)
    assert message.startswith(f"{run.path}: holds a run with other params (")
    assert "seed: 0 there, 3 now; optim.lr: 0.3 there, 0.4 now" in message
    assert "choose another --name" in message
    after = {path: path.read_bytes() for path in run.path.rglob("*")
             if path.is_file() and path.name != "lock"}
    assert after == before
    make(tmp_path, optim__lr=0.3).unlock()


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(BadInput) as refused:
            open_run(Params(), path, owner="test")
        message = str(refused.value)
        assert message.startswith(f"{path}: cannot be written (")
        assert message.endswith("); choose another output folder") and "\n" not in message


def test_a_folder_without_the_right_to_write_is_refused_in_one_line():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        was_root = os.geteuid() == 0
        try:
            if was_root:  # root may write anywhere
                os.seteuid(65534)
            for path in (folder, folder / "run"):
                with pytest.raises(BadInput) as refused:
                    open_run(Params(), path, owner="test")
                assert str(refused.value) == (
                    f"{path}: cannot be written (Permission denied); choose another output folder"
                )
        finally:
            if was_root:
                os.seteuid(0)
            folder.chmod(0o755)
        assert list(folder.iterdir()) == []


def test_open_stage_names_the_folder_after_the_params_file(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "ROOT", tmp_path)
    file = tmp_path / "my_run.yaml"
    file.write_text("seed: 1\n")
    params, run = open_stage("overfit", str(file), {"seed": 2}, "")
    assert run.path == tmp_path / "outputs" / "my_run"
    assert params.seed == run.params().seed == 2
    run.flush()
    (row,) = run.rows("overfit")
    assert row["event"] == "stage started"


# -- as people read it ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0.0 s"), (0.04, "0.0 s"), (3.14159, "3.1 s"), (9.94, "9.9 s"), (9.96, "10 s"),
        (42, "42 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (190, "3 min 10 s"),
        (3599.4, "59 min 59 s"), (3599.6, "1 h 0 min"), (18720, "5 h 12 min"),
        (86399, "23 h 59 min"), (86400, "1 d 0 h"), (187200, "2 d 4 h"),
        (math.nan, "unknown"), (math.inf, "unknown"),
    ],
)
def test_a_duration_as_people_read_it(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "value, text",
    [
        (True, "yes"), (False, "no"), (None, "none"), (3, "3"), (1234567, "1234567"),
        (0.5, "0.5"), (1 / 3, "0.3333"), (0.00001234567, "1.235e-05"), (0.0, "0"),
        (123456.7, "1.235e+05"), (math.nan, "nan"), ("text", "text"),
        ([1, 0.25, True], "1, 0.25, yes"), ((), ""),
    ],
)
def test_a_value_as_people_read_it(value, text):
    """A learning rate of 1e-5 is never shown as 0.0000."""
    assert shown(value) == text
