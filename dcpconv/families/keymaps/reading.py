"""Reads a table from TOML and checks that it keeps the rules; every problem is listed at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

import pydantic

from dcpconv.core.declared import AXIS, KIND, check_kind, check_size
from dcpconv.core.errors import KeymapError, LayoutError
from dcpconv.core.spec import ModelSpec
from dcpconv.families.keymaps.building import complete, declared_of, keymap_of, row_of, tie_of
from dcpconv.families.keymaps.table import Keymap, Pattern, Row
from dcpconv.families.keymaps.words import AXES, CONDITIONS, INDICES
from dcpconv.stores.local import read_regular

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_FACTS = frozenset({*ModelSpec.model_fields, "per_token", "norm_top1"})
"""Fields of ``[spec]``: the model's, and two of its experts."""

_LARGEST = 1 << 24
"""Bytes; the longest table we have takes 12 kB."""

_HINTS = frozenset({*ModelSpec.model_fields, "q_per_kv"})


class _Published(pydantic.BaseModel):
    """Sizes of a released model, and the head counts that its shapes do not say."""

    model_config = pydantic.ConfigDict(extra="forbid")

    name: str
    hidden_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int


class _Table(pydantic.BaseModel):
    """The TOML file as written."""

    model_config = pydantic.ConfigDict(extra="forbid")

    name: str = pydantic.Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    title: str = ""
    family: str = ""
    config: str = ""
    architectures: tuple[str, ...] = ()
    root: str = ""
    source: str = ""
    like: str = ""
    without: tuple[str, ...] = ()
    moved: dict[str, str] = {}
    keys: dict[str, tuple[str, str] | tuple[str, str, str]]
    tied: dict[str, str | tuple[str, Literal["omitted"]]] = {}
    ignore: dict[str, str] = {}
    aside: dict[str, str] = {}
    also: tuple[str, ...] = ()
    always: tuple[str, ...] = ()
    derived: dict[str, Literal["zeros", "inv_freq"]] = {}
    beyond: dict[str, str] = {}
    idle: dict[str, str] = {}
    axes: dict[str, str | dict[str, str]] = {}
    kinds: dict[str, str | tuple[str, ...]] = {}
    kept: dict[str, str] = {}
    same_sizes: dict[str, str] = {}
    by_name: bool = False
    hints: dict[str, int | bool] = {}
    spec: dict[str, int | float | bool] = {}
    published: tuple[_Published, ...] = ()


def read_keymap(path: Path) -> Keymap:
    """Reads and checks a table.

    Raises:
        KeymapError: The file cannot be read, or breaks a rule; every problem is listed with its
            line.
    """
    text = ""
    try:
        text = read_regular(path, most=_LARGEST).decode("utf-8")
        stated = tomllib.loads(text)
        if "like" in stated:
            stated.setdefault("keys", {})  # all of its rows may be the other's
        table = _Table.model_validate(stated)
    except pydantic.ValidationError as error:
        lines = text.splitlines()
        facts = [
            (f"{path.name}:{line_of(lines, item['loc'])}", f"{_place(item['loc'])}: {item['msg']}")
            for item in error.errors()
        ]
        raise KeymapError("the keymap has fields of the wrong kind", facts) from None
    except (OSError, ValueError, RecursionError) as error:  # TOML of 5,000 digits, or levels
        raise KeymapError("cannot read the keymap", [("file", path), ("because", error)]) from None
    whole = _Table.model_validate(complete(stated)) if table.like else table
    return _Builder(path, text, whole).build()


def _place(loc: tuple[int | str, ...]) -> str:
    # A row is a union of lengths; which member complained is no place in the file.
    return ".".join(str(part) for part in loc if not str(part).startswith("tuple["))


def line_of(lines: list[str], loc: tuple[int | str, ...]) -> int:
    """The line of a field or key, or 1."""
    for part in reversed(loc):
        for number, text in enumerate(lines, 1):
            bare = text.strip()
            if bare.startswith((f'"{part}"', f"{part} ", f"{part}=", f"[{part}]", f"[[{part}]]")):
                return number
    return 1


