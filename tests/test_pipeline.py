"""The whole way, as a user goes it: real commands, real papermill, real kernels, real signals."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from lib import params as params_module
from lib import pipeline
from lib.params import ROOT
from lib.run import STAGES, Check, Run, read_records
from tests.conftest import TINY, shared_folder

SHAKEDOWN = [sys.executable, "-m", "lib.cli"]


def write_params(folder: Path, root: Path, **train) -> Path:
    """A params file for a run of seconds on the digits in `root`."""
    tree = TINY | {
        "data": TINY["data"] | {"root": str(root)},
        "optim": {"lr": "auto", "warmup_epochs": 0.5},
        "train": {"epochs": 3, "batch_size": 64, "ema": {"decay": 0.9}} | train,
        "overfit": {"num_batches": 1, "batch_size": 16, "steps": 100},
        "lr_finder": {"min_lr": 1e-4, "steps": 50, "trial_steps": 10},
        "logging": {"wandb": True},
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def shakedown(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*SHAKEDOWN, *map(str, arguments)], capture_output=True, text=True, timeout=600, cwd=ROOT
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory, digits) -> tuple[Path, Path, dict]:
    """A run of all five stages, made once: its folder, its params file, what the command said."""
    folder = shared_folder(tmp_path_factory) / "finished"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            file = write_params(folder, digits)
            done = shakedown("run", file, "--outputs", folder / "outputs")
            said = {"code": done.returncode, "out": done.stdout, "err": done.stderr}
            (folder / "said.json").write_text(json.dumps(said))
    said = json.loads((folder / "said.json").read_text())
    return folder / "outputs" / "tiny", folder / "tiny.yaml", said


def test_one_command_goes_through_all_five_gates(finished):
    path, _, said = finished
    assert said["code"] == 0, said
    assert f"report: {path / 'report' / 'index.html'}" in said["out"]
    summary = json.loads((path / "summary.json").read_text())
    assert set(summary) == {"run", "task", "passed", "stages", "metrics", "seconds", "dollars"}
    assert list(summary["stages"]) == list(STAGES) and summary["passed"] is True
    assert all(verdict["passed"] for verdict in summary["stages"].values())
    assert set(summary["seconds"]) == set(STAGES)
    assert summary["metrics"]["val/top1"] > 0.5


def test_the_report_is_five_pages_that_load_nothing_from_the_network(finished):
    report = finished[0] / "report"
    assert {page.name for page in report.iterdir()} == {
        "index.html", *(f"{stage}.html" for stage in STAGES)
    }
    index = (report / "index.html").read_text()
    assert all(f'href="{stage}.html"' in index for stage in STAGES)
    for page in report.iterdir():
        text = page.read_text()
        loaded = re.findall(r"""(?:src|srcset|href)\s*=\s*["']?\s*(?:https?:)?//[^"' >]+""", text)
        imported = re.findall(r"@import|url\(\s*['\"]?(?:https?:)?//", text)
        assert not loaded and not imported, (page.name, loaded[:3], imported[:3])
        assert len(text) < 5e6


def test_the_training_used_the_suggested_learning_rate(finished):
    run = Run(finished[0])
    suggestion = run.suggested_lr()
    peak = max(row["lr"] for row in run.rows("train") if row["kind"] == "step")
    assert peak == pytest.approx(suggestion, rel=1e-9)


def test_the_records_hold_every_step_once_and_are_copied(finished):
    run = Run(finished[0])
    rows = list(read_records(run.records_file, kind="step", stage="train"))
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len((run.path / "records.csv").read_text().splitlines()) > len(rows)
    assert list((run.path / "tensorboard").glob("events.*"))
    assert list((run.path / "wandb").glob("offline-run-*"))


def test_the_manifest_says_code_versions_machine_and_data(finished):
    manifest = Run(finished[0]).manifest()
    assert manifest["versions"]["torch"] and manifest["machine"]["cores"]
    assert {split["split"] for split in manifest["data"]} == {"train", "val"}
    assert all(split["digest"] for split in manifest["data"])


def test_the_analysis_holds_the_estimate_beside_the_measurement(finished):
    verdict = Run(finished[0]).verdict("analysis")
    assert "estimate" in {check.id for check in verdict.checks}


def test_the_same_command_again_does_nothing(finished):
    path, file, _ = finished
    before = {page: page.stat().st_mtime_ns for page in (path / "notebooks").iterdir()}
    done = shakedown("run", file, "--outputs", path.parent)
    assert done.returncode == 0 and done.stdout.count("passed before") == len(STAGES)
    assert before == {page: page.stat().st_mtime_ns for page in (path / "notebooks").iterdir()}


def test_a_folder_with_another_run_is_refused_and_left_alone(finished):
    path, file, _ = finished
    before = (path / "params.yaml").read_bytes()
    done = shakedown("run", file, "--outputs", path.parent, "--set", "seed=1")
    assert done.returncode == 2
    assert "seed: 0 there, 1 now" in done.stderr and "--name" in done.stderr
    assert (path / "params.yaml").read_bytes() == before


def test_a_learning_rate_far_too_high_fails_its_gate_by_name(tmp_path, digits):
    file = write_params(tmp_path, digits)
    done = shakedown("run", file, "--outputs", tmp_path / "outputs", "--set", "optim.lr=50")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "learning rate 5.00e+01 is too high" in done.stdout
    run = Run(tmp_path / "outputs" / "tiny")
    assert not run.verdict("lr_finder").passed and run.verdict("train") is None
    index = (run.report / "index.html").read_text()
    assert "learning rate 5.00e+01 is too high" in index and "not run" in index


def test_d4_renamed_validation_folders_are_named_as_disagreeing_labels(tmp_path, digits):
    """The real project wrote "low accuracy is expected"; its validation labels were permuted."""
    renamed = tmp_path / "digits"
    shutil.copytree(digits / "train", renamed / "train")
    for label in range(10):
        shutil.copytree(digits / "val" / str(label), renamed / "val" / str((label + 1) % 10))
    file = write_params(tmp_path, renamed, epochs=5)
    done = shakedown("run", file, "--outputs", tmp_path / "outputs", "--set", "optim.lr=0.05",
                     "--stages", "train")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Validation labels disagree with training labels" in done.stdout
    assert "the class folders are permuted" in done.stdout
    index = (tmp_path / "outputs" / "tiny" / "report" / "index.html").read_text()
    assert "Validation labels disagree with training labels" in index


def test_a_missing_data_root_is_exit_2_and_says_where_to_put_it(tmp_path):
    file = write_params(tmp_path, tmp_path / "nowhere")
    done = shakedown("run", file, "--outputs", tmp_path / "outputs")
    assert done.returncode == 2
    assert str(tmp_path / "nowhere") in done.stdout and "CLASS/IMAGE" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    page = (tmp_path / "outputs" / "tiny" / "report" / "setup.html").read_text()
    assert "no such folder" in page


def start_training(tmp_path: Path, digits: Path) -> tuple[subprocess.Popen, Run, list]:
    """A long training, some steps in; and every process it started."""
    file = write_params(tmp_path, digits, epochs=30)
    command = ["run", file, "--outputs", tmp_path / "outputs", "--set", "optim.lr=0.05",
               "--stages", "train"]
    process = subprocess.Popen([*SHAKEDOWN, *map(str, command)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run = Run(tmp_path / "outputs" / "tiny")
    deadline = time.monotonic() + 120
    while sum(1 for _ in read_records(run.records_file, kind="step")) < 30:
        assert process.poll() is None and time.monotonic() < deadline, "the training did not start"
        time.sleep(0.2)
    return process, run, psutil.Process(process.pid).children(recursive=True)


def all_gone(processes: list, seconds: float) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_sigterm_saves_exits_5_and_the_same_command_continues(tmp_path, digits):
    process, run, children = start_training(tmp_path, digits)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 5, out
    assert "saved at step" in out and (run.checkpoints / "last").exists()
    assert run.verdict("train") is None and (run.report / "index.html").is_file()
    assert all_gone(children, 10)

    stopped_at = int(re.search(r"saved at step (\d+)", out)[1])
    again = shakedown(*process.args[3:])
    assert again.returncode == 0, again.stdout + again.stderr
    rows = run.rows("train")
    assert [row["step"] for row in rows if row.get("event") == "resumed"] == [stopped_at]
    steps = [row["step"] for row in rows if row["kind"] == "step"]
    assert steps == list(range(1, 22 * 30 + 1))


def test_a_signal_that_comes_as_a_stage_passes_stops_after_it(tmp_path, digits, monkeypatch):
    """Exit 5 with the verdict kept: not 1, and not on with the next stage."""
    params = params_module.load(write_params(tmp_path, digits))
    started = []

    class PassesWhileAsked:
        error = None

        def __init__(self, run, stage):
            self.run, self.stage = run, stage

        def start(self):
            started.append(self.stage)
            self.run.start(self.stage)
            self.run.write_verdict(self.stage, [Check("all", "all", 1, "1", True)])

        def wait(self):
            return True

    monkeypatch.setattr(pipeline, "_Execution", PassesWhileAsked)
    assert pipeline.run_pipeline(params, tmp_path / "run") == 5
    assert started == ["setup"] and Run(tmp_path / "run").verdict("setup").passed


def test_a_killed_kernel_is_a_failure_whatever_papermill_says(tmp_path, digits):
    process, run, children = start_training(tmp_path, digits)
    kernel = next(one for one in children if "ipykernel" in " ".join(one.cmdline()))
    kernel.send_signal(signal.SIGKILL)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == 1 and "train" in out
    assert run.verdict("train") is None
    assert json.loads(run.summary_file.read_text())["passed"] is False
    assert "failed" in (run.report / "index.html").read_text()
    assert all_gone(children, 10)


def test_a_second_process_in_the_folder_is_refused_and_a_killed_one_leaves_nothing(
    tmp_path, digits
):
    process, run, children = start_training(tmp_path, digits)
    second = shakedown(*process.args[3:])
    assert second.returncode == 2
    assert "in use by" in second.stderr and str(process.pid) in second.stderr
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert all_gone(children, 30), "an orphan keeps the device busy after its runner died"


def papermill(notebook: str, out: Path, cwd: Path, **parameters) -> subprocess.CompletedProcess:
    options = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    return subprocess.run(
        [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / notebook), str(out),
         "--cwd", str(cwd), *options],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def test_a_notebook_works_alone_through_papermill(tmp_path, digits):
    """From the notebooks folder, where JupyterLab runs it, with plain papermill."""
    file = write_params(tmp_path, digits)
    run = Run(tmp_path / "alone")
    done = papermill("01_overfit.ipynb", tmp_path / "out.ipynb", ROOT / "notebooks",
                     params_file=file, run_dir=run.path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert run.verdict("overfit").passed


def test_a_notebook_alone_fails_with_its_gate(tmp_path, digits):
    """Three steps memorise nothing: papermill exits non-zero, and the verdict says why."""
    file = write_params(tmp_path, digits)
    tree = yaml.safe_load(file.read_text())
    tree["overfit"]["steps"] = 3
    file.write_text(yaml.safe_dump(tree))
    run = Run(tmp_path / "alone")
    done = papermill("01_overfit.ipynb", tmp_path / "out.ipynb", ROOT,
                     params_file=file, run_dir=run.path)
    assert done.returncode != 0
    assert [check.id for check in run.verdict("overfit").failed_checks] == ["memorised"]
