"""The five notebooks through papermill: gates between them, reports at the end in any case."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lib.errors import BadInput, BudgetReached, GateFailed, Interrupted, ShakedownError
from lib.params import ROOT, Params
from lib.run import STAGES, Run, code_state, open_run
from lib.watch import report
from lib.watch.live import TerminalProgress

GRACE_SECONDS = 30.0
"""From asking a stage to stop (it then saves) to ending its processes."""
EXIT_CODES = {error.__name__: error.exit_code
              for error in (BadInput, GateFailed, BudgetReached, Interrupted, ShakedownError)}


def notebook_of(stage: str) -> Path:
    return ROOT / "notebooks" / f"{STAGES.index(stage):02d}_{stage}.ipynb"


def run_pipeline(params: Params, path: Path, stages: tuple[str, ...] = STAGES) -> int:
    """Run `stages` in order in the run folder `path`; returns the exit code.

    A stage that has passed in this folder is not run again; where the code changed since, that
    is said. The first failed gate ends the pipeline. The report is rendered whatever happens.
    """
    run = open_run(params, path, owner="shakedown run")
    _note_changed_code(run)
    code, problem = 0, ""
    try:
        for stage in stages:
            if _has_passed(run, stage):
                say(f"{stage}: passed before")
                continue
            _void_later(run, stage)
            code, problem = _run_stage(run, stage)
            if code:
                break
    finally:
        try:
            _render(run)
        finally:
            run.unlock()
    if problem:
        say(problem)
    return code


def say(text: str) -> None:
    """Print a line; a terminal that has gone away (a dropped SSH session) stops nothing."""
    try:
        print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)


def _render(run: Run) -> None:
    """Summary and pages; a page that cannot be drawn must not change how the run ended."""
    run.write_summary()
    try:
        report.render_all(run.path.parent)  # first, because the run's page links to it
        say(f"report: {report.render_run(run)}")
    except Exception as error:
        say(f"the report could not be drawn ({type(error).__name__}: {error}); the run folder is "
            f"whole: shakedown report {run.path}")


def _note_changed_code(run: Run) -> None:
    """A finished stage was computed by the code of its time; say so where that is another."""
    now, then = code_state()["digest"], run.manifest()["code"]["digest"]
    if now != then and run.summary_file.exists():
        say(f"lib/ or notebooks/ changed since this run began ({then} then, {now} now): stages "
            f"that passed are kept. To run them again, remove {run.path}")


def _has_passed(run: Run, stage: str) -> bool:
    verdict = run.verdict(stage)
    return verdict is not None and verdict.passed


def _void_later(run: Run, stage: str) -> None:
    """A stage that runs again voids what was built on it."""
    for later in STAGES[STAGES.index(stage):]:
        (run.verdicts / f"{later}.json").unlink(missing_ok=True)


def _run_stage(run: Run, stage: str) -> tuple[int, str]:
    """Execute one notebook; returns its exit code and, unless it passed, one line saying why.

    What counts is the verdict file: papermill reports a killed kernel as completed.
    """
    execution = _Execution(run, stage)
    execution.start()
    stopped = execution.wait()
    verdict = run.verdict(stage)
    if verdict is not None and verdict.passed:
        if stopped:  # the signal came as the stage ended: nothing is lost, and nothing goes on
            return Interrupted.exit_code, f"{stage}: passed, then stopped; run it again to go on"
        return 0, ""
    if verdict is not None and not verdict.passed:
        try:
            verdict.require()
        except GateFailed as gate:
            return gate.exit_code, f"failed gate: {gate}"
    name, message = execution.error or ("", "")
    if stopped and name in ("KeyboardInterrupt", "Interrupted"):
        return Interrupted.exit_code, f"{stage}: {message or 'stopped; run it again to go on'}"
    if name in EXIT_CODES:
        return EXIT_CODES[name], f"{stage}: {message}"
    return 1, f"{stage}: {name or 'its kernel died'}: {message or 'no verdict was written'}"


class _Execution:
    """One notebook in its own kernel, run by papermill in a thread.

    A thread, because nbclient would otherwise take the process's SIGINT and SIGTERM for itself
    and end the kernel before it can save.
    """

    def __init__(self, run: Run, stage: str):
        self.run, self.stage = run, stage
        self.error: tuple[str, str] | None = None
        self._kernel_manager = None
        self._last_group: int | None = None
        self._thread = threading.Thread(target=self._execute, name=f"papermill-{stage}")
        self._asked_at: float | None = None
        self._delivered = False

    def start(self) -> None:
        self._thread.start()

    def wait(self) -> bool:
        """Wait for the end and show progress; True if a signal asked the stage to stop."""
        progress = TerminalProgress(self.run)
        previous = {number: signal.signal(number, self._on_signal)
                    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            while self._thread.is_alive():
                self._thread.join(0.5)
                progress.tick()
                if self._asked_at and not self._delivered:  # the kernel was not there yet
                    self._delivered = self._signal_kernel(signal.SIGINT)
                if self._asked_at and time.monotonic() - self._asked_at > GRACE_SECONDS:
                    self._signal_kernel(signal.SIGKILL)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._signal_kernel(signal.SIGKILL)  # whatever the kernel started and left behind
            progress.close()
        return self._asked_at is not None

    def _on_signal(self, number: int, frame: Any) -> None:
        self._asked_at = self._asked_at or time.monotonic()
        self._delivered = self._signal_kernel(signal.SIGINT)

    def _signal_kernel(self, number: int) -> bool:
        """To the kernel's whole process group: it leads a session of its own. False: none there."""
        group = self._kernel_group
        if not group:
            return False
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            return False
        return True

    @property
    def _kernel_group(self) -> int | None:
        provisioner = getattr(self._kernel_manager, "provisioner", None)
        if provisioner is not None and provisioner.pgid:
            self._last_group = provisioner.pgid
        return self._last_group

    def _execute(self) -> None:
        import nbclient
        import papermill
        from papermill.clientwrap import PapermillNotebookClient
        from papermill.engines import NBClientEngine, papermill_engines

        execution = self

        class Client(PapermillNotebookClient):
            """Papermill's client, whose kernel the pipeline can reach."""

            def create_kernel_manager(self):
                execution._kernel_manager = super().create_kernel_manager()
                return execution._kernel_manager

        class Engine(NBClientEngine):
            @classmethod
            def execute_managed_notebook(cls, nb_man, kernel_name, **options):
                client = Client(
                    nb_man, kernel_name=kernel_name, timeout=None, startup_timeout=120,
                    coalesce_streams=True,
                )
                with (execution.run.path / "kernel.log").open("a") as log:
                    return client.execute(stdout=log, stderr=log)

        papermill_engines.register("shakedown", Engine)
        output = self.run.notebooks / notebook_of(self.stage).name
        output.parent.mkdir(exist_ok=True)
        try:
            papermill.execute_notebook(
                str(notebook_of(self.stage)), str(output),
                parameters={"params_file": str(self.run.params_file.resolve()),
                            "run_dir": str(self.run.path.resolve())},
                engine_name="shakedown", progress_bar=False, cwd=str(ROOT),
            )
        except papermill.PapermillExecutionError as error:
            self.error = error.ename, str(error.evalue)
        except (nbclient.exceptions.DeadKernelError, RuntimeError) as error:
            self.error = "", str(error)
