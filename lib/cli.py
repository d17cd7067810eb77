"""`shakedown ...`: the command line. Heavy imports happen inside the command that needs them."""

import argparse
import os
import signal
import sys
from pathlib import Path

from lib import __version__
from lib.errors import BadInput, Interrupted, ShakedownError

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

    download = commands.add_parser(
        "download", help="a public data set: fetched, unpacked, counted",
        description="Fetch a public data set. What has arrived stays when it stops, and the same "
        "command goes on. 60 s without a byte is a failed attempt; after 6 that bring nothing new "
        "it ends.",
    )
    download.add_argument("dataset", help="coco: COCO 2017, 20 GB, twice that while unpacking")
    download.add_argument("--root", type=Path, help="where to (default: data/DATASET)")
    download.add_argument("--base-url", metavar="URL", help="a mirror with the same paths below it")
    download.add_argument("--keep-archives", action="store_true",
                          help="leave the archives in place once everything is unpacked")

    convert = commands.add_parser(
        "convert", help="COCO JSON to YOLO text, or back",
        description="Write the other format's labels beside the pictures; nothing is overwritten.",
    )
    convert.add_argument("root", type=Path, help="folder of the data set")
    convert.add_argument("--to", choices=("coco", "yolo"), required=True, help="what to write")
    convert.add_argument("--train", default="train", metavar="SPLIT", help="such as train2017")
    convert.add_argument("--val", default="val", metavar="SPLIT")

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


def _download(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        from lib.datasets.download import SOURCES, download
        from lib.params import ROOT

        if options.dataset not in SOURCES:
            raise BadInput(f"{options.dataset}: no such data set; choose from {', '.join(SOURCES)}")
        source = SOURCES[options.dataset]
        base_url = options.base_url or source.base_url
        if not base_url.startswith(("http://", "https://")):
            raise BadInput(f"--base-url {base_url}: must begin with http:// or https://")
        root = (options.root or ROOT / "data" / options.dataset).absolute()
        splits = download(source, root, base_url, options.keep_archives)
    except KeyboardInterrupt:
        raise Interrupted("stopped; what has arrived stays, and the same command goes on") from None
    _print_census(options.dataset, splits)
    print(f"complete: {root}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from lib.datasets import coco, convert, yolo_txt
    from lib.params import Data

    source, target, write = {
        "yolo": (coco, yolo_txt, convert.to_yolo), "coco": (yolo_txt, coco, convert.to_coco),
    }[options.to]
    root = options.root.absolute()
    data = Data(root=str(root), train=options.train, val=options.val)
    before = source.open_splits(data, 3)
    _print_census("from", before)
    try:
        written = write(root, *before)
    except OSError as error:
        raise BadInput(f"{root}: cannot be written ({error})") from None
    after = target.open_splits(data, 3)
    _print_census("to", after)
    for conversion, there in zip(written, after, strict=True):
        print(f"wrote {conversion.to}")
        if (there.census.used, there.census.boxes_used) != (conversion.images, conversion.boxes):
            raise BadInput(
                f"{conversion.to}: {conversion.images:,} pictures and {conversion.boxes:,} boxes "
                f"were written, and opened again it has {there.census.used:,} and "
                f"{there.census.boxes_used:,}: the folder of the pictures holds others too"
            )
    return 0


def _print_census(title: str, splits: tuple) -> None:
    """Pictures and boxes of each split: listed, used, and what was left out, with examples."""
    for census in (split.census for split in splits):
        print(f"{title} {census.split}: {census.used:,} of {census.listed:,} pictures used, "
              f"{census.boxes_used:,} of {census.boxes_listed:,} boxes "
              f"({census.crowd:,} crowd regions); {census.negatives:,} pictures hold none")
        for reason, count in (*census.dropped.items(), *census.boxes_dropped.items()):
            print(f"    left out: {count:,} {reason}, such as {census.examples[reason][0]}")


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


COMMANDS = {"run": _run, "check": _check, "report": _report, "download": _download,
            "convert": _convert, "lab": _lab}


if __name__ == "__main__":
    sys.exit(main())
