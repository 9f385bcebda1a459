"""House rules that can be counted: sizes of files, functions, packages; the share of prose."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("dp_runtime", "workers", "collectives")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PACKAGE_FILES, MAX_PROSE = 300, 50, 16, 0.07
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def length(node: ast.stmt | ast.expr) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def prose_lines(text: str) -> int:
    """Lines of docstrings, and lines that are nothing but a comment."""
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, Documented))
    documented = [
        node.body[0] for node in nodes if ast.get_docstring(node, clean=False) is not None
    ]
    comments = [
        token
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
    ]
    return sum(map(length, documented)) + len(comments)


def test_files_are_short() -> None:
    lines = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: n for name, n in lines.items() if n > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = [
        f"{name_of(path)}:{node.lineno} {node.name} has {length(node)} lines"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and length(node) > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_packages_are_small() -> None:
    files = {path.parent: 0 for path in SOURCES}
    for path in SOURCES:
        files[path.parent] += path.name != "__init__.py"
    assert {name_of(folder): n for folder, n in files.items() if n > MAX_PACKAGE_FILES} == {}


def test_the_root_of_the_runtime_has_three_files() -> None:
    root = {path.name for path in (ROOT / "dp_runtime").glob("*.py")}
    assert root == {"__init__.py", "config.py", "errors.py"}


@pytest.mark.parametrize("package", PACKAGES)
def test_names_say_more_than_prose(package: str) -> None:
    texts = [path.read_text() for path in SOURCES if path.is_relative_to(ROOT / package)]
    share = sum(map(prose_lines, texts)) / sum(text.count("\n") for text in texts)
    assert share <= MAX_PROSE
