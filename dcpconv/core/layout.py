"""Layout strings: the named axes of a stored tensor, and the copies that lead from one to another.

A layout names one axis per stored dim, outermost first; parentheses fuse several axes into one dim,
and brackets lay alternatives end to end.  ``(h two p) d`` is a matrix whose rows count heads, then
halves, then pairs.  Two layouts of the same axes differ in where an element is stored, never in its
value, so going from one to the other is a nest of strided copies and nothing is computed.

    layout  = dim dim ...
    dim     = axis | "(" dim dim ... ")" | "[" alternative "|" alternative ... "]"
    axis    = a letter and more letters or digits, or a bare number for a dim of fixed length
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from dcpconv.core.catalog import c_strides
from dcpconv.core.errors import LayoutError
from dcpconv.core.outline import Loop

_TOKEN = re.compile(r"\s*([A-Za-z][A-Za-z0-9_]*|\d+|[()\[\]|])")
_DEEPEST = 8  # nesting no real tensor needs; a hostile keymap should not recurse further


@dataclass(frozen=True, slots=True)
class Axis:
    """A named axis, or a fixed length where the name is a number."""

    name: str

    def length(self, sizes: Mapping[str, int]) -> int:
        return int(self.name) if self.name.isdigit() else sizes[self.name]


@dataclass(frozen=True, slots=True)
class Fused:
    """Nodes multiplied into one dim, the last one fastest."""

    nodes: tuple[Node, ...]

    def length(self, sizes: Mapping[str, int]) -> int:
        return math.prod(node.length(sizes) for node in self.nodes)


@dataclass(frozen=True, slots=True)
class Summed:
    """Alternatives laid end to end; each belongs to another slot."""

    alternatives: tuple[Fused, ...]

    def length(self, sizes: Mapping[str, int]) -> int:
        return sum(node.length(sizes) for node in self.alternatives)


Node = Axis | Fused | Summed

Steps = tuple[tuple[str, int], ...]
"""``(axis, step)`` outermost first: how far one step along the axis moves within a stored dim."""

Limits = dict[str, tuple[int, int]]
"""Half-open range per axis."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the elements of one slot lie in one stored tensor.

    Element ``i`` of axis ``a`` adds ``i * step`` to the index of its dim, which starts at ``base``.

    Attributes:
        shape: Shape of the whole stored tensor, in elements.
        dims: ``(base, steps)`` per stored dim.
        lengths: Length of every axis that occurs.
    """

    shape: tuple[int, ...]
    dims: tuple[tuple[int, Steps], ...]
    lengths: Mapping[str, int]

    def boxes(self, offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[Limits]:
        """Axis boxes that make up this slot's share of a region of the stored tensor.

        A region that cuts a fused dim in the middle of a head gives the cut head, the whole heads
        and the other cut head: at most ``2 * depth - 1`` boxes per dim.

        Args:
            offsets: First element of the region per stored dim.
            sizes: Length of the region per stored dim.
        """
        per_dim = [
            list(_cut(steps, self.lengths, offset - base, offset + size - base))
            for (base, steps), offset, size in zip(self.dims, offsets, sizes, strict=True)
        ]
        for combination in product(*per_dim):
            box: Limits = {}
            for ranges in combination:
                box.update(ranges)
            yield box

    def affine(self, strides: Sequence[int], offsets: Sequence[int]) -> tuple[int, dict[str, int]]:
        """Address of the slot's element 0 and the address step of every axis.

        Addresses count elements from the first element of a chunk that begins at ``offsets`` of
        the stored tensor and lies in memory with ``strides``.
        """
        address = 0
        by_axis: dict[str, int] = {}
        for (base, steps), stride, offset in zip(self.dims, strides, offsets, strict=True):
            address += (base - offset) * stride
            for axis, step in steps:
                by_axis[axis] = step * stride
        return address, by_axis


@dataclass(frozen=True, slots=True)
class Layout:
    """A parsed layout string.

    >>> Layout("[(h e) | (g e) | (g e)] d").shape({"h": 6, "g": 2, "e": 8, "d": 5})
    (80, 5)
    """

    text: str
    nodes: tuple[Node, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", _parse(self.text))
        _check_axes(self)

    @property
    def terms(self) -> int:
        """How many slots the tensor holds: the alternatives of its brackets, or 1."""
        found = _summed(self.nodes)
        return len(found.alternatives) if found else 1

    def axes(self, term: int = 0) -> tuple[str, ...]:
        """Axes of one slot in stored order, without fixed lengths."""
        return tuple(_names(self.nodes, term))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the stored tensor.

        Raises:
            LayoutError: ``sizes`` lacks an axis.
        """
        try:
            return tuple(node.length(sizes) for node in self.nodes)
        except KeyError as missing:
            raise LayoutError(
                f"layout needs the size of axis {missing.args[0]}", [("layout", self.text)]
            ) from None

    def place(self, sizes: Mapping[str, int], term: int = 0) -> Placement:
        """Where slot number ``term`` lies in the stored tensor.

        Raises:
            LayoutError: ``sizes`` lacks an axis.
        """
        shape = self.shape(sizes)
        dims = tuple(_place(node, sizes, term) for node in self.nodes)
        lengths = {axis: sizes[axis] for _, steps in dims for axis, _ in steps}
        return Placement(shape, dims, lengths)


