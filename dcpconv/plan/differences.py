"""By how much the tensors of two models differ, whatever forms and namings they are in."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dcpconv.core.dtypes import DType
from dcpconv.core.outline import Fill
from dcpconv.engine.comparing import Both, Pair, are_equal, measure
from dcpconv.plan.account import factors_of
from dcpconv.plan.canonical import IDLE_AS_ZEROS, Canonical, layer_of, slot_of
from dcpconv.plan.coverage import Target
from dcpconv.plan.fills import fill_of
from dcpconv.sources.understanding import Source
from dcpconv.stores.local import Sources

Status = Literal["equal", "close", "differs", "shape", "only_a", "only_b", "untold"]
"""Equal bit for bit; within the tolerance; beyond it; of another shape; only on one side; or of
elements that mean nothing beside each other, such as packed ones beside plain ones."""

SAME = frozenset({"equal", "close"})


@dataclass(frozen=True, slots=True)
class Apart:
    """By how much two tensors of one shape differ; a is the first.

    Attributes:
        differing: Elements of unequal value.
        max_abs: Largest |a-b|; infinite where only one side is finite or a number.
        at: Place of that element in the tensor; empty where none differs.
        mean_abs: Mean |a-b|.
        relative: Norm of a-b by the norm of a.
        cosine: Of the angle between a and b; NaN where one of them is zero.
        norm_ratio: Norm of b by the norm of a.
        squares: Sums of a*a, b*b and (a-b)*(a-b), to add tensors up.
    """

    differing: int
    max_abs: float
    at: tuple[int, ...]
    mean_abs: float
    relative: float
    cosine: float
    norm_ratio: float
    squares: tuple[float, float, float]

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values: ``null`` for what is no number, ``"inf"`` beyond all."""
        return {
            "differing": self.differing,
            "max_abs": plain(self.max_abs),
            "at": list(self.at),
            "mean_abs": plain(self.mean_abs),
            "relative": plain(self.relative),
            "cosine": plain(self.cosine),
            "norm_ratio": plain(self.norm_ratio),
        }


