"""The run folder: the only thing processes talk through.

    outputs/<run>/
      params.yaml    the frozen, resolved params      manifest.json  code, versions, machine, data
      records.jsonl  one JSON object a line           verdicts/      <stage>.json
      checkpoints/   last, best, step_N               notebooks/     executed
      report/        index.html and a page a stage    summary.json   the whole run, computed

A notebook, its workers, the live monitor and a laptop watching a remote run read the same files,
also after the run has died. Nothing here imports torch.
"""

import fcntl
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TextIO

from lib import params as params_module
from lib.errors import BadInput, GateFailed
from lib.params import ROOT, Params

STAGES = ("setup", "overfit", "lr_finder", "train", "analysis")
"""The five gates, in order; notebook `NN_<stage>.ipynb` runs each."""

VERSIONED = ("torch", "torchvision", "timm", "numpy", "pillow", "pydantic", "papermill",
             "nbconvert", "ipykernel", "matplotlib", "safetensors", "scikit-learn", "wandb",
             "tensorboard")


_LOCKS: dict[Path, TextIO] = {}
"""The locks of this process, by run folder."""


@dataclass(frozen=True)
class Check:
    """One computed statement of a verdict.

    `value` was measured, `limit` says what it had to be, `advice` what to do where it failed.
    A failed check fails its gate only at severity "error".
    """

    id: str
    title: str
    value: Any
    limit: Any
    passed: bool
    severity: Literal["error", "warning", "info"] = "error"
    advice: str = ""


@dataclass(frozen=True)
class Verdict:
    """The checks of one stage."""

    stage: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks if check.severity == "error")

    @property
    def failed_checks(self) -> list[Check]:
        """What failed, errors first."""
        order = {"error": 0, "warning": 1, "info": 2}
        failed = [check for check in self.checks if not check.passed]
        return sorted(failed, key=lambda check: order[check.severity])

    def require(self) -> None:
        """Raise GateFailed, naming the first failed check, unless the verdict is "passed"."""
        if not self.passed:
            first = self.failed_checks[0]
            raise GateFailed(
                f"{self.stage}: {first.title}: {shown(first.value)}, must be "
                f"{shown(first.limit)}. {first.advice}"
            )


