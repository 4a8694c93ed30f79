"""The report of a comparison that people read: who, the picture, what changed most, the answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from dcpconv.comparing.records import By, Diff, Group
from dcpconv.plan.canonical import LAYOUTS
from dcpconv.plan.differences import SAME, TensorDiff
from dcpconv.plan.matrix import Mark, draw, make_grid

_LISTED = 20
"""Lines of one kind before the rest is only counted; JSON has them all."""

_STATUS = {
    "shape": "!",
    "only_a": "a",
    "only_b": "b",
    "untold": "?",
    "close": "~",
    "equal": "=",
}
_DIGITS = "0123456789"

LEGEND: Mapping[str, str] = {
    "!": "another shape",
    "a": "only in a",
    "b": "only in b",
    "?": "not comparable",
    **{
        digit: f"changed by {'all of its norm or more' if digit == '0' else f'1e-{digit} or more'}"
        for digit in _DIGITS
    },
    "~": "within the tolerance",
    "=": "equal",
}
"""ASCII, so that they survive pipes and logs; a cell of several tensors shows the first that
applies.  Digits count how small the difference is, relative to the norm."""


def glyph_of(tensor: TensorDiff) -> str:
    """What a tensor is drawn as.

    >>> from dcpconv.plan.differences import Apart
    >>> apart = Apart(1, 0.5, (0,), 0.1, 0.02, 1.0, 1.0, (1.0, 1.0, 4e-4))
    >>> glyph_of(TensorDiff("embed", "differs", None, None, apart))
    '2'
    """
    found = _STATUS.get(tensor.status)
    if found is not None:
        return found
    relative = tensor.apart.relative if tensor.apart else math.inf
    if not relative < 1:
        return "0"
    return str(min(9, math.ceil(-math.log10(relative)))) if relative > 0 else "9"


def lines(diff: Diff, *, by: By | None = None) -> Iterator[str]:
    """The report line by line."""
    yield from ends(diff)
    marks = (
        Mark(
            glyph_of(tensor),
            tensor.name,
            (tensor.slot,) if tensor.slot in LAYOUTS else (),
            () if tensor.layer is None else (tensor.layer,),
        )
        for tensor in diff.tensors
    )
    yield ""
    yield from draw(make_grid(marks, "".join(LEGEND)), LEGEND)
    yield ""
    if by is not None:
        yield from _table(diff.groups(by), by)
        yield ""
    else:
        yield from _differences(diff)
    for text in diff.notes:
        yield f"note      {text}"
    yield verdict(diff)


def ends(diff: Diff) -> Iterator[str]:
    """Who is compared with whom."""
    for label, end, family in (("a", diff.a, diff.families[0]), ("b", diff.b, diff.families[1])):
        naming = family or "as stored"
        yield f"{label:<9} {end.form:<7} {naming:<12} {end.keys:>6,} keys  {end.path}"


def verdict(diff: Diff) -> str:
    """The answer in one line."""
    total = len(diff.tensors)
    equal, close = len(diff.of("equal")), len(diff.of("close"))
    if diff:
        beyond = f"; {close:,} of them within {_number(diff.tolerance)}" if close else ""
        exactly = ", bit for bit" if equal == total else beyond
        return f"yes       they are the same: {_count(total)}{exactly}"
    if not diff.is_told:
        return (
            f"unknown   {_count(len(diff.of('untold')))} cannot be compared; the rest is the same"
        )
    return f"no        they differ: {total - equal - close:,} of {_count(total)}"


def _differences(diff: Diff) -> Iterator[str]:
    yield from _some("shape", [_shapes(tensor) for tensor in diff.of("shape")])
    yield from _some("only in a", [_named(tensor) for tensor in diff.of("only_a")])
    yield from _some("only in b", [_named(tensor) for tensor in diff.of("only_b")])
    yield from _some("unlike", [_types(tensor) for tensor in diff.of("untold")])
    yield from _measured("value", diff.of("differs"))
    yield from _measured("close", diff.of("close"))


def _measured(label: str, tensors: Sequence[TensorDiff]) -> Iterator[str]:
    shown = tensors[:_LISTED]
    width = max((len(tensor.name) for tensor in shown), default=0)
    rows = [change(tensor).split("  ") for tensor in shown]
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    for tensor, row in zip(shown, rows, strict=True):
        cells = "  ".join(f"{cell:<{wide}}" for cell, wide in zip(row, widths, strict=False))
        yield f"{label:<9} {tensor.name:<{width}}  {cells}".rstrip()
    yield from _rest(label, len(tensors))


def change(tensor: TensorDiff) -> str:
    """By how much a tensor changed, in a line; empty where it was not measured."""
    apart = tensor.apart
    if apart is None:
        return ""
    cast = ""
    if tensor.a and tensor.b and tensor.is_cast:
        cast = f"  {tensor.a.dtype} and {tensor.b.dtype}"
    if not apart.differing:
        return f"equal values{cast}"
    place = f" at {list(apart.at)}" if apart.at else ""
    return (
        f"relative {_number(apart.relative)}  max |a-b| {_number(apart.max_abs)}{place}"
        f"  mean {_number(apart.mean_abs)}  cosine {_cosine(apart.cosine)}"
        f"  |b|/|a| {_cosine(apart.norm_ratio)}"
        f"  {apart.differing:,} of {tensor.numel:,} differ{cast}"
    )


def _table(groups: Sequence[Group], by: By) -> Iterator[str]:
    names = ["-" if group.name is None else str(group.name) for group in groups]
    width = max([len(by), *map(len, names)])
    yield f"{by:<{width}}  {'tensors':>8} {'changed':>8} {'relative':>10} {'max |a-b|':>10}  most"
    for name, group in zip(names, groups, strict=True):
        most = group.worst.name if group.worst.status not in SAME else ""
        yield (
            f"{name:<{width}}  {group.tensors:>8,} {group.changed:>8,}"
            f" {_number(group.relative):>10} {_number(group.max_abs):>10}  {most}".rstrip()
        )


def _shapes(tensor: TensorDiff) -> str:
    shapes = [list(held.shape) if held else [] for held in (tensor.a, tensor.b)]
    return f"{tensor.name}  {shapes[0]} != {shapes[1]}"


def _types(tensor: TensorDiff) -> str:
    dtypes = [held.dtype if held else "" for held in (tensor.a, tensor.b)]
    return (
        f"{tensor.name}  {dtypes[0]} with factors beside {dtypes[1]}: multiply one out first,"
        " with `dcpconv convert --dequantize`"
    )


def _named(tensor: TensorDiff) -> str:
    held = tensor.a or tensor.b
    keys = [key for key in held.keys if key != tensor.name] if held else []
    return f"{tensor.name}  ({', '.join(keys[:2])})" if keys else tensor.name


def _some(label: str, texts: Sequence[str]) -> Iterator[str]:
    for text in texts[:_LISTED]:
        yield f"{label:<9} {text}"
    yield from _rest(label, len(texts))


def _rest(label: str, count: int) -> Iterator[str]:
    if count > _LISTED:
        yield f"{label:<9} and {count - _LISTED:,} more; --json lists them all"


def _count(number: int) -> str:
    return f"{number:,} tensor{'' if number == 1 else 's'}"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _cosine(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".") if math.isfinite(value) else str(value)
