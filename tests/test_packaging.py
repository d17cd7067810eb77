"""The four places that name our dependencies agree, and what is installed can be imported."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
LOCK = (ROOT / "requirements.lock").read_text()


def bounds(lines):
    """{canonical name: its version bounds}, raising where a name stands twice."""
    found = {}
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} is listed twice"
        found[name] = str(requirement.specifier)
    return found


WANTED = bounds([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]])


def locked():
    """The lock as (Requirement, [hashes]) pairs; a package may stand once for each Python."""
    pins = []
    for block in re.split(r"\n(?=[A-Za-z0-9])", LOCK):
        text = re.sub(r"(?m)^\s*#.*$", "", block).replace("\\\n", " ")
        if text.strip():
            spec, *hashes = text.split("--hash=")
            pins.append((Requirement(spec.strip()), [h.strip() for h in hashes]))
    return pins


PINS = locked()


def test_environment_yml_lists_what_pyproject_lists():
    parts = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = [part for part in parts if isinstance(part, str)]
    (pip,) = [part["pip"] for part in parts if isinstance(part, dict)]
    assert bounds(line for line in pip if line != "--editable .") == WANTED
    assert bounds(conda) == {"python": PROJECT["requires-python"], "pip": ""}


def test_ruff_targets_the_oldest_python_we_accept():
    assert PROJECT["requires-python"] == ">=3.11"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py311"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize(
    "system", [("linux", "Linux", "x86_64"), ("darwin", "Darwin", "arm64")], ids=lambda s: s[1]
)
def test_each_dependency_is_locked_once_within_its_bounds(python, system):
    platform, system_name, machine = system
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": platform,
        "platform_system": system_name,
        "platform_machine": machine,
    }
    versions = {}
    for pin, _ in PINS:
        if pin.marker is None or pin.marker.evaluate(environment):
            name = canonicalize_name(pin.name)
            assert name not in versions, f"{name} is locked twice"
            (exact,) = pin.specifier
            versions[name] = exact.version
    assert not WANTED.keys() - versions.keys()
    for name, bound in WANTED.items():
        assert SpecifierSet(bound).contains(versions[name]), f"{name}{bound}: {versions[name]}"


def test_the_lock_also_pins_what_builds_the_project():
    # The Makefile installs the project without build isolation: its builder must be locked too.
    pinned = {canonicalize_name(p.name): p.specifier for p, _ in PINS if p.marker is None}
    for needed in map(Requirement, PYPROJECT["build-system"]["requires"]):
        (exact,) = pinned[canonicalize_name(needed.name)]
        assert needed.specifier.contains(exact.version)


def test_every_pin_is_exact_and_hashed():
    assert len(PINS) > 100
    for pin, hashes in PINS:
        assert [s.operator for s in pin.specifier] == ["=="], pin
        assert pin.url is None, pin
        assert hashes, f"{pin} has no hash"
        for digest in hashes:
            assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest), f"{pin}: {digest}"


def test_torch_is_the_plain_build():
    for pin, _ in PINS:
        (exact,) = pin.specifier
        assert "+" not in exact.version, f"{pin} is a local build"


def test_the_lock_names_no_host_and_no_path():
    for line in LOCK.splitlines():
        text = line.lower()
        for forbidden in ("://", "file:", "index-url", "find-links", "trusted-host", " @ "):
            assert forbidden not in text, line
        assert not re.search(r"^\s*-", line) or "--hash=" in line, f"an option: {line}"
        assert not re.search(r"(^|\s)(/|\./|\.\./)\S", line), f"a path: {line}"


def test_the_lock_says_how_it_is_made():
    assert LOCK.splitlines()[1].strip("# ") == "make lock"


def test_the_console_script_resolves():
    (script,) = [e for e in entry_points(group="console_scripts") if e.name == "shakedown"]
    assert script.value == PROJECT["scripts"]["shakedown"]
    assert callable(script.load())


def test_a_wheel_holds_every_file_of_lib(tmp_path):
    """A folder without __init__.py, or a template that no pattern names, would be left out."""
    tree = tmp_path / "tree"
    tree.mkdir()
    wanted = set()
    for path in (ROOT / "lib").rglob("*"):
        hidden = any(p == "__pycache__" or p.startswith(".") for p in path.parts[len(ROOT.parts) :])
        if path.is_file() and not hidden:
            wanted.add(path.relative_to(ROOT).as_posix())
    for name in [*wanted, "pyproject.toml", "LICENSE", "README.md"]:
        if (ROOT / name).exists():
            copy = tree / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tree.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lib/")}
    assert held == wanted