def anonymous(shape: tuple[int, ...]) -> Placement:
    """The placement of a tensor that is stored on both sides in the same way, whatever that is."""
    names = tuple(f"dim{i}" for i in range(len(shape)))
    dims = tuple((0, ((name, 1),)) for name in names)
    return Placement(shape, dims, dict(zip(names, shape, strict=True)))


def overlap(one: Limits, other: Limits) -> Limits | None:
    """The box inside both, or ``None``; an axis that one of them does not name is not limited."""
    result = dict(other)
    for axis, (start, stop) in one.items():
        if axis in result:
            low, high = result[axis]
            low, high = max(start, low), min(stop, high)
            if low >= high:
                return None
            result[axis] = (low, high)
        else:
            result[axis] = (start, stop)
    return result


def nest(
    box: Limits, source_steps: Mapping[str, int], target_steps: Mapping[str, int]
) -> tuple[Loop, ...]:
    """The shortest loops that visit a box, in target order.

    Args:
        box: Ranges of every axis.
        source_steps: Address step of every axis on the source side, in elements.
        target_steps: The same on the target side.

    >>> box = {"h": (0, 2), "two": (0, 2), "p": (0, 3)}
    >>> nest(box, {"h": 6, "two": 3, "p": 1}, {"h": 6, "p": 2, "two": 1})
    ((2, 6, 6), (3, 1, 2), (2, 3, 1))
    """
    steps = sorted(
        (
            (stop - start, source_steps[axis], target_steps[axis])
            for axis, (start, stop) in box.items()
            if stop - start > 1
        ),
        key=lambda loop: (-loop[2], -loop[1]),
    )
    loops: list[Loop] = []
    for count, source, target in steps:
        if loops and loops[-1][1:] == (source * count, target * count):
            loops[-1] = (loops[-1][0] * count, source, target)
        else:
            loops.append((count, source, target))
    return tuple(loops)


def relabel(
    source: Layout, target: Layout, sizes: Mapping[str, int]
) -> tuple[tuple[Loop, ...], int]:
    """Loops that turn a whole tensor stored as ``source`` into one stored as ``target``.

    Args:
        source: Axes of the stored tensor, e.g. ``(h two p) d``.
        target: The same axes as the result stores them, e.g. ``(h p two) d``.
        sizes: Length of every axis, in elements.

    Returns:
        The loops, outermost first, and how many contiguous runs they make: Llama-3-8B's ``wq``
        gives 4096 runs of one 4096-element row.

    Raises:
        LayoutError: The two layouts do not name the same axes, or ``sizes`` lacks one.

    Source:
        Meta and Lingua rotate neighbours (``lingua/transformer.py``, ``apply_rotary_emb``); HF
        rotates halves (``modeling_llama.py``, ``rotate_half``).

    >>> relabel(Layout("(two p)"), Layout("(p two)"), {"two": 2, "p": 3})
    (((3, 1, 2), (2, 3, 1)), 6)
    """
    if sorted(source.axes()) != sorted(target.axes()):
        raise LayoutError(
            "the two layouts do not name the same axes",
            [("source", source.text), ("target", target.text)],
        )
    placed, wanted = source.place(sizes), target.place(sizes)
    _, source_steps = placed.affine(c_strides(placed.shape), (0,) * len(placed.shape))
    _, target_steps = wanted.affine(c_strides(wanted.shape), (0,) * len(wanted.shape))
    loops = nest({a: (0, n) for a, n in placed.lengths.items()}, source_steps, target_steps)
    inner = loops[-1][0] if loops and loops[-1][1:] == (1, 1) else 1
    return loops, math.prod(placed.shape) // inner


