"""The command line: bad input gets one clear line and exit code 2, and nothing is overwritten."""

import subprocess
import sys
from pathlib import Path

import pytest

from lib import cli
from lib.params import ROOT, load


def said(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str]:
    """Exit code and what the command printed to stderr."""
    code = cli.main(list(arguments))
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such params file"),
        ("folder", "is a folder"),
        ("optim: [1", "not valid YAML"),
        ("- a\n- b\n", "mapping of keys"),
        ("optim:\n  learning_rate: 0.1\n", "did you mean optim.lr?"),
        ("optim:\n  lr: 1\n  lr: 2\n", "duplicate key"),
    ],
)
def test_a_bad_params_file_is_one_line_and_exit_2(tmp_path, capsys, content, expected):
    file = tmp_path / "params.yaml"
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_text(content)
    for command in ("run", "check"):
        code, message = said(capsys, command, str(file))
        assert code == 2
        assert expected in message and str(file) in message
        assert message.count("\n") == 1 and "Traceback" not in message


def test_an_override_with_a_wrong_key_suggests_the_right_one(capsys):
    params = str(ROOT / "params" / "demo_classify.yaml")
    code, message = said(capsys, "run", params, "--set", "optim.learning_rate=0.1")
    assert code == 2 and "did you mean optim.lr?" in message
    code, message = said(capsys, "run", params, "--set", "optim.lr")
    assert code == 2 and "key=value" in message


def test_wrong_stages_and_names_are_refused(capsys, tmp_path):
    params = str(ROOT / "params" / "demo_classify.yaml")
    code, message = said(capsys, "run", params, "--stages", "training")
    assert code == 2 and "training" in message and "lr_finder" in message
    code, message = said(capsys, "run", params, "--name", "../elsewhere")
    assert code == 2 and "--outputs" in message


def test_an_unwritable_output_folder_is_named(capsys, tmp_path):
    in_the_way = tmp_path / "outputs"
    in_the_way.write_text("a file where the folder should be")
    params = str(ROOT / "params" / "demo_classify.yaml")
    code, message = said(capsys, "run", params, "--outputs", str(in_the_way))
    assert code == 2 and str(in_the_way) in message and "cannot be written" in message
    assert in_the_way.read_text() == "a file where the folder should be"


def test_report_needs_a_run_folder(capsys, tmp_path):
    code, message = said(capsys, "report", str(tmp_path))
    assert code == 2 and "no run folder" in message


@pytest.mark.parametrize("file", sorted((ROOT / "params").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_params_file_passes_the_static_check_without_its_data(file: Path, capsys, tmp_path):
    """The real runs' files load and check on a laptop; what is missing is said, with its place."""
    root = tmp_path / "nothing_here"
    overrides = [] if "demo" in file.name else ["--set", f"data.root={root}"]
    weights = load(file).model.weights
    if weights:  # another run's result: it must be there, and is named where it is not
        assert weights.startswith("outputs/")
        code, message = said(capsys, "check", str(file), *overrides, "--set", "model.weights=nope")
        assert code == 2 and "nope: no such weights file" in message
        overrides += ["--set", "model.weights=null"]
    assert cli.main(["check", str(file), *overrides]) == 0
    printed = capsys.readouterr().out
    assert "0 failed" in printed
    if overrides:
        data = load(file).data
        place = {
            "folder": f"{data.train}/CLASS/IMAGE", "yolo": f"images/{data.train}",
            "coco": f"annotations/instances_{data.train}.json",
        }[data.format]
        assert f"missing: {root}" in printed and f"{root}/{place}" in printed


def test_the_imagenet_file_says_what_its_project_planned(capsys):
    """LR 0.8 at batch 2048 by the linear rule from 0.1 at 256 (C6: the project trained at 3.2)."""
    cli.main(["check", str(ROOT / "params" / "resnet50_imagenet_8xa100.yaml")])
    printed = capsys.readouterr().out
    assert "8.00e-01" in printed and "25.56 M parameters" in printed


def test_check_fails_what_could_not_train(capsys):
    """A warm-up longer than the run never reaches its learning rate: exit 3."""
    params = str(ROOT / "params" / "demo_classify.yaml")
    assert cli.main(["check", params, "--set", "optim.warmup_epochs=100"]) == 3
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "optim.warmup_epochs" in printed


def test_help_does_not_load_torch():
    """`shakedown --help` answers at once."""
    code = (
        "import sys; sys.argv = ['shakedown', '--help']\n"
        "from lib import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, 'pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
