"""Run a notebook's own cells in this process, so that a failure can be put into what they call."""

import json
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest

from lib.errors import GateFailed
from lib.params import ROOT
from lib.run import STAGES


@pytest.fixture
def gate(tmp_path: Path) -> Callable[..., dict[str, dict]]:
    """`gate("overfit", params_file, overrides)`: the checks of that stage's verdict, by id."""

    def run(stage: str, params_file: Path, overrides: dict) -> dict[str, dict]:
        folder = tmp_path / f"run_{len(list(tmp_path.glob('run_*')))}"
        notebook = nbformat.read(ROOT / f"notebooks/{STAGES.index(stage):02d}_{stage}.ipynb", 4)
        names = {}
        for cell in notebook.cells:
            if cell.cell_type != "code":
                continue
            if "parameters" in cell.metadata.get("tags", []):
                names = {"params_file": str(params_file), "overrides": overrides,
                         "run_dir": str(folder), "device": "cpu"}
                continue
            try:
                exec(compile(cell.source, f"{stage}: {cell.id}", "exec"), names)
            except GateFailed:
                break
        verdict = json.loads((folder / "verdicts" / f"{stage}.json").read_text())
        return {check["id"]: check for check in verdict["checks"]}

    return run