@dataclass(frozen=True, slots=True)
class Held:
    """What one side holds of a tensor.

    Attributes:
        keys: Stored keys that it is, or is part of.
        dtype: Label of its element type.
        shape: In the axes that are compared.
    """

    keys: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {"keys": list(self.keys), "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """One tensor on both sides.

    Attributes:
        name: Canonical name, or key where keys are compared.
        status: How the sides compare.
        a: What the first side holds; ``None`` where it lacks it.
        b: What the second side holds.
        apart: By how much they differ, where they were measured.
        slot: What it is; where keys are compared, the key with ``N`` for its numbers.
        layer: Of which layer; ``None`` beside the layers.
    """

    name: str
    status: Status
    a: Held | None
    b: Held | None
    apart: Apart | None = None
    slot: str = ""
    layer: int | None = None

    @property
    def numel(self) -> int:
        """Elements."""
        held = self.a or self.b
        return math.prod(held.shape) if held else 0

    @property
    def is_cast(self) -> bool:
        """Whether the element types differ."""
        return self.a is not None and self.b is not None and self.a.dtype != self.b.dtype

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {
            "name": self.name,
            "status": self.status,
            "slot": self.slot,
            "layer": self.layer,
            "a": self.a.to_json() if self.a else None,
            "b": self.b.to_json() if self.b else None,
            "apart": self.apart.to_json() if self.apart else None,
        }


def differences(
    sides: tuple[Source, Source],
    known: tuple[Canonical, Canonical],
    *,
    tolerance: float = 0.0,
    jobs: int | None = None,
    progress: Callable[[int], None] | None = None,
    total: Callable[[int], None] | None = None,
) -> list[TensorDiff]:
    """Every tensor of both sides, in no particular order; memory does not grow with the models.

    Args:
        sides: Both, as they were understood.
        known: Their tensors without their namings, under names that mean the same on both sides.
        tolerance: Largest |a-b| that counts as the same.
        jobs: Threads; as many as there are CPUs, 4 at most, by default.
        progress: Called from the threads with bytes of one side compared, or measured, since its
            last call.
        total: Called with the bytes of one side that will be compared, before the first is; and
            again with more, once it is known what has to be measured, too.

    Raises:
        FormatError: A file is missing, unreadable or too short.
        SourceChangedError: A file changed meanwhile.
    """
    with Sources.of(sides[0].catalog) as here, Sources.of(sides[1].catalog) as there:
        return _Work(sides, known, (here, there), tolerance, jobs, progress, total).run()


@dataclass(frozen=True, slots=True)
class _Work:
    """One comparison, both sides open."""

    sides: tuple[Source, Source]
    known: tuple[Canonical, Canonical]
    sources: Both
    tolerance: float
    jobs: int | None
    progress: Callable[[int], None] | None
    total: Callable[[int], None] | None

    def run(self) -> list[TensorDiff]:
        one, other = ({target.key: target for target in side.targets} for side in self.known)
        found = [
            *(self._alone(target, 0) for key, target in one.items() if key not in other),
            *(self._alone(target, 1) for key, target in other.items() if key not in one),
        ]
        tensors = [tensor for tensor in found if tensor is not None]
        both = [(target, other[key]) for key, target in one.items() if key in other]
        alike, measured = [], []
        for a, b in both:
            if a.shape != b.shape:
                tensors.append(self._tensor(a, b, "shape"))
            elif not self._means_values(a, b):
                tensors.append(self._tensor(a, b, "untold"))
            elif a.dtype is b.dtype and not (_is_product(a) or _is_product(b)):
                alike.append((a, b))
            else:
                measured.append((a, b))
        self._will_do(_nbytes(alike) + _nbytes(measured))
        equal = are_equal(
            map(_fills, alike), sources=self.sources, jobs=self.jobs, progress=self.progress
        )
        for (a, b), is_equal in zip(alike, equal, strict=True):
            if is_equal:
                tensors.append(self._tensor(a, b, "equal"))
            else:
                measured.append((a, b))
        self._will_do(_nbytes(alike) + _nbytes(measured))
        return [*tensors, *self._measured(measured)]

    def _will_do(self, nbytes: int) -> None:
        if self.total is not None:
            self.total(nbytes)

    def _measured(self, pairs: list[tuple[Target, Target]]) -> list[TensorDiff]:
        if not pairs:
            return []
        found = measure(
            map(_fills, pairs), sources=self.sources, jobs=self.jobs, progress=self.progress
        )
        tensors = []
        for (a, b), item in zip(pairs, found, strict=True):
            apart = Apart(
                item.differing,
                item.max_abs,
                _place(item.at, a.shape),
                item.mean_abs,
                item.relative,
                item.cosine,
                item.norm_ratio,
                item.squares,
            )
            status: Status = "close" if item.max_abs <= self.tolerance else "differs"
            tensors.append(self._tensor(a, b, status, apart))
        return tensors

    def _alone(self, target: Target, side: int) -> TensorDiff | None:
        if IDLE_AS_ZEROS.intersection(target.slots):
            from dcpconv.engine.execute import fill  # noqa: PLC0415 - few models have such slots

            box = _fill(target)
            buffer = bytearray(box.nbytes)
            fill(box, source=self.sources[side], into=memoryview(buffer))
            if not any(buffer):
                return None
        a, b = (target, None) if side == 0 else (None, target)
        return self._tensor(a, b, "only_a" if side == 0 else "only_b")

    def _means_values(self, a: Target, b: Target) -> bool:
        """Whether elements can be compared as numbers: those of scaled blocks only beside others
        of the same type, whose factors are compared too."""
        if _is_product(a) or _is_product(b):
            return _is_worth_something(a) and _is_worth_something(b)
        if a.dtype is b.dtype:
            return True
        catalogs = (self.sides[0].catalog, self.sides[1].catalog)
        has_factors = any(map(factors_of, catalogs, (a, b)))
        return not has_factors and not (_is_packed(a.dtype) or _is_packed(b.dtype))

    def _tensor(
        self, a: Target | None, b: Target | None, status: Status, apart: Apart | None = None
    ) -> TensorDiff:
        target = a or b
        assert target is not None  # noqa: S101
        slot, layer = slot_of(target), layer_of(target)
        return TensorDiff(target.key, status, _held(a), _held(b), apart, slot, layer)


def _held(target: Target | None) -> Held | None:
    if target is None:
        return None
    keys = tuple(dict.fromkeys(piece.entry.key for piece in target.pieces))
    return Held(keys, target.dtype.label, target.shape)


def _fills(pair: tuple[Target, Target]) -> Pair:
    """Of both sides; what has factors is multiplied out into the other side's type, as a conversion
    would."""
    a, b = pair
    return _fill(a, beside=b), _fill(b, beside=a)


def _fill(target: Target, *, beside: Target | None = None) -> Fill:
    dtype = beside.dtype if beside is not None and _is_product(target) else None
    return fill_of(target, (0,) * len(target.shape), target.shape, dtype=dtype)


def _is_product(target: Target) -> bool:
    """Whether its elements are multiplied by factors."""
    return any(piece.entry.factors is not None for piece in target.pieces)


def _is_worth_something(target: Target) -> bool:
    """Whether its elements are all products, or all numbers."""
    if _is_product(target):
        return all(piece.entry.factors is not None for piece in target.pieces)
    return target.dtype.is_floating_point


def _nbytes(pairs: list[tuple[Target, Target]]) -> int:
    return sum(one.nbytes for one, _ in pairs)


def _is_packed(dtype: DType) -> bool:
    return dtype.packed > 1


def _place(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Where an element lies, from its index in C order; empty for none.

    >>> _place(7, (3, 4)), _place(-1, (3, 4))
    ((1, 3), ())
    """
    if index < 0:
        return ()
    place = []
    for length in reversed(shape):
        index, at = divmod(index, length)
        place.append(at)
    return tuple(reversed(place))


def plain(value: float) -> float | str | None:
    """JSON has no word for infinity and NaN."""
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else "inf"
