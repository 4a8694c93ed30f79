"""Whole states, nested as trainers save them, and how two of them are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dcpconv.conversion.convert import Engine

State = dict[str, Any]

ENGINES: tuple[Engine, ...] = ("stream", "torch")
"""Both have to make the same of a state."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """A tensor of these sizes, the same one for a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flat() -> State:
    return {"layers.0.weight": random(7, 5), "layers.0.bias": random(7), "norm": random(3)}


def training() -> State:
    moments = {
        number: {"step": torch.tensor(3.0), "exp_avg": random(5, 3, seed=number)}
        for number in range(2)
    }
    groups = [
        {"lr": 1e-3, "betas": (0.9, 0.95), "params": [0]},
        {"lr": 1e-4, "betas": (0.9, 0.95), "params": [1], "foreach": None},
    ]
    return {
        "model": {"a.weight": random(5, 3), "b": {"weight": random(2, 2, 2)}},
        "optim": {"state": moments, "param_groups": groups},
        "step": 7,
        "name": "run",
        "lr": 0.5,
        "history": [1, "two", 3.0, None, True],
        "nothing": {},
    }


def every_dtype() -> State:
    numbers = torch.arange(12).reshape(3, 4)
    names = (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *("int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "uint16", "uint32"),
    )
    return {name: numbers.to(getattr(torch, name)) for name in names}


def odd_shapes() -> State:
    return {
        "scalar": torch.tensor(3.5),
        "flag": torch.tensor(True),
        "count": torch.tensor(-9),
        "empty": torch.empty(0),
        "no rows": torch.empty(0, 3),
        "no columns": torch.empty(3, 0, dtype=torch.int64),
        "one": torch.ones(1, 1, 1),
    }


def strided() -> State:
    base = random(6, 4)
    return {
        "transposed": base.t(),
        "every other": base[::2],
        "column": base[:, 1],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "part": base[2:5],
    }


def tied() -> State:
    weight = random(5, 4)
    return {"embed.weight": weight, "head.weight": weight, "view": weight[1:3]}


def lists_of_tensors() -> State:
    return {"parts": [random(2), {"a": random(3)}, [random(1), 5]], "tuple": (1, 2)}


def assert_same(found: object, expected: object, at: str = "") -> None:
    """Equal containers, in order, with equal leaves; tensors bit for bit."""
    assert type(found) is type(expected), at
    if isinstance(expected, dict) and isinstance(found, dict):
        assert list(found) == list(expected), at
        for key, item in expected.items():
            assert_same(found[key], item, f"{at}.{key}")
    elif isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)):
        assert len(found) == len(expected), at
        for number, item in enumerate(expected):
            assert_same(found[number], item, f"{at}.{number}")
    elif isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), at
        bits = [t.contiguous().flatten().view(torch.uint8) for t in (found, expected)]
        assert torch.equal(*bits), at
    else:
        assert found == expected, at


def loaded(path: Path) -> Any:
    """A ``torch.save`` file, read without trust."""
    return torch.load(path, weights_only=True)