def _cut(steps: Steps, lengths: Mapping[str, int], start: int, stop: int) -> Iterator[Limits]:
    """Boxes of the axes whose index ``sum(i * step)`` falls into ``[start, stop)``."""
    if start >= stop:
        return
    if not steps:
        if start <= 0 < stop:
            yield {}
        return
    (axis, step), inner = steps[0], steps[1:]
    length = lengths[axis]
    span = sum((lengths[name] - 1) * width for name, width in inner) + 1
    if any(lengths[name] == 0 for name, _ in steps):
        return
    # Values of this axis that lie inside as a whole, then the ones that a border cuts.
    first = max(0, -(-start // step))
    last = min(length, (stop - span) // step + 1)
    whole = range(first, max(first, last))
    touched = range(max(0, (start - span) // step + 1), min(length, -(-stop // step)))
    before = range(touched.start, min(touched.stop, whole.start))
    after = range(max(touched.start, whole.stop), touched.stop)
    for value in before:
        for box in _cut(inner, lengths, start - value * step, stop - value * step):
            yield {axis: (value, value + 1), **box}
    if whole:
        yield {axis: (whole.start, whole.stop), **{name: (0, lengths[name]) for name, _ in inner}}
    for value in after:
        for box in _cut(inner, lengths, start - value * step, stop - value * step):
            yield {axis: (value, value + 1), **box}


def _place(node: Node, sizes: Mapping[str, int], term: int) -> tuple[int, Steps]:
    """Base and steps of a node, both counted in its own elements."""
    if isinstance(node, Axis):
        return (0, ()) if node.name.isdigit() else (0, ((node.name, 1),))
    if isinstance(node, Summed):
        before = sum(other.length(sizes) for other in node.alternatives[:term])
        base, steps = _place(node.alternatives[term], sizes, term)
        return before + base, steps
    base, steps = 0, ()
    inner = node.length(sizes)
    for child in node.nodes:
        length = child.length(sizes)
        inner = inner // length if length else 0
        child_base, child_steps = _place(child, sizes, term)
        base += child_base * inner
        steps += tuple((axis, step * inner) for axis, step in child_steps)
    return base, steps


def _names(nodes: Sequence[Node], term: int) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, Axis):
            if not node.name.isdigit():
                yield node.name
        elif isinstance(node, Summed):
            yield from _names(node.alternatives[term].nodes, term)
        else:
            yield from _names(node.nodes, term)


def _summed(nodes: Sequence[Node]) -> Summed | None:
    for node in nodes:
        found = node if isinstance(node, Summed) else None
        if isinstance(node, Fused):
            found = _summed(node.nodes)
        if found:
            return found
    return None


def _check_axes(layout: Layout) -> None:
    if layout.text.count("[") > 1:
        raise LayoutError("a layout has at most one pair of brackets", [("layout", layout.text)])
    for term in range(layout.terms):
        names = layout.axes(term)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise LayoutError(
                f"axis {', '.join(twice)} occurs twice in one tensor", [("layout", layout.text)]
            )


def _parse(text: str) -> tuple[Node, ...]:
    tokens: list[str] = []
    position = 0
    while text[position:].strip():
        found = _TOKEN.match(text, position)
        if not found:
            raise LayoutError(
                f"cannot read the layout at {text[position:].strip()[:10]!r}", [("layout", text)]
            )
        tokens.append(found.group(1))
        position = found.end()
    nodes, rest = _sequence(tokens, 0, text, 0)
    if rest != len(tokens):
        raise LayoutError(f"unexpected {tokens[rest]!r}", [("layout", text)])
    return nodes


def _sequence(tokens: list[str], at: int, text: str, depth: int) -> tuple[tuple[Node, ...], int]:
    if depth > _DEEPEST:
        raise LayoutError("parentheses are nested too deeply", [("layout", text)])
    nodes: list[Node] = []
    while at < len(tokens) and tokens[at] not in ")]|":
        if tokens[at] == "(":
            inner, at = _sequence(tokens, at + 1, text, depth + 1)
            at = _expect(tokens, at, ")", text)
            nodes.append(Fused(inner))
        elif tokens[at] == "[":
            alternatives: list[Fused] = []
            at += 1
            while True:
                inner, at = _sequence(tokens, at, text, depth + 1)
                if not inner:
                    raise LayoutError("an alternative in brackets is empty", [("layout", text)])
                alternatives.append(Fused(inner))
                if at < len(tokens) and tokens[at] == "|":
                    at += 1
                    continue
                break
            at = _expect(tokens, at, "]", text)
            nodes.append(Summed(tuple(alternatives)))
        else:
            nodes.append(Axis(tokens[at]))
            at += 1
    return tuple(nodes), at


def _expect(tokens: list[str], at: int, token: str, text: str) -> int:
    if at >= len(tokens) or tokens[at] != token:
        found = repr(tokens[at]) if at < len(tokens) else "the end"
        raise LayoutError(f"expected {token!r}, found {found}", [("layout", text)])
    return at + 1
