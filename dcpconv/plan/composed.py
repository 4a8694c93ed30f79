"""Tensors that exist nowhere yet: which elements of which stored tensors lie where in them.

Whatever only moves elements (stack, concatenate, cut, transpose, reshape) keeps every stored
tensor's share affine: a start, and axes that step through both sides.  So any chain of such moves
ends as pieces that any region can be filled from, and nothing is read to find out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dcpconv.core.catalog import TensorEntry, c_strides
from dcpconv.core.errors import LayoutError
from dcpconv.core.layout import Placement
from dcpconv.plan.coverage import Piece


@dataclass(frozen=True, slots=True)
class Range:
    """A walk through both tensors at once; at least two steps long.

    Attributes:
        length: How many elements it visits.
        stored: ``(dim, step)`` in the stored tensor.
        made: ``(dim, step)`` in the composed one.
    """

    length: int
    stored: tuple[int, int]
    made: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Strand:
    """The share of one stored tensor.

    Attributes:
        entry: The stored tensor.
        start: Index of its first element that takes part.
        at: Index of that element in the composed tensor.
        axes: How the others follow.
    """

    entry: TensorEntry
    start: tuple[int, ...]
    at: tuple[int, ...]
    axes: tuple[Range, ...]

    def piece(self, shape: tuple[int, ...]) -> Piece:
        """The same, as fills are made from it."""
        whole = Composed.stored(self.entry)
        if shape == whole.shape and self == whole.strands[0]:
            return Piece(self.entry)
        names = tuple(f"axis{i}" for i in range(len(self.axes)))
        lengths = {name: axis.length for name, axis in zip(names, self.axes, strict=True)}

        def placement(
            sizes: tuple[int, ...], start: tuple[int, ...], steps: Sequence[tuple[int, int]]
        ) -> Placement:
            by_dim: list[list[tuple[str, int]]] = [[] for _ in sizes]
            for name, (dim, step) in zip(names, steps, strict=True):
                by_dim[dim].append((name, step))
            dims = tuple(
                (base, tuple(sorted(some, key=lambda pair: -pair[1])))
                for base, some in zip(start, by_dim, strict=True)
            )
            return Placement(sizes, dims, lengths)

        return Piece(
            self.entry,
            placed=placement(self.entry.shape, self.start, [axis.stored for axis in self.axes]),
            wanted=placement(shape, self.at, [axis.made for axis in self.axes]),
        )


@dataclass(frozen=True, slots=True)
class Composed:
    """A tensor made of shares of stored ones.

    >>> from pathlib import Path
    >>> from dcpconv.core.dtypes import BY_LABEL
    >>> one = Composed.stored(TensorEntry("x", BY_LABEL["fp32"], (4, 6), ()))
    >>> Composed.stack([one.cut(0, 0, 2), one.cut(0, 2, 4)], 0).transpose(1, 2).shape
    (2, 6, 2)
    """

    shape: tuple[int, ...]
    strands: tuple[Strand, ...]

    @classmethod
    def stored(cls, entry: TensorEntry) -> Composed:
        """A stored tensor as it is."""
        zeros = (0,) * len(entry.shape)
        axes = tuple(
            Range(length, (dim, 1), (dim, 1))
            for dim, length in enumerate(entry.shape)
            if length != 1
        )
        return cls(entry.shape, (Strand(entry, zeros, zeros, axes),))

    @classmethod
    def stack(cls, parts: Sequence[Composed], dim: int) -> Composed:
        """Tensors of one shape along a new dim.

        Raises:
            LayoutError: Their shapes differ.
        """
        one = parts[0]
        at = dim % (len(one.shape) + 1)
        return cls.concatenate(
            [part.reshape((*part.shape[:at], 1, *part.shape[at:])) for part in parts], at
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Composed], dim: int) -> Composed:
        """Tensors end to end along ``dim``.

        Raises:
            LayoutError: Their other dims differ.
        """
        one = parts[0]
        dim = _dim(dim, one.shape)
        strands: list[Strand] = []
        length = 0
        for part in parts:
            if _without(part.shape, dim) != _without(one.shape, dim):
                raise LayoutError(
                    "tensors that are laid end to end have other shapes",
                    [("first", list(one.shape)), ("other", list(part.shape)), ("along", dim)],
                )
            strands.extend(
                replace(strand, at=_moved(strand.at, dim, length)) for strand in part.strands
            )
            length += part.shape[dim]
        return cls((*one.shape[:dim], length, *one.shape[dim + 1 :]), tuple(strands))

    def transpose(self, one: int, other: int) -> Composed:
        """With two dims swapped."""
        one, other = _dim(one, self.shape), _dim(other, self.shape)
        order = list(range(len(self.shape)))
        order[one], order[other] = other, one
        return Composed(
            tuple(self.shape[dim] for dim in order),
            tuple(
                Strand(
                    strand.entry,
                    strand.start,
                    tuple(strand.at[dim] for dim in order),
                    tuple(
                        replace(axis, made=(order.index(axis.made[0]), axis.made[1]))
                        for axis in strand.axes
                    ),
                )
                for strand in self.strands
            ),
        )

    def cut(self, dim: int, start: int, stop: int) -> Composed:
        """What lies in ``[start, stop)`` of one dim."""
        dim = _dim(dim, self.shape)
        strands = tuple(part for strand in self.strands for part in _cut(strand, dim, start, stop))
        return Composed((*self.shape[:dim], stop - start, *self.shape[dim + 1 :]), strands)

    def split(self, dim: int, sizes: Sequence[int]) -> list[Composed]:
        """Cut along one dim into parts of these lengths.

        Raises:
            LayoutError: They do not add up.
        """
        dim = _dim(dim, self.shape)
        if sum(sizes) != self.shape[dim]:
            raise LayoutError(
                "a tensor cannot be cut into parts of these lengths",
                [("shape", list(self.shape)), ("dim", dim), ("lengths", list(sizes))],
            )
        parts, start = [], 0
        for size in sizes:
            parts.append(self.cut(dim, start, start + size))
            start += size
        return parts

    def reshape(self, shape: tuple[int, ...]) -> Composed:
        """The same elements in C order under another shape.

        Raises:
            LayoutError: It has another number of elements, or a stored tensor's share would be cut
                into more than one.
        """
        if math.prod(shape) != math.prod(self.shape):
            raise LayoutError(
                "a tensor cannot take this shape",
                [("found", list(self.shape)), ("expected", list(shape))],
            )
        if not math.prod(shape):
            entry = self.strands[0].entry if self.strands else None
            return Composed(shape, (_nothing(entry, shape),) if entry else ())
        old, new = c_strides(self.shape), c_strides(shape)
        return Composed(shape, tuple(_reshaped(strand, old, new, shape) for strand in self.strands))

    def pieces(self) -> tuple[Piece, ...]:
        """What it is made of, for a ``Target``."""
        if not math.prod(self.shape):
            return tuple(Piece(strand.entry) for strand in self.strands[:1])
        return tuple(strand.piece(self.shape) for strand in self.strands)


def _cut(strand: Strand, dim: int, start: int, stop: int) -> Iterator[Strand]:
    """A share within a range of one dim; several where an inner axis is cut."""
    steps = sorted(
        ((str(i), axis.made[1]) for i, axis in enumerate(strand.axes) if axis.made[0] == dim),
        key=lambda pair: -pair[1],
    )
    lengths = {str(i): axis.length for i, axis in enumerate(strand.axes)}
    inside = Placement((0,), ((strand.at[dim], tuple(steps)),), lengths)
    for box in inside.boxes((start,), (stop - start,)):
        first, at = list(strand.start), list(strand.at)
        axes: list[Range] = []
        for i, axis in enumerate(strand.axes):
            low, high = box.get(str(i), (0, axis.length))
            first[axis.stored[0]] += low * axis.stored[1]
            at[axis.made[0]] += low * axis.made[1]
            if high - low > 1:
                axes.append(replace(axis, length=high - low))
        at[dim] -= start
        yield Strand(strand.entry, tuple(first), tuple(at), tuple(axes))


def _reshaped(
    strand: Strand, old: tuple[int, ...], new: tuple[int, ...], shape: tuple[int, ...]
) -> Strand:
    rest = sum(index * stride for index, stride in zip(strand.at, old, strict=True))
    at = []
    for stride in new:
        at.append(rest // stride)
        rest %= stride
    axes: list[Range] = []
    for axis in strand.axes:
        axes.extend(_spread(axis, axis.made[1] * old[axis.made[0]], new, shape))
    last = list(at)
    for axis in axes:
        last[axis.made[0]] += (axis.length - 1) * axis.made[1]
    if any(index >= length for index, length in zip(last, shape, strict=True)):
        raise _crossing(shape)
    return Strand(strand.entry, strand.start, tuple(at), tuple(axes))


def _spread(
    axis: Range, step: int, strides: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[Range]:
    """An axis that steps ``step`` elements in C order, as axes that stay within a dim each."""
    dim = next((d for d, stride in enumerate(strides) if shape[d] > 1 and not step % stride), None)
    within = step // strides[dim] if dim is not None else 0
    if dim is None or within >= shape[dim]:
        raise _crossing(shape)
    room = -(-shape[dim] // within)
    if axis.length <= room:
        yield replace(axis, made=(dim, within))
        return
    if shape[dim] % within or axis.length % room:
        raise _crossing(shape)
    yield replace(axis, length=room, made=(dim, within))
    outer = (axis.stored[0], axis.stored[1] * room)
    yield from _spread(
        replace(axis, length=axis.length // room, stored=outer), step * room, strides, shape
    )


def _crossing(shape: tuple[int, ...]) -> LayoutError:
    return LayoutError(
        "a tensor cannot take this shape without being cut", [("expected", list(shape))]
    )


def _nothing(entry: TensorEntry, shape: tuple[int, ...]) -> Strand:
    """A share without elements, which still says whose it is."""
    zeros = (0,) * len(entry.shape)
    return Strand(entry, zeros, (0,) * len(shape), ())


def _dim(dim: int, shape: tuple[int, ...]) -> int:
    if not -len(shape) <= dim < len(shape):
        raise LayoutError("a tensor has no such dim", [("shape", list(shape)), ("dim", dim)])
    return dim % len(shape)


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])


def _moved(index: tuple[int, ...], dim: int, by: int) -> tuple[int, ...]:
    return (*index[:dim], index[dim] + by, *index[dim + 1 :])
