"""Who may import whom: read from the sources, so that no import hides in a function."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.params import ROOT

BASE = {"errors", "strict_yaml", "params", "run"}
ALLOWED = {
    # part: what it may import of lib, besides itself. Left never imports right.
    "errors": set(),
    "strict_yaml": {"errors"},
    "params": {"errors", "strict_yaml"},
    "run": {"errors", "strict_yaml", "params"},
    "models": BASE,
    "datasets": BASE,
    # Tasks draw their pictures: plots takes arrays and knows nothing of a run's making.
    "tasks": BASE | {"models", "datasets", "watch.plots"},
    "loops": BASE | {"models", "datasets", "tasks"},
    "preflight": BASE | {"models", "datasets", "tasks", "loops"},
    # Reads files, so it works on dead and remote runs.
    "watch": BASE,
    # These start notebooks and never load a network.
    "pipeline": BASE | {"watch"},
    "remote": BASE,
    "cli": BASE | {"watch", "pipeline", "remote", "preflight", "datasets"},
}
"""`part` is the first name below lib; a finer name allows only that module."""

LAZY = {("cli", part) for part in ("preflight", "pipeline", "watch", "datasets")}
"""Allowed inside functions only: `shakedown --help` must not load torch."""

CONFINED = {
    "IPython": {"lib.watch"},
    "ipywidgets": {"lib.watch"},
    "papermill": {"lib.pipeline"},
    "nbclient": {"lib.pipeline"},
    "nbconvert": {"lib.watch"},
    "wandb": {"lib.watch.sinks"},
    "tensorboard": {"lib.watch.sinks"},
    "timm": {"lib.models"},
    "jupyter_client": {"lib.pipeline"},
}
"""Package: the only parts of lib that may import it."""

NO_TORCH = {"errors", "strict_yaml", "params", "run", "watch", "pipeline", "remote", "cli"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "lib").rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in MODULES.items()}


def imports(tree: ast.Module, name: str = "") -> Iterator[tuple[str, int, bool]]:
    """(full name, line, whether at the top level) of every import, wherever it stands."""
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: a relative import; write it out"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_module = node.module.split(".")[0] == "lib" and full in MODULES
                yield (full if is_module else node.module), node.lineno, id(node) in top


def part_of(module: str) -> str:
    """lib.loops.train: loops; lib: the empty name."""
    return module.split(".")[1] if "." in module else ""


def forbidden(tree: ast.Module, name: str) -> list[str]:
    """What of `tree`, a module called `name`, breaks the rules; for people."""
    found = []
    part = part_of(name)
    for target, line, at_top in imports(tree, name):
        where = f"{name}:{line}: {part or 'lib'} imports {target}"
        package = target.split(".")[0]
        for allowed in [CONFINED[package]] if package in CONFINED else []:
            if not any(name == home or name.startswith(home + ".") for home in allowed):
                found.append(f"{where}; only {', '.join(allowed)} may")
        if package in ("torch", "torchvision", "timm") and part in NO_TORCH:
            found.append(f"{where}; it must work without loading torch")
        if package in ("notebooks", "tests", "benchmarks"):
            found.append(f"{where}; lib stands on its own")
        if package != "lib":
            continue
        to = part_of(target)
        below = target.removeprefix("lib.")
        if to in ("", part):
            continue
        if not any(below == a or below.startswith(a + ".") for a in ALLOWED.get(part, ())):
            found.append(f"{where}; it may only import {', '.join(sorted(ALLOWED[part]))}")
        elif (part, to) in LAZY and at_top:
            found.append(f"{where} at its top; import it where it is used")
    return found


def test_every_part_of_lib_has_its_rule():
    """A new package is put into its place in the order, not left out of it."""
    parts = {part_of(name) for name in MODULES} - {""}
    assert parts - ALLOWED.keys() == set()


@pytest.mark.parametrize("name", TREES)
def test_imports_follow_the_order_of_the_parts(name):
    assert forbidden(TREES[name], name) == []


@pytest.mark.parametrize(
    "name, line",
    [
        ("lib.params", "import torch"),
        ("lib.params", "from lib import run"),
        ("lib.run", "from lib.watch.plots import show"),
        ("lib.models.x", "from lib.datasets import folder"),
        ("lib.models.x", "from lib import datasets"),
        ("lib.datasets.x", "import lib.models.weights"),
        ("lib.datasets.x", "from lib.tasks import Task"),
        ("lib.tasks.x", "from lib.loops.ema import Ema"),
        ("lib.tasks.x", "from lib.watch import report"),
        ("lib.loops.x", "from lib.preflight import audit"),
        ("lib.loops.x", "from lib.watch import plots"),
        ("lib.watch.x", "from lib.loops import schedule"),
        ("lib.watch.x", "from torch import Tensor"),
        ("lib.watch.x", "import wandb"),
        ("lib.watch.x", "import papermill"),
        ("lib.pipeline", "def f():\n    from lib.tasks import build_task"),
        ("lib.cli", "from lib.preflight import static"),
        ("lib.cli", "def f():\n    from lib.loops.train import train"),
        ("lib.loops.x", "from IPython.display import display"),
        ("lib.run", "import notebooks"),
    ],
)
def test_the_rules_see_an_import_that_breaks_them(name, line):
    assert len(forbidden(ast.parse(line), name)) == 1


@pytest.mark.parametrize(
    "name, line",
    [
        ("lib.tasks.x", "from lib.watch import plots"),
        ("lib.cli", "def f():\n    from lib.preflight.static import check"),
        ("lib.watch.sinks", "import wandb"),
        ("lib.preflight.x", "from lib.loops.ema import Ema"),
        ("lib.watch.x", "from lib.watch.tail import Tail"),
        ("lib.loops.x", "import torch"),
    ],
)
def test_the_rules_let_pass_what_is_allowed(name, line):
    assert forbidden(ast.parse(line), name) == []


def test_plots_draws_arrays_and_imports_nothing_of_lib_at_its_top():
    """Tasks import it, so whatever it imports they import too."""
    own = [target for target, _, top in imports(TREES["lib.watch.plots"])
           if top and target.split(".")[0] == "lib"]
    assert own == []


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, or nothing."""
    finished: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name):], name]
        if name in finished:
            return []
        for target in sorted(edges.get(name, ())):
            if found := walk(target, [*path, name]):
                return found
        finished.add(name)
        return []

    for name in sorted(edges):
        if found := walk(name, []):
            return found
    return []


def test_no_modules_import_one_another_in_a_circle():
    edges = {name: {target for target, _, top in imports(tree, name)
                    if top and target in MODULES and target != name}
             for name, tree in TREES.items()}
    assert sum(map(len, edges.values())) > 50
    assert cycle(edges) == []


def test_a_circle_would_be_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_every_module_of_lib_that_is_imported_is_there():
    """Also those imported inside functions, which no import of the module itself would miss."""
    missing = [f"{name}:{line}: {target}" for name, tree in TREES.items()
               for target, line, _ in imports(tree, name)
               if target.split(".")[0] == "lib" and importlib.util.find_spec(target) is None]
    assert missing == []
