"""Meta's rule for the feed-forward width, and its exact inverse."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FfnWidth:
    """What a parameter file states instead of a width.

    Attributes:
        multiple_of: The width is rounded up to a multiple of it.
        multiplier: Factor on the usual 8/3 of the hidden size, or ``None`` for 1.
    """

    multiple_of: int
    multiplier: float | None


def ffn_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width of the feed-forward block, in channels.

    Source:
        ``lingua/transformer.py`` ``FeedForward.__init__`` at facebookresearch/lingua@437d680,
        called with ``hidden_dim=4 * dim``; Meta's Llama releases state the same rule.

    >>> ffn_width(4096, 256, 1.3)
    14336
    """
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def solve_ffn(dim: int, ffn: int) -> FfnWidth:
    """Parameters from which the rule computes exactly ``ffn``.

    Plain answers first: no multiplier, then the fewest decimals that land in the window of
    products which round up to ``ffn``.  Where four decimals are too coarse, rounding is switched
    off and the product aims at the middle of the unit interval that truncates to ``ffn``: the
    relative error of two float operations is far below the half unit to either side.

    Raises:
        ValueError: ``dim`` or ``ffn`` is below 1.

    >>> solve_ffn(4096, 14336)
    FfnWidth(multiple_of=256, multiplier=1.3)
    """
    if dim < 1 or ffn < 1:
        raise ValueError(f"dim and ffn must be at least 1, found {dim} and {ffn}")
    # The largest power of two that divides ffn; above 256 the window would only get coarser names.
    multiple_of = min(ffn & -ffn, 256)
    base = ffn_width(dim, 1, None)
    # The products that round up to ffn lie above ffn - multiple_of and at most at ffn.
    middle = (ffn - multiple_of / 2) / base
    for multiplier in (None, *(round(middle, decimals) for decimals in range(1, 5))):
        if ffn_width(dim, multiple_of, multiplier) == ffn:
            return FfnWidth(multiple_of, multiplier)
    return FfnWidth(1, (ffn + 0.5) / base)
