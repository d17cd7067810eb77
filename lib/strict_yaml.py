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


def _plain(node: yaml.Node, path: tuple, lines: dict[tuple, int], where: str) -> Any:
    """A YAML node as plain Python, its line numbers kept by key path; duplicates refused."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        tree = {}
        for key_node, value_node in node.value:
            key = key_node.value
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
    return StrictLoader("").construct_object(node)


def read(text: str, where: str) -> tuple[dict, dict[tuple, int]]:
    """A mapping as plain Python, and the line of every key path in it.

    Raises BadInput naming `where` and the line: bad syntax, duplicate keys, not a mapping.
    """
    try:
        node = yaml.compose(text, StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise BadInput(f"{where}{line}: not valid YAML: {problem}") from None
    lines: dict[tuple, int] = {}
    tree = {} if node is None else _plain(node, (), lines, where)
    if not isinstance(tree, dict):
        raise BadInput(f"{where}: a params file is a mapping of keys to values, not {text[:40]!r}")
    return tree, lines


def read_value(text: str) -> Any:
    """One value as YAML reads it: `1e-3`, `[a, b]`, `null`."""
    node = yaml.compose(text, StrictLoader)
    return None if node is None else _plain(node, (), {}, "value")
