"""Our operations against transformers' own, which work on real tensors."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import core_model_loading as core

from dcpconv.core.catalog import Chunk, Extent, TensorEntry
from dcpconv.core.dtypes import BY_LABEL
from dcpconv.core.errors import LayoutError
from dcpconv.engine.boxes import Box
from dcpconv.plan.composed import Composed
from dcpconv.plan.coverage import Target
from dcpconv.plan.fills import fill_of
from dcpconv.plan.operations import UntranslatableError, carry_out, target_keys
from dcpconv.sources.live_models import ConversionGroup, LiveModel
from dcpconv.stores.local import Sources
from support.versions import needs

INT64 = BY_LABEL["i64"]
CONFIG = SimpleNamespace(
    num_attention_heads=3, shards=4, vision_config=SimpleNamespace(num_attention_heads=2)
)
CONFIG.get_text_config = lambda: CONFIG

Case = tuple[list[str], list[str], list[Any], dict[str, list[tuple[int, ...]]]]
"""Source patterns, target patterns, operations, and shapes of the sources by pattern."""

CASES: dict[str, Case] = {
    "chunk": (["qkv"], ["q", "k", "v"], [core.Chunk(0)], {"qkv": [(9, 5)]}),
    "chunk-uneven": (["qkv"], ["q", "k", "v"], [core.Chunk(0)], {"qkv": [(8, 5)]}),
    "chunk-by-config": (
        ["all"],
        ["part.*"],
        [core.Chunk(1, num_shards_attribute="shards")],
        {"all": [(3, 8)]},
    ),
    "concatenate": (
        ["q", "k"],
        ["qk"],
        [core.Concatenate(1)],
        {"q": [(4, 2)], "k": [(4, 3)]},
    ),
    "merge": (["e.*.w"], ["e.w"], [core.MergeModulelist(0)], {"e.*.w": [(4, 2)] * 3}),
    "merge-concatenate": (
        ["e.*.g", "e.*.u"],
        ["e.gu"],
        [core.MergeModulelist(0), core.Concatenate(1)],
        {"e.*.g": [(4, 2)] * 3, "e.*.u": [(4, 2)] * 3},
    ),
    "chunk-unmerge": (
        ["e.gu"],
        ["e.*.g", "e.*.u"],
        [core.Chunk(1), core.SplitModulelist(0)],
        {"e.gu": [(3, 8, 2)]},
    ),
    "unmerge": (["e.w"], ["e.*.w"], [core.SplitModulelist(0)], {"e.w": [(3, 4, 1)]}),
    "transpose": (["a"], ["b"], [core.Transpose(1, 2)], {"a": [(3, 4, 5)]}),
    "interleave": (["a"], ["b"], [core.Interleave(1)], {"a": [(3, 8, 5)]}),
    "interleave-back": (["a"], ["b"], [core.Interleave(1, inverse=True)], {"a": [(3, 8, 5)]}),
    "interleave-chunk": (
        ["a"],
        ["g", "u"],
        [core.Interleave(0), core.Chunk(0)],
        {"a": [(8, 5)]},
    ),
    "conv-to-linear": (
        ["a"],
        ["b"],
        [core.Conv3dToLinear(3, (2, 4, 5))],
        {"a": [(7, 3, 2, 4, 5)]},
    ),
    "linear-to-conv": (["a"], ["b"], [core.LinearToConv3d(3, (2, 4, 5))], {"a": [(7, 120)]}),
    "rope": (["a"], ["b"], [core.PermuteForRope()], {"a": [(24, 5)]}),
    "rope-bias": (["a"], ["b"], [core.PermuteForRope()], {"a": [(24,)]}),
    "rope-back": (["a"], ["b"], [core.PermuteForRope(inverse=True)], {"a": [(24, 5)]}),
    "chunk-rope": (
        ["qkv"],
        ["q", "k", "v"],
        [
            core.Chunk(0),
            core.PermuteForRope(subconfig_key="vision_config", permute_layer_names=["q", "k"]),
        ],
        {"qkv": [(36, 5)]},
    ),
    "ernie": (
        ["e.*.g", "e.*.u"],
        ["text", "vision"],
        [core.ErnieFuseAndSplitTextVisionExperts(0, 1)],
        {"e.*.g": [(4, 2)] * 4, "e.*.u": [(4, 2)] * 4},
    ),
    "ernie-back": (
        ["text", "vision"],
        ["e.*.g", "e.*.u"],
        [core.ErnieSplitAndDecoupleTextVisionExperts(0, 1)],
        {"text": [(2, 8, 3)], "vision": [(2, 8, 3)]},
    ),
}


class _Doubled(core.ConversionOps):  # type: ignore[misc]
    """Something that more than moves elements."""

    def convert(self, input_dict: Any, **_unused: Any) -> Any:
        return {key: [2 * tensor for tensor in some] for key, some in input_dict.items()}


def groups_of(case: Case) -> tuple[ConversionGroup, dict[str, list[Tensor]]]:
    sources, targets, operations, shapes = case
    model = LiveModel("Some", "some", {}, SimpleNamespace(config=CONFIG))
    tensors: dict[str, list[Tensor]] = {}
    start = 0
    for pattern, some in shapes.items():
        tensors[pattern] = []
        for shape in some:
            numel = torch.Size(shape).numel()
            tensors[pattern].append(torch.arange(start, start + numel).reshape(shape))
            start += numel
    group = ConversionGroup(
        f"x.{targets[0]}.y",
        {pattern: tuple(f"{pattern}{i}" for i in range(len(s))) for pattern, s in shapes.items()},
        tuple(sources),
        tuple(targets),
        tuple(model._operation(one) for one in operations),
    )
    return group, tensors


def stored(tensors: dict[str, list[Tensor]], file: Path) -> dict[str, list[Composed]]:
    data = b""
    parts: dict[str, list[Composed]] = {}
    for pattern, some in tensors.items():
        parts[pattern] = []
        for tensor in some:
            shape, raw = tuple(tensor.shape), tensor.numpy().tobytes()
            chunk = Chunk((0,) * len(shape), shape, Extent(file.name, len(data), len(raw)))
            parts[pattern].append(
                Composed.stored(TensorEntry(f"t{len(data)}", INT64, shape, (chunk,)))
            )
            data += raw
    file.write_bytes(data)
    return parts


def read(made: Composed, directory: Path) -> Tensor:
    numel = torch.Size(made.shape).numel()
    fill = fill_of(
        Target("t", made.shape, INT64, made.pieces()), (0,) * len(made.shape), made.shape
    )
    into = bytearray(8 * numel)
    scratch = memoryview(bytearray(1 << 12))
    with Sources(directory) as sources:
        Box(fill).read(0, numel, sources=sources, into=memoryview(into), scratch=lambda: scratch)
    return torch.frombuffer(into, dtype=torch.int64).reshape(made.shape)


_NEWER = {
    "unmerge": "SplitModulelist squeezes the axis it splits and no other",
    **dict.fromkeys(("rope", "rope-bias", "rope-back"), "PermuteForRope works without names"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs("transformers", "5.23", _NEWER[name]))
        if name in _NEWER
        else name
        for name in CASES
    ],
)
def test_a_planned_conversion_is_the_one_that_transformers_carries_out(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    sources, targets, operations, _ = case
    group, tensors = groups_of(case)
    made = carry_out(group, stored(tensors, tmp_path / "data"), {})

    theirs = core.WeightConverter(list(sources), list(targets), operations)
    for pattern, some in tensors.items():
        for tensor in some:
            theirs.add_tensor(group.first, "", pattern, tensor)
    expected = theirs.convert(group.first, config=CONFIG)
    whole = {key: value[0] if isinstance(value, list) else value for key, value in expected.items()}

    assert made.keys() == whole.keys()
    for key, tensor in whole.items():
        assert torch.equal(read(made[key], tmp_path), tensor), key


def test_the_model_decides_how_a_tensor_is_split(tmp_path: Path) -> None:
    case: Case = (["qkv"], ["q", "k"], [core.Split(0)], {"qkv": [(9, 5)]})
    group, tensors = groups_of(case)
    parts = stored(tensors, tmp_path / "data")
    made = carry_out(group, parts, {"x.q.y": (6, 5), "x.k.y": (3, 5)})
    assert torch.equal(read(made["x.k.y"], tmp_path), tensors["qkv"][0][6:])
    with pytest.raises(LayoutError, match="no such tensor"):
        carry_out(group, parts, {"x.q.y": (6, 5)})


def test_a_transpose_that_looks_first_leaves_the_right_shape_alone(tmp_path: Path) -> None:
    case: Case = (["a"], ["b"], [core.Transpose(0, 1, check_dims=True)], {"a": [(3, 4)]})
    group, tensors = groups_of(case)
    parts = stored(tensors, tmp_path / "data")
    for shape, expected in (((3, 4), tensors["a"][0]), ((4, 3), tensors["a"][0].T)):
        made = carry_out(group, parts, {"x.b.y": shape})
        assert torch.equal(read(made["x.b.y"], tmp_path), expected)


def test_what_we_do_not_know_is_refused_by_name(tmp_path: Path) -> None:
    group, tensors = groups_of((["a"], ["b"], [_Doubled()], {"a": [(3, 4)]}))
    with pytest.raises(UntranslatableError, match="_Doubled"):
        carry_out(group, stored(tensors, tmp_path / "data"), {})


def test_all_results_are_named_before_any_is_made() -> None:
    group, _ = groups_of(CASES["chunk"])
    assert target_keys(group) == ("x.q.y", "x.k.y", "x.v.y")
