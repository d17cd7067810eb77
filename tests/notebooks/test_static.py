"""The notebooks as they are committed: short, explained, without outputs, and their names resolve.

They are read here, not run; the pipeline's tests run them.
"""

import ast
import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

from lib.params import ROOT
from lib.run import STAGES

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STAGED = [path for path in NOTEBOOKS if path.stem[:2].isdigit()]
PARAMETERS = {
    "params_file": "params/demo_classify.yaml", "overrides": {}, "run_dir": "", "device": "auto",
}
MOST_LINES, USUAL_LINES, USUAL_SHARE = 15, 8, 0.8


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def cells(path: Path, kind: str | None = None) -> list[dict]:
    return [cell for cell in read(path)["cells"] if kind in (None, cell["cell_type"])]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code(path: Path) -> str:
    return "\n".join(map(source, cells(path, "code")))


def num_lines(cell: dict) -> int:
    """Lines of code: neither empty ones nor pure comments."""
    return len([line for line in source(cell).splitlines()
                if line.strip() and not line.strip().startswith("#")])


def each_notebook(paths=NOTEBOOKS):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def test_there_is_one_notebook_a_stage_in_the_order_of_the_gates():
    assert [path.stem for path in STAGED] == [
        f"{number:02d}_{stage}" for number, stage in enumerate(STAGES)
    ]


def test_any_other_notebook_is_one_we_know():
    assert {path.stem for path in NOTEBOOKS} - {path.stem for path in STAGED} <= {"monitor"}


@each_notebook(STAGED)
def test_it_opens_and_closes_its_own_stage(path):
    stage = path.stem[3:]
    assert re.findall(r'open_stage\(\s*"(\w+)"', code(path)) == [stage]
    assert re.findall(r'write_verdict\(\s*"(\w+)"', code(path)) == [stage]
    assert source(cells(path, "code")[-1]).rstrip().endswith("verdict.require()")


@each_notebook(STAGED)
def test_one_cell_is_tagged_parameters_and_sets_exactly_the_four(path):
    """Papermill puts its values after the first such cell, and only warns of a name it lacks."""
    (cell,) = [cell for cell in cells(path)
               if "parameters" in cell["metadata"].get("tags", ())]
    assert cell["cell_type"] == "code"
    found = {}
    for statement in ast.parse(source(cell)).body:
        assert isinstance(statement, ast.Assign), "only plain assignments"
        (target,) = statement.targets
        assert target.id not in found
        found[target.id] = ast.literal_eval(statement.value)
    assert found == PARAMETERS
    assert list(found) == list(PARAMETERS)
    assert cells(path, "code").index(cell) == 0, "nothing may run before the parameters are set"


@each_notebook(STAGED)
def test_every_parameter_is_used(path):
    later = "\n".join(map(source, cells(path, "code")[1:]))
    used = {node.id for node in ast.walk(ast.parse(later)) if isinstance(node, ast.Name)}
    # The analysis and the training take the device as well; a parameter nobody reads is a lie.
    assert PARAMETERS.keys() - used == set()


@each_notebook(STAGED)
def test_the_cell_after_the_parameters_shows_what_they_resolve_to(path):
    assert "report.show_params(params)" in source(cells(path, "code")[1])


@each_notebook()
def test_its_title_is_a_question_followed_by_a_sentence(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown"
    title, _, rest = source(first).partition("\n")
    assert re.fullmatch(r"# \S.*\?", title)
    assert re.search(r"\w.*[.:]\s*$", rest.strip(), re.DOTALL)
    titles = [line for cell in cells(path, "markdown") for line in source(cell).splitlines()
              if line.startswith("# ")]
    assert titles == [title], "one H1"


@each_notebook()
def test_no_two_code_cells_stand_without_prose_between(path):
    kinds = [cell["cell_type"] for cell in cells(path)]
    assert ("code", "code") not in list(zip(kinds, kinds[1:], strict=False))
    assert set(kinds) == {"code", "markdown"}
    assert all(source(cell).strip() for cell in cells(path)), "an empty cell"


@each_notebook()
def test_code_cells_are_short(path):
    lengths = [num_lines(cell) for cell in cells(path, "code")]
    assert max(lengths) <= MOST_LINES
    assert sum(length <= USUAL_LINES for length in lengths) >= USUAL_SHARE * len(lengths)


@each_notebook()
def test_it_is_committed_without_outputs_and_traces_of_a_run(path):
    for cell in cells(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    for cell in cells(path):
        assert cell["metadata"].keys() <= {"tags"}
    metadata = read(path)["metadata"]
    assert metadata.keys() <= {"kernelspec", "language_info"}
    assert metadata.get("language_info", {}).keys() <= {"name"}


@each_notebook()
def test_it_asks_for_the_kernel_every_jupyter_has(path):
    assert read(path)["metadata"]["kernelspec"]["name"] == "python3"


@each_notebook()
def test_its_format_is_valid_and_its_cells_have_ids_of_their_own(path):
    import nbformat

    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)


@each_notebook()
def test_it_is_plain_python_without_shell_or_magic(path):
    ast.parse(code(path))


@each_notebook()
def test_no_prose_states_a_result(path):
    """Numbers with a unit of success are computed, never written (validated, 95 %, 79.0 %)."""
    prose = "\n".join(map(source, cells(path, "markdown")))
    assert re.findall(r"(?i)✅|\bvalidated\b|\bpassed!|accuracy (?:of|is) \d", prose) == []


# -- names ------------------------------------------------------------------------------------


def unresolved(text: str) -> list[str]:
    """Names of lib that `text` imports, or takes from a module of lib, and that are not there."""
    tree, modules, missing = ast.parse(text), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "lib" and not importlib.util.find_spec(alias.name):
                    missing.append(alias.name)
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "lib":
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                try:
                    home = importlib.import_module(node.module)
                except ModuleNotFoundError:
                    missing.append(node.module)
                    continue
                if not hasattr(home, alias.name):
                    try:
                        importlib.import_module(full)
                    except ModuleNotFoundError:
                        missing.append(full)
                        continue
                found = getattr(home, alias.name)
                if getattr(found, "__name__", None) == full:
                    modules[alias.asname or alias.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module is not None and not hasattr(module, node.attr):
                missing.append(f"{module.__name__}.{node.attr}")
    return missing


@each_notebook()
def test_every_name_of_lib_is_there(path):
    assert unresolved(code(path)) == []


def test_a_name_that_is_not_there_would_be_found():
    text = """
from lib.run import open_stage, close_stage
from lib.watch import plots, nothing
from lib.nowhere import x
import lib.nobody
plots.show(lambda: plots.no_such_plot(1))
"""
    assert sorted(unresolved(text)) == [
        "lib.nobody", "lib.nowhere", "lib.run.close_stage", "lib.watch.nothing",
        "lib.watch.plots.no_such_plot",
    ]


@each_notebook()
def test_every_name_is_bound_before_it_is_used(path):
    """A notebook that only runs in the order someone once clicked is not one that runs."""
    import builtins

    bound = set(dir(builtins)) | {"display"}
    for cell in cells(path, "code"):
        tree = ast.parse(source(cell))
        inside = {arg.arg for node in ast.walk(tree) if isinstance(node, ast.arguments)
                  for arg in node.args}
        stored = {node.id for node in ast.walk(tree)
                  if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        stored |= {(alias.asname or alias.name).split(".")[0] for node in ast.walk(tree)
                   if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
        loaded = {node.id for node in ast.walk(tree)
                  if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        assert loaded - bound - stored - inside == set()
        bound |= stored
