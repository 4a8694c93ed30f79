"""How long every axis is, in every layer, as far as config and shapes say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from dcpconv.core.layout import Placement
from dcpconv.core.spec import Declared, ModelSpec
from dcpconv.families.keymaps import Keymap, Row

if TYPE_CHECKING:
    from dcpconv.core.declared import Measured

Differing = tuple[tuple[str, int], ...]
"""Sizes that some layers have otherwise than most."""


class Sizes:
    """The sizes of a model as two namings see it.

    Args:
        spec: What its parameter file says; without it sizes come from the shapes where they can.
        tables: Both namings, whose declarations count.

    Attributes:
        usual: Size of every axis, as most layers have it; shapes add to it.
        measured: What config and tables say; ``None`` without a config.
    """

    def __init__(self, spec: ModelSpec | None, tables: Iterable[Keymap]) -> None:
        declared = [table.declared for table in tables if table.declared]
        self.measured = None if spec is None else _measured(spec, declared)
        self.usual: dict[str, int] = {} if self.measured is None else dict(self.measured.axes())
        self._own = {axis for one in declared for axis in one.axes}
        self._known = frozenset(self.usual)
        self._shapes: dict[tuple[Row, Differing], tuple[int, ...]] = {}
        self._placements: dict[tuple[Row, int, Differing], Placement] = {}

    def idle(self, table: Keymap, indices: Mapping[str, int]) -> bool:
        """Whether nothing looks at a tensor of a table, so that files may lack it."""
        return any(
            indices.get(name, -1) >= self.usual.get(of, 0) for name, of in table.idle.items()
        )

    def says(self, row: Row) -> bool:
        """Whether the config decides if a row exists; else the source's keys do."""
        measured = self.measured
        is_said = isinstance(measured, ModelSpec) or (
            measured is not None and measured.knows(row.when)
        )
        return is_said and not self.lacks(row)

    def lacks(self, row: Row) -> bool:
        """Whether no field of the config gives the size of an axis that a table declares."""
        if self.measured is None or not self._own:
            return False
        axes = {axis for term in range(len(row.slots)) for axis in row.axes(term)}
        return not axes & self._own <= self._known

    def has(self, condition: str, indices: Mapping[str, int]) -> bool:
        """Whether a row exists, where the config decides it."""
        return self.measured is not None and self.measured.has(condition, indices.get("L", 0))

    def beyond(self, table: Keymap, row: Row, indices: Mapping[str, int]) -> str | None:
        """Why a key is dropped that the model does not count, where its table says so: an index
        that the config does not reach, or a layer that is not of the kind that the row is for."""
        for name, reason in table.beyond.items():
            if name in indices and indices[name] >= self.usual.get(name, 2**31):
                return reason
            if name in row.conditions and self.says(row) and not self.has(name, indices):
                return reason
        return None

    def shape(self, row: Row, indices: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of a tensor that a row describes.

        Raises:
            LayoutError: A size is not known.
        """
        differing = self._differing(indices)
        found = self._shapes.get((row, differing))
        if found is None:
            found = row.layout.shape(self._in(differing))
            self._shapes[row, differing] = found
        return found

    def place(self, row: Row, term: int, indices: Mapping[str, int]) -> Placement:
        """Where a slot lies in a tensor that a row describes.

        Raises:
            LayoutError: A size is not known.
        """
        differing = self._differing(indices)
        found = self._placements.get((row, term, differing))
        if found is None:
            found = row.layout.place(self._in(differing), term)
            self._placements[row, term, differing] = found
        return found

    def _differing(self, indices: Mapping[str, int]) -> Differing:
        measured = self.measured
        if measured is None or isinstance(measured, ModelSpec):
            return ()
        return measured.differing(indices.get("L"))

    def _in(self, differing: Differing) -> Mapping[str, int]:
        return {**self.usual, **dict(differing)} if differing else self.usual


def _measured(spec: ModelSpec, declared: Sequence[Declared]) -> ModelSpec | Measured:
    """The model itself, where no table says more of its layers."""
    if not declared:
        return spec
    from dcpconv.core.declared import Measured  # noqa: PLC0415 - few tables declare anything

    return Measured(spec, declared)


def in_common(source: Keymap, target: Keymap) -> dict[str, str]:
    """Axes that both sides have to call the same, and what they are called.

    Where one side fuses axes of equal size, neither tells them apart.  Where one side counts query
    heads within their key and value head, so do both.
    """
    same = {**source.same_sizes, **target.same_sizes}
    if not (_counts_within(source) or _counts_within(target)):
        return same
    return {"h": "g", "r": "1"} if same else {"h": "(g r)"}


def _counts_within(table: Keymap) -> bool:
    return any("r" in row.axes(term) for row in table.rows for term in range(len(row.slots)))


def solve(row: Row, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Adds to ``sizes`` what a stored shape reveals: dims with exactly one axis of unknown size.

    A fused dim such as ``(h e)`` reveals nothing by itself: 512 rows may be 8 heads of 64 or 16
    of 32.
    """
    if row.layout.terms > 1 or len(row.layout.nodes) != len(shape):
        return
    for node, length in zip(row.layout.nodes, shape, strict=True):
        names = axis_names(node)
        unknown = [name for name in names if name not in sizes]
        if len(unknown) != 1 or names.count(unknown[0]) != 1:
            continue
        known = 1
        for name in names:
            known *= sizes.get(name, 1)
        if known and length % known == 0:
            sizes[unknown[0]] = length // known
    if "p" in sizes:
        sizes.setdefault("e", 2 * sizes["p"])
    elif sizes.get("e", 1) % 2 == 0:
        sizes["p"] = sizes["e"] // 2


def axis_names(node: object) -> list[str]:
    """Axes of one dim of a layout; none for a fixed length, and for slots laid end to end."""
    nodes = getattr(node, "nodes", None)
    if nodes is not None:
        return [name for child in nodes for name in axis_names(child)]
    name = getattr(node, "name", "1")
    return [] if name.isdigit() else [name]