def shown(value: Any) -> str:
    """A value as people read it: 4 significant digits, never a bare 0.0000."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return str(value)


def duration(seconds: float) -> str:
    """Seconds as people read them: 42 s, 3 min 10 s, 5 h 12 min, 2 d 4 h."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, smaller, smaller_unit in (
        (86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {smaller_unit}"
    return f"{whole} s"


def _jsonable(value: Any) -> Any:
    """Plain JSON: non-finite numbers become their names, since JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _jsonable(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(child) for child in value]
    if hasattr(value, "tolist"):  # a numpy or torch number
        return _jsonable(value.tolist())
    return value


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(_jsonable(value), indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any | None:
    """The JSON in a file, or None where there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


class Run:
    """One run folder. Making the object touches nothing; `open_stage` creates the folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name = self.path.name
        self.params_file = self.path / "params.yaml"
        self.manifest_file = self.path / "manifest.json"
        self.records_file = self.path / "records.jsonl"
        self.summary_file = self.path / "summary.json"
        self.verdicts = self.path / "verdicts"
        self.checkpoints = self.path / "checkpoints"
        self.notebooks = self.path / "notebooks"
        self.report = self.path / "report"
        self._lock = None
        self._records = None
        self._clock_start: float | None = None
        self._stage = ""

    # -- records ------------------------------------------------------------------------------

    def record(self, kind: Literal["step", "eval", "event", "sample"], **values: Any) -> None:
        """Append one record; `time` is seconds of running since the run began."""
        if self._records is None:
            self._open_records()
        line = {"kind": kind, "stage": self._stage, **values}
        line["time"] = round(time.monotonic() - self._clock_start, 4)
        self._records.write(json.dumps(_jsonable(line)) + "\n")
        if kind != "step":
            self._records.flush()

    def start(self, stage: str) -> None:
        """Begin a stage: its old verdict is void, and records from now on carry its name.

        What an earlier try recorded is dropped; a training drops only what it does not resume.
        """
        (self.verdicts / f"{stage}.json").unlink(missing_ok=True)
        self._stage = stage
        if stage != "train":
            self.rewind_records(stage, step=0)
        # The one wall-clock time in the records, for tools that want dates.
        self.record("event", event="stage started", unix=round(time.time(), 3))

    def flush(self) -> None:
        """Hand the step records written so far to the readers."""
        if self._records is not None:
            self._records.flush()

    def _open_records(self) -> None:
        # A run of several processes, stages or resumes has one clock: it goes on from the last
        # record, so time spent dead is not time spent running.
        if self._clock_start is None:
            times = (row.get("time", 0.0) for row in read_records(self.records_file))
            self._clock_start = time.monotonic() - max(times, default=0.0)
        if self.records_file.exists() and not self.records_file.read_bytes().endswith(b"\n"):
            self._rewrite_records(lambda row: True)  # a torn last line from a killed writer
        self._records = self.records_file.open("a", encoding="utf-8")

    def _rewrite_records(self, keep) -> None:
        temporary = self.records_file.with_name(f".records.{os.getpid()}")
        with temporary.open("w", encoding="utf-8") as file:
            for row in read_records(self.records_file):
                if keep(row):
                    file.write(json.dumps(row) + "\n")
        os.replace(temporary, self.records_file)

    def rewind_records(self, stage: str, step: int) -> None:
        """Drop `stage`'s records of steps after `step`: a resumed run writes them again."""
        self.close_records()
        if self.records_file.exists():
            self._rewrite_records(
                lambda row: row.get("stage") != stage or row.get("step", 0) <= step
            )

    def close_records(self) -> None:
        if self._records is not None:
            self._records.close()
            self._records = None

    # -- verdicts, manifest, summary ----------------------------------------------------------

    def write_verdict(self, stage: str, checks: list[Check]) -> Verdict:
        """Write the stage's verdict and the summary, end the stage and free the folder."""
        verdict = Verdict(stage, tuple(checks))
        write_json(
            self.verdicts / f"{stage}.json",
            {"stage": stage, "passed": verdict.passed,
             "checks": [asdict(check) for check in checks]},
        )
        self.record("event", event="stage finished", passed=verdict.passed)
        self.close_records()
        self.write_summary()
        self.unlock()
        return verdict

    def verdict(self, stage: str) -> Verdict | None:
        """The stage's verdict, or None: a stage without a verdict has failed."""
        found = read_json(self.verdicts / f"{stage}.json")
        return found and Verdict(stage, tuple(Check(**check) for check in found["checks"]))

    def suggested_lr(self) -> float | None:
        """The learning rate that a passed LR finder found, or None."""
        found = [row["lr"] for row in self.rows("lr_finder") if row.get("event") == "suggestion"]
        verdict = self.verdict("lr_finder")
        return found[-1] if found and verdict and verdict.passed else None

    def rows(self, stage: str) -> list[dict]:
        """The records of one stage."""
        self.flush()
        return list(read_records(self.records_file, stage=stage))

    def manifest(self) -> dict:
        return read_json(self.manifest_file) or {}

    def params(self) -> Params:
        """The frozen params of this run."""
        return params_module.load(self.params_file)

    def write_manifest(self, params: Params) -> None:
        write_json(self.manifest_file, {
            "run": self.name,
            "params_digest": params_module.digest(params),
            "seed": params.seed,
            "code": code_state(),
            "versions": versions(),
            "machine": machine_facts(),
            "data": {},
        })

    def update_manifest(self, **entries: Any) -> None:
        write_json(self.manifest_file, self.manifest() | entries)

    def write_summary(self) -> dict:
        """Compute summary.json from verdicts and records alone."""
        params = self.params()
        verdicts = {stage: read_json(self.verdicts / f"{stage}.json") for stage in STAGES}
        records = list(read_records(self.records_file))
        seconds = stage_seconds(records)
        evaluations = [row for row in records if row["kind"] == "eval"]
        final = [row for row in evaluations if row["stage"] == "analysis"]
        if not verdicts["analysis"]:
            final = [row for row in evaluations if row["stage"] == "train"][-1:]
        metrics = {
            key: value for row in final for key, value in row.items() if "/" in key
        }
        summary = {
            "run": self.name,
            "task": params.task,
            "passed": all(verdict and verdict["passed"] for verdict in verdicts.values()),
            "stages": {stage: verdict for stage, verdict in verdicts.items() if verdict},
            "metrics": metrics,
            "seconds": seconds,
            "dollars": round(sum(seconds.values()) / 3600 * params.machine.dollars_per_hour, 4),
        }
        write_json(self.summary_file, summary)
        return summary

    # -- lock ---------------------------------------------------------------------------------

    def lock(self, owner: str) -> None:
        """Take the folder for this process; BadInput where another process has it."""
        if earlier := _LOCKS.pop(self.path.resolve(), None):
            earlier.close()  # a notebook run again from its top, in the same kernel
        file = (self.path / "lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = json.loads(file.read() or "{}")
            file.close()
            if (holder.get("pid"), holder.get("host")) == (os.getppid(), platform.node()):
                return  # the pipeline that started this kernel holds it for us
            who = holder.get("owner", "another process")
            raise BadInput(
                f"{self.path}: in use by {who} (process {holder.get('pid', 'unknown')} on "
                f"{holder.get('host', 'this machine')}); stop it, or choose another folder with "
                "--name / run_dir"
            ) from None
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": platform.node(), "owner": owner}))
        file.flush()
        self._lock = _LOCKS[self.path.resolve()] = file

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def open_run(params: Params, path: Path, owner: str) -> Run:
    """Create or reopen a run folder and lock it; refuse one that holds another run."""
    run = Run(path)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        run.lock(owner)
    except OSError as error:
        raise BadInput(
            f"{run.path}: cannot be written ({error.strerror}); choose another output folder"
        ) from None
    if run.params_file.exists():
        there = run.params()
        changed = [row for row in params_module.difference(there, params)
                   if not row[0].startswith(params_module.CHANGEABLE)]
        if changed:
            run.unlock()
            listed = "; ".join(f"{key}: {old} there, {new} now" for key, old, new in changed[:6])
            raise BadInput(
                f"{run.path}: holds a run with other params ({listed}); choose another --name "
                "(run_dir in a notebook) or remove the folder"
            )
        if there != params:  # a larger budget, say
            write_text(run.params_file, params_module.to_yaml(params))
    else:
        run.write_manifest(params)
        write_text(run.params_file, params_module.to_yaml(params))
    return run


def open_stage(
    stage: str, params_file: str, overrides: dict[str, Any], run_dir: str
) -> tuple[Params, Run]:
    """What every notebook does first: read the params, open the run folder, start the stage.

    An empty `run_dir` is `outputs/<name of the params file>`.
    """
    params = params_module.load(params_file, overrides)
    path = Path(run_dir) if run_dir else ROOT / "outputs" / Path(params_file).stem
    run = open_run(params, path, owner=f"{stage} notebook")
    run.start(stage)
    return params, run


# --------------------------------------------------------------------------------------------
# Reading records
# --------------------------------------------------------------------------------------------


def read_records(path: Path, kind: str | None = None, stage: str | None = None) -> Iterator[dict]:
    """The records of a file, in order; a torn last line is left out."""
    try:
        file = path.open(encoding="utf-8")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            if not line.endswith("\n"):
                return
            row = json.loads(line)
            if kind in (None, row["kind"]) and stage in (None, row.get("stage")):
                yield row


def stage_seconds(records: list[dict]) -> dict[str, float]:
    """Seconds each stage ran, over all its tries."""
    seconds: dict[str, float] = {}
    started: dict[str, float] = {}
    for row in records:
        stage = row.get("stage")
        if row.get("event") == "stage started":
            started[stage] = row["time"]
        if stage in started:
            seconds[stage] = seconds.get(stage, 0.0) + row["time"] - started[stage]
            started[stage] = row["time"]
    return {stage: round(value, 3) for stage, value in seconds.items()}


# --------------------------------------------------------------------------------------------
# The manifest's facts
# --------------------------------------------------------------------------------------------


def _output(*command: str) -> str:
    """A command's output, or "" where it is not there or fails (facts are optional)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def code_state() -> dict[str, str]:
    """Git commit and uncommitted difference, and a digest of lib/ and notebooks/ as they are."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("lib/**/*.py"), *ROOT.glob("notebooks/*.ipynb")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return {
        "git_sha": _output("git", "rev-parse", "HEAD").strip(),
        "git_diff": _output("git", "diff", "HEAD", "--", "lib", "notebooks")[:200_000],
        "digest": digest.hexdigest()[:16],
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def machine_facts() -> dict[str, Any]:
    """Processor, cores usable by this process, memory in bytes, accelerators."""
    cpu = platform.processor()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    gpus = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version",
                   "--format=csv,noheader")
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [line.strip() for line in gpus.splitlines() if line.strip()],
    }
