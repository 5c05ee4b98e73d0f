"""Rules of the house that a linter does not know."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from vlmscale.config import Cell, leaves

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("vlmscale", "analysis", "launch", "configs")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 550, 80


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_look_at() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(PACKAGES)
    assert len(SOURCES) > 30


def test_files_and_functions_can_be_read_at_a_sitting() -> None:
    long = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > FILE_LINES:
            long.append(f"{name_of(path)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long.append(f"{name_of(path)}: {node.name} has {lines} lines")
    assert not long, long


def test_no_module_is_a_drawer() -> None:
    assert not [
        name_of(path) for path in SOURCES if path.stem in ("utils", "util", "helpers", "misc", "common")
    ]


@pytest.mark.parametrize("word", ["TODO", "FIXME", "XXX", "HACK", "NotImplementedError"])
def test_nothing_is_left_for_later(word: str) -> None:
    pattern = re.compile(rf"\b{word}\b")
    assert not [name_of(path) for path in SOURCES if pattern.search(path.read_text(encoding="utf-8"))]


def test_every_config_field_is_read_somewhere() -> None:
    """As an attribute, in code; the module that declares and checks the fields does not count."""
    read = {
        node.attr
        for path in SOURCES
        if path.parent.name != "configs" and path.name != "config.py" and "analysis" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    assert not [key for key, _, _ in leaves(Cell()) if key.split(".")[-1] not in read]


def test_no_path_of_one_machine_is_written_down() -> None:
    pattern = re.compile(r"[\"'\s=](/home/|/Users/|/root/|/work/|/mnt/)")
    assert not [name_of(path) for path in SOURCES if pattern.search(path.read_text(encoding="utf-8"))]


def test_the_wheel_holds_the_packages_and_no_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    shipped = {*wheel["packages"], *wheel["force-include"]}
    assert shipped == {"vlmscale", "analysis", "launch", "configs"}
    for package in shipped:
        assert not [path for path in (ROOT / package).rglob("*.py") if path.name.startswith("test_")]


def test_torch_is_for_tests_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    heavy = ("torch", "transformers", "tensorflow")
    assert not [name for name in project["dependencies"] if re.match(r"[\w-]+", name)[0] in heavy]  # type: ignore[index]
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in heavy], name_of(path)
