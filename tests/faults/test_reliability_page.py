"""Every fault on the page of promises has its tests."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text()
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if re.match(r"\| \d", line)]
NODE = re.compile(r"([\w/]+\.py)::(\w+)")


def functions(file: Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_row_names_tests_that_exist():
    assert len(ROWS) > 15
    for number, _injected, _seen, tests in ROWS:
        named = NODE.findall(tests)
        assert len(named) == len(tests.split(", ")) > 0, number
        for file, function in named:
            assert (TESTS / file).is_file() and function in functions(TESTS / file), f"row {number}: {file}::{function}"


def test_the_rows_are_in_order_and_once_each():
    numbers = [int(row[0]) for row in ROWS]
    assert numbers == sorted(set(numbers))