class _Builder:
    """Turns a validated table into a Keymap, collecting every problem on the way."""

    def __init__(self, path: Path, text: str, table: _Table) -> None:
        self.path = path
        self.lines = text.splitlines()
        self.table = table
        self.problems: list[tuple[str, str]] = []
        self.declared = declared_of(table.axes, table.kinds)
        own = self.declared.axes.keys()
        self.axes = {**AXES, **dict.fromkeys(own)}
        self.indices = {*INDICES, *(axis for axis in own if len(axis) == 1 and axis.isupper())}
        self.conditions = [*CONDITIONS, *self.declared.kinds]

    def build(self) -> Keymap:
        table = self.table
        rows = tuple(row for item in table.keys.items() if (row := self._row(*item)))
        known = {row.pattern.text for row in rows}
        for tie in (tie_of(*item) for item in table.tied.items()):
            if tie.owner not in known:
                self._problem(tie.key, f"its owner {tie.owner} is no key of the table")
        unheld = [Pattern(key) for key in (*table.ignore, *table.aside)]
        self._check_overlaps(rows, table.tied, unheld)
        self._check_slots(rows)
        self._check_names(rows, known)
        self._check_declared()
        if self.problems:
            raise KeymapError("the keymap breaks the rules of a table", self.problems)
        return keymap_of(table.model_dump(), self.path)

    def _check_names(self, rows: tuple[Row, ...], known: set[str]) -> None:
        """Names elsewhere in the file lead to keys, slots and axes that exist."""
        slots = {slot for row in rows for slot in row.slots}
        for slot in self.table.always:
            if slot not in slots:
                self._problem("always", f"no row holds {slot}")
        for key in self.table.derived:
            if key not in known and key not in self.table.ignore:
                self._problem(key, "is derived, but neither a key nor ignored")
        for axis in {*self.table.same_sizes, *self.table.same_sizes.values()} - self.axes.keys():
            self._problem("same_sizes", f"there is no axis {axis}")
        for name in self.table.beyond.keys() - self.indices - self.declared.kinds.keys():
            self._problem(name, "is neither an index nor a kind of layer")
        for name in {*self.table.idle, *self.table.idle.values()} - self.indices:
            self._problem(name, "is no index of a key")
        for name in self.table.spec.keys() - _FACTS:
            self._problem(name, "a model has no such field")
        for name in self.table.hints.keys() - _HINTS:
            self._problem(name, "no shape and no config says this")

    def _check_declared(self) -> None:
        """Rules for axes and kinds can be read, and kinds that have sizes exist."""
        declared = self.declared
        for axes in (declared.axes, *declared.of_kind.values()):
            for axis, rule in axes.items():
                if not AXIS.fullmatch(axis):
                    self._problem(axis, "is no name of an axis: letters and digits")
                elif axes is not declared.axes and axis not in self.axes:
                    self._problem(axis, f"is no axis; there is {', '.join(self.axes)}")
                self._checked(axis, check_size, rule)
        for kind in declared.of_kind.keys() - declared.kinds.keys():
            self._problem(f"axes.{kind}", f"there is no kind {kind}; [kinds] says which there are")
        for kind, rules in declared.kinds.items():
            if not KIND.fullmatch(kind):
                self._problem(kind, "is no name of a kind: small letters")
            for rule in rules:
                self._checked(kind, check_kind, rule, declared.kinds)
        prefixes = list(self.table.kept)
        for prefix in prefixes:
            if not prefix.endswith("."):
                self._problem(prefix, "is no prefix: it has to end with a dot")
            if any(other != prefix and other.startswith(prefix) for other in prefixes):
                self._problem(prefix, "begins another prefix")

    def _checked(self, key: str, check: Callable[..., None], *said: object) -> None:
        try:
            check(*said)
        except LayoutError as error:
            self._problem(key, error.headline)

    def _problem(self, key: str, what: str) -> None:
        line = line_of(self.lines, (key,))
        self.problems.append((f"{self.path.name}:{line}", f"{key}: {what}"))

    def _row(self, key: str, value: tuple[str, ...]) -> Row | None:
        try:
            row = row_of(key, value)
        except LayoutError as error:
            self._problem(key, error.headline)
            return None
        pattern, slots, layout = row.pattern, row.slots, row.layout
        if layout.terms != len(slots):
            self._problem(key, f"{len(slots)} slots but {layout.terms} alternatives in the layout")
            return None
        for word in sorted(row.conditions - set(self.conditions)):
            self._problem(key, f"no condition {word!r}; there is {', '.join(self.conditions)}")
        axes = {axis for term in range(layout.terms) for axis in layout.axes(term)}
        for axis in sorted(axes - self.axes.keys()):
            self._problem(key, f"axis {axis} has no size; there is {', '.join(self.axes)}")
        for name in sorted(set(pattern.names) - self.indices):
            self._problem(
                key, f"{{{name}}} is no index; there is {', '.join(sorted(self.indices))}"
            )
        repeated = set(pattern.names) & axes
        if repeated or len(set(pattern.names)) != len(pattern.names):
            self._problem(key, f"index {', '.join(sorted(repeated or pattern.names))} occurs twice")
        return row

    def _check_overlaps(
        self,
        rows: tuple[Row, ...],
        tied: Collection[str],
        unheld: list[Pattern],
    ) -> None:
        own = [row.pattern for row in rows]
        texts = {pattern.text for pattern in own}
        patterns = [
            *own,
            *(Pattern(key) for key in tied if key not in texts),
            *unheld,
        ]
        seen: dict[str, list[Pattern]] = {}
        for pattern in patterns:
            for other in seen.setdefault(pattern.template, []):
                fixed, others = dict(pattern.fixed), dict(other.fixed)
                if all(fixed[at] == others[at] for at in fixed.keys() & others.keys()):
                    self._problem(pattern.text, f"matches the same keys as {other.text}")
            seen[pattern.template].append(pattern)

    def _check_slots(self, rows: tuple[Row, ...]) -> None:
        seen: dict[str, Row] = {}
        for row in rows:
            for term, slot in enumerate(row.slots):
                first = seen.setdefault(slot, row)
                if first is row:
                    continue
                if first.conditions == row.conditions or not (first.when and row.when):
                    self._problem(
                        row.pattern.text,
                        f"slot {slot} is also held by {first.pattern.text}; give each row its own"
                        " condition if only one of them exists at a time",
                    )
                elif first.axes(first.slots.index(slot)) != row.axes(term):
                    self._problem(row.pattern.text, f"slot {slot} has other axes elsewhere")
