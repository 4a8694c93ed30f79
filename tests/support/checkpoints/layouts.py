"""Random layouts, and what torch makes of them."""

from __future__ import annotations

import random

import torch

from dcpconv.core.layout import Layout


def stored_layout(rng: random.Random, axes: list[str]) -> str:
    """A random way to store the axes: any order, any grouping into dims."""
    order = rng.sample(axes, len(axes))
    dims: list[list[str]] = [[order[0]]]
    for axis in order[1:]:
        if rng.random() < 0.5:
            dims[-1].append(axis)
        else:
            dims.append([axis])
    return " ".join(f"({' '.join(dim)})" if len(dim) > 1 else dim[0] for dim in dims)


def as_stored(values: torch.Tensor, axes: list[str], layout: Layout) -> torch.Tensor:
    """``values`` indexed by ``axes``, as a tensor in ``layout``."""
    order = [axes.index(axis) for axis in layout.axes()]
    sizes = dict(zip(axes, values.shape, strict=True))
    return values.permute(order).reshape(layout.shape(sizes))


def matrix_layout(rng: random.Random, axes: list[str]) -> str:
    """A random way to store two or more axes as the rows and columns of a matrix."""
    order = rng.sample(axes, len(axes))
    at = rng.randint(1, len(order) - 1)
    return f"({' '.join(order[:at])}) ({' '.join(order[at:])})"
