"""`shakedown ...`: the command line. Heavy imports happen inside the command that needs them."""

import argparse
import os
import sys
from pathlib import Path

from lib import __version__
from lib.errors import BadInput, ShakedownError

DESCRIPTION = "Prove a vision training run on cheap minutes before the long, paid one."
EXIT_CODES = """exit codes: 0 passed, 2 bad input, 3 a gate failed, 4 budget reached,
5 interrupted but saved, 1 anything else"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("shakedown", description=DESCRIPTION, epilog=EXIT_CODES)
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="the five gates, from a params file to a report")
    run.add_argument("params", help="params file, such as params/demo_classify.yaml")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                     help="override a key, such as optim.lr=0.1 (repeatable)")
    run.add_argument("--stages", metavar="A,B", help="only these: setup, overfit, lr_finder, "
                     "train, analysis")
    run.add_argument("--name", help="name of the run folder (default: of the params file)")
    run.add_argument("--outputs", type=Path, help="where run folders are (default: outputs/)")

    check = commands.add_parser("check", help="params, network, data and plan; no training")
    check.add_argument("params")
    check.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")

    report = commands.add_parser("report", help="render a run folder's report again")
    report.add_argument("run", type=Path, help="run folder, such as outputs/demo_classify")

    lab = commands.add_parser("lab", help="JupyterLab on this machine only, with a token")
    lab.add_argument("--port", type=int, default=8888)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Errors are one line, never a traceback."""
    options = parser().parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
    except ShakedownError as error:
        print(f"shakedown: {error}", file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace) -> int:
    from lib import params as params_module
    from lib.params import ROOT
    from lib.run import STAGES

    params = params_module.load(options.params, _overrides(options))
    stages = tuple(options.stages.split(",")) if options.stages else STAGES
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise BadInput(f"--stages {unknown[0]}: no such stage; choose from {', '.join(STAGES)}")
    name = options.name or Path(options.params).stem
    if Path(name).name != name or name.startswith("."):
        raise BadInput(f"--name {name}: a name, not a path; choose where with --outputs")

    from lib.pipeline import run_pipeline

    return run_pipeline(params, (options.outputs or ROOT / "outputs") / name, stages)


def _check(options: argparse.Namespace) -> int:
    from lib import params as params_module

    params = params_module.load(options.params, _overrides(options))

    from lib.preflight.static import check

    return check(params)


def _report(options: argparse.Namespace) -> int:
    from lib.run import Run

    run = Run(options.run)
    if not run.params_file.is_file():
        raise BadInput(f"{options.run}: no run folder (it has no params.yaml)")

    from lib.watch import report

    run.write_summary()
    report.render_all(run.path.resolve().parent)
    print(report.render_run(run))
    return 0


def _lab(options: argparse.Namespace) -> int:
    from lib.params import ROOT

    command = [sys.executable, "-m", "jupyterlab", "--ip=127.0.0.1", f"--port={options.port}",
               f"--notebook-dir={ROOT}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # bound to loopback and behind its token all the same
    os.execv(sys.executable, command)


def _overrides(options: argparse.Namespace) -> dict:
    from lib.params import parse_override

    return dict(map(parse_override, options.overrides))


COMMANDS = {"run": _run, "check": _check, "report": _report, "lab": _lab}


if __name__ == "__main__":
    sys.exit(main())
