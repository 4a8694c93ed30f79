"""The layers of the package, what each may touch, and what importing it may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "dcpconv"


@dataclass(frozen=True, slots=True)
class Row:
    """One floor of the house: its rooms import from the rows below it, never from a neighbour.

    ``touches`` are the distributions they may import, beside the standard library.
    """

    rooms: tuple[str, ...]
    touches: frozenset[str] = frozenset()


ROWS = (
    Row(("core",), frozenset({"pydantic"})),
    Row(("stores",), frozenset({"boto3", "fsspec", "huggingface_hub", "obstore"})),
    Row(
        ("formats", "families", "engine"),
        frozenset({"blake3", "huggingface_hub", "pydantic", "safetensors", "tomli", "zstandard"}),
    ),
    Row(("sources",), frozenset({"transformers"})),
    Row(("plan",)),
    Row(("comparing", "conversion", "checking", "loading", "runs")),
    Row(("cli", "testing"), frozenset({"rich", "typer", "click", "pytest"})),
    Row(("__main__",)),
)
"""From the ground up; data flows the same way: sources, plan, outline, engine."""

TORCH = frozenset(
    {
        *("engine/cast.py", "engine/merging.py", "engine/rows.py"),
        *("engine/sketching.py", "engine/tensors.py"),
        *("loading", "conversion/torch_engine.py", "conversion/saving"),
        "engine/worlds/torchrun.py",
    }
)
"""What works on tensors, and so may import torch when it is imported."""

NUMPY = frozenset(
    {"engine/measuring.py", "engine/strided.py", "engine/values.py", "engine/widening.py"}
)
"""What works on many stored elements at once, and is only imported when there are some."""

MOST_PAIRS = 60
"""Pairs of rooms of which one imports the other."""

FLOOR = {room: level for level, row in enumerate(ROWS) for room in row.rooms}
FILES = sorted(PACKAGE.rglob("*.py"))
# The table of contents is exempt: it names what is public, wherever that lives.
SOURCES = [file for file in FILES if file != PACKAGE / "__init__.py"]


def _room(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def _may_import_torch(file: Path) -> bool:
    return not TORCH.isdisjoint((_room(file), _id(file.parent), _id(file)))


def _imports(file: Path) -> Iterator[str]:
    """Dotted names that ``file`` imports anywhere, also inside functions and for typing."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively: write the whole name"
            if node.module == "dcpconv":
                yield from (f"dcpconv.{alias.name}" for alias in node.names)
            else:
                yield node.module or ""


def _id(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def _modules(file: Path) -> set[str]:
    """Modules of the package that ``file`` imports, as paths relative to it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("dcpconv"):
            continue
        base = PACKAGE.joinpath(*(node.module or "").split(".")[1:])
        for alias in node.names:
            inner = base / f"{alias.name}.py"
            package = base / alias.name / "__init__.py"
            whole = base.with_suffix(".py")
            places = (inner, package, whole, base / "__init__.py")
            found.add(next(place for place in places if place.is_file()))
    return {_id(place) for place in found}


def test_the_house_has_these_rooms_and_no_other() -> None:
    entries = {path.stem for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries - {"__init__", "py"} == {room for row in ROWS for room in row.rooms} | (
        {"py.typed"} & entries
    )


@pytest.mark.parametrize("file", SOURCES, ids=_id)
def test_room_imports_only_from_the_rows_below(file: Path) -> None:
    me = _room(file)
    others = {name.split(".")[1] for name in _imports(file) if name.startswith("dcpconv.")} - {me}
    wrong = sorted(other for other in others if FLOOR.get(other, FLOOR[me]) >= FLOOR[me])
    assert not wrong, f"{me} may not import {wrong}"


def test_few_rooms_know_each_other() -> None:
    pairs = {
        (_room(file), name.split(".")[1])
        for file in SOURCES
        for name in _imports(file)
        if name.startswith("dcpconv.")
    }
    assert len({pair for pair in pairs if pair[0] != pair[1]}) <= MOST_PAIRS


@pytest.mark.parametrize("room", FLOOR)
def test_no_circle_inside_a_room(room: str) -> None:
    files = [file for file in SOURCES if _room(file) == room]
    inside = {_id(file): _modules(file) & {_id(other) for other in files} for file in files}
    while leaves := {name for name, needs in inside.items() if not needs}:
        inside = {name: needs - leaves for name, needs in inside.items() if name not in leaves}
    assert not inside, f"these import each other: {sorted(inside)}"


@pytest.mark.parametrize("file", SOURCES, ids=_id)
def test_module_touches_only_what_its_row_may(file: Path) -> None:
    allowed = ROWS[FLOOR[_room(file)]].touches | ({"torch"} if _may_import_torch(file) else set())
    allowed |= {"numpy"} if _id(file) in NUMPY else set()
    roots = {name.split(".")[0] for name in _imports(file)}
    wrong = sorted(roots - sys.stdlib_module_names - {"dcpconv", "typing_extensions"} - allowed)
    assert not wrong, f"{_id(file)} may not touch {wrong}"


@pytest.mark.parametrize("file", FILES, ids=_id)
def test_file_is_short_and_ascii(file: Path) -> None:
    text = file.read_text()
    assert text.isascii()
    assert len(text.splitlines()) <= 400


def _loaded_after(statements: str) -> set[str]:
    """Names in ``sys.modules`` of a fresh interpreter once it ran ``statements``."""
    run = subprocess.run(
        [sys.executable, "-c", f"{statements}\nimport sys\nprint(*sys.modules)"],
        cwd=PACKAGE.parent,
        check=True,
        capture_output=True,
        text=True,
    )
    return set(run.stdout.split())


def test_importing_the_package_imports_no_tensor_library() -> None:
    assert not _loaded_after("import dcpconv") & {"torch", "numpy", "pydantic", "safetensors"}


def test_everything_that_needs_no_tensor_math_imports_without_torch() -> None:
    modules = [
        ".".join(("dcpconv", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        for file in SOURCES
        if not _may_import_torch(file) and file.stem != "__main__"
    ]
    assert modules
    statements = "\n".join(f"import {name}" for name in sorted(modules))
    assert not {"torch", "transformers"} & _loaded_after(statements)
