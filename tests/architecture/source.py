"""The source of the package as syntax trees."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "etude"


@cache
def modules() -> dict[str, ast.Module]:
    """Path below `src/etude` -> its syntax tree."""
    return {
        str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def for_type_checkers(node: ast.AST) -> bool:
    """Whether `node` is `if TYPE_CHECKING:`, whose body never runs."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def running_nodes(tree: ast.AST) -> list[ast.AST]:
    """Every node of `tree` outside `if TYPE_CHECKING:`."""
    found = []
    for child in ast.iter_child_nodes(tree):
        if for_type_checkers(child):
            continue
        found.append(child)
        found.extend(running_nodes(child))
    return found
