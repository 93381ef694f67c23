"""The training loop can be read without turning the page, and so can every file in a sitting."""

from __future__ import annotations

import ast

import pytest
from source import PACKAGE, modules

LINES_OF_A_PAGE = 60
LINES_OF_A_FILE = 600


def train_function() -> ast.FunctionDef:
    return next(
        node for node in modules()["loop.py"].body if isinstance(node, ast.FunctionDef) and node.name == "train"
    )


def test_the_loop_is_on_one_page() -> None:
    train = train_function()
    assert train.end_lineno is not None
    assert train.end_lineno - train.lineno + 1 <= LINES_OF_A_PAGE


def test_the_loop_reads_in_the_order_of_a_step() -> None:
    """Begin, forward and backward, reduce, the finite check, the update, and only then the events of the step."""
    source = ast.unparse(train_function())
    order = [
        "train_begin",
        "step_begin",
        "accumulate",
        "reduce_and_clip",
        "require_finite",
        "update",
        "step_end",
        "finish",
    ]
    positions = [source.index(name) for name in order]
    assert positions == sorted(positions)


def test_the_loop_asks_for_no_feature() -> None:
    """What a run is made of was decided when it was composed: the loop holds no branch but the stop request."""
    branches = [node for node in ast.walk(train_function()) if isinstance(node, (ast.If, ast.Try, ast.IfExp))]
    assert len(branches) <= 1


@pytest.mark.parametrize("path", list(modules()))
def test_a_file_can_be_read_in_a_sitting(path: str) -> None:
    lines = (PACKAGE / path).read_text(encoding="utf-8").count("\n")
    assert lines <= LINES_OF_A_FILE, f"{path} has {lines} lines"
