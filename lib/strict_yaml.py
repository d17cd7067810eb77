"""YAML read strictly: duplicate keys are errors, and every key knows its line."""

import re
from typing import Any

import yaml

from lib.errors import BadInput


class StrictLoader(yaml.SafeLoader):
    """YAML as a researcher means it: 1e-3 is a number, `on` is a word."""


StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag.endswith(("null", "merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?([0-9][0-9_]*)?\.?[0-9]+([eE][-+]?[0-9]+)?|[-+]?[0-9]+\.([eE][-+]?[0-9]+)?"
              r"|[-+]?\.(inf|Inf)|\.(nan|NaN)", "-+.0123456789"),
):
    StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in "null bool int float str seq map".split()}


def _plain(node: yaml.Node, path: tuple, lines: dict[tuple, int], where: str) -> Any:
    """A YAML node as plain Python, its line numbers kept by key path; duplicates refused."""
    lines.setdefault(path, node.start_mark.line + 1)
    place = f"{where}:{node.start_mark.line + 1}"
    if node.tag not in PLAIN_TAGS:
        raise BadInput(f"{place}: not valid YAML: a tag ({node.tag}); write plain values")
    if isinstance(node, yaml.MappingNode):
        tree = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise BadInput(f"{place}: not valid YAML: a list or mapping as a key")
            if key in tree:
                dotted = ".".join((*path, key))
                raise BadInput(
                    f"{where}:{key_node.start_mark.line + 1}: {dotted}: duplicate key, first "
                    f"given on line {lines[(*path, key)]}; keep one"
                )
            lines[(*path, key)] = key_node.start_mark.line + 1
            tree[key] = _plain(value_node, (*path, key), lines, where)
        return tree
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*path, i), lines, where) for i, child in enumerate(node.value)]
    try:
        # int() reads 010 as ten, where YAML 1.1 means eight.
        is_int = node.tag.endswith(":int")
        return int(node.value) if is_int else StrictLoader("").construct_object(node)
    except (ValueError, KeyError):  # !!int abc, 1__0
        raise BadInput(f"{place}: not valid YAML: {node.value!r} is no {node.tag[18:]}") from None


def read(text: str, where: str) -> tuple[dict, dict[tuple, int]]:
    """A mapping as plain Python, and the line of every key path in it.

    Raises BadInput naming `where` and the line: bad syntax, duplicate keys, not a mapping.
    """
    try:
        node = yaml.compose(text, StrictLoader)
    except RecursionError:
        raise BadInput(f"{where}: not valid YAML: nested too deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise BadInput(f"{where}{line}: not valid YAML: {problem}") from None
    lines: dict[tuple, int] = {}
    try:
        tree = {} if node is None else _plain(node, (), lines, where)
    except RecursionError:  # an alias inside what it stands for
        raise BadInput(f"{where}: not valid YAML: nested without end") from None
    if not isinstance(tree, dict):
        raise BadInput(f"{where}: a params file is a mapping of keys to values, not {text[:40]!r}")
    return tree, lines


def read_value(text: str) -> Any:
    """One value as YAML reads it: `1e-3`, `[a, b]`, `null`."""
    node = yaml.compose(text, StrictLoader)
    return None if node is None else _plain(node, (), {}, "value")


class StrictDumper(yaml.SafeDumper):
    """Writes what `read` reads back: a text that either reading takes for a number is quoted."""


StrictDumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, ()),
            *StrictLoader.yaml_implicit_resolvers.get(first, ())]
    for first in {**yaml.SafeDumper.yaml_implicit_resolvers, **StrictLoader.yaml_implicit_resolvers}
}
