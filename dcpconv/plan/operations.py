"""The operations of transformers' conversions, carried out on tensors that exist nowhere yet.

Source:
    transformers 5.23, the subclasses of ``ConversionOps`` in ``core_model_loading.py``.  The result
    of an operation goes by its target pattern where it is the whole conversion or the end of it,
    and by the source pattern where others follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dcpconv.core.catalog import Shapes
from dcpconv.core.errors import LayoutError
from dcpconv.plan.composed import Composed
from dcpconv.sources.live_models import ConversionGroup

Parts = dict[str, list[Composed]]
"""Tensors on their way, by the pattern that stands for their key."""


class UntranslatableError(LayoutError):
    """An operation that more than moves elements, or that nobody has told us of."""


@dataclass(frozen=True, slots=True)
class Around:
    """What an operation is told beside its tensors.

    Attributes:
        group: What it is part of.
        wanted: Shapes of the model's tensors.
    """

    group: ConversionGroup
    wanted: Shapes

    @property
    def targets(self) -> tuple[str, ...]:
        """Patterns of the results."""
        return self.group.target_patterns

    def whole(self, source: str) -> str:
        """What the only result of an operation on one tensor goes by."""
        return self.targets[0] if len(self.targets) == 1 else source


def carry_out(group: ConversionGroup, parts: Parts, wanted: Shapes) -> dict[str, Composed]:
    """The results of a group's operations, by full key.

    Args:
        group: What is done.
        parts: Its tensors, by source pattern.
        wanted: Shapes of the model's tensors, which some operations go by.

    Raises:
        UntranslatableError: An operation is none that we know.
        LayoutError: Shapes do not allow it.
    """
    around = Around(group, wanted)
    for operation in group.operations:
        act = _ACTS.get(operation.name)
        if act is None:
            raise UntranslatableError(f"{operation.name} is no operation that we can plan")
        parts = act(parts, operation.arguments, around)
    full = group.first.replace("*.", "0.")
    known = next((pattern for pattern in parts if pattern in full), None)
    if known is None:
        raise UntranslatableError(
            "results of the conversion have no name", [("names", ", ".join(parts))]
        )
    before, _, after = full.partition(known)
    return {before + pattern + after: some[0] for pattern, some in parts.items()}


def target_keys(group: ConversionGroup) -> tuple[str, ...]:
    """Full keys of all results, as far as patterns say."""
    full = group.first.replace("*.", "0.")
    patterns = group.target_patterns
    known = next((pattern for pattern in patterns if pattern in full), None)
    if known is None:
        return (full,)
    return tuple(full.replace(known, pattern, 1) for pattern in patterns)


def _only(parts: Parts) -> tuple[str, Composed]:
    if len(parts) != 1:
        raise UntranslatableError("an operation on one tensor has several")
    (pattern, some), *_ = parts.items()
    return pattern, some[0]


def _merge(parts: Parts, arguments: Mapping[str, Any], around: Around) -> Parts:
    if len(parts) == 1:
        pattern, some = next(iter(parts.items()))
        return {around.whole(pattern): [Composed.stack(some, arguments["dim"])]}
    return {pattern: [Composed.stack(some, arguments["dim"])] for pattern, some in parts.items()}


def _unmerge(parts: Parts, arguments: Mapping[str, Any], around: Around) -> Parts:
    made: Parts = {}
    for source, some in parts.items():
        name = around.whole(source) if len(parts) == 1 else source
        one, dim = some[0], arguments["dim"]
        shape = (*one.shape[:dim], *one.shape[dim + 1 :])
        for index in range(one.shape[dim]):
            key = name.replace("*", str(index))
            made[key] = [one.cut(dim, index, index + 1).reshape(shape)]
    return made


def _concatenate(parts: Parts, arguments: Mapping[str, Any], around: Around) -> Parts:
    (target,) = around.targets
    order = [pattern for pattern in around.group.source_patterns if pattern in parts]
    ends = [one for pattern in order for one in parts[pattern]]
    return {target: [Composed.concatenate(ends, arguments["dim"])]}


def _chunk(parts: Parts, arguments: Mapping[str, Any], around: Around) -> Parts:
    _, one = _only(parts)
    targets = around.targets
    if arguments.get("num_shards_attribute") is not None:
        targets = tuple(targets[0].replace("*", str(i)) for i in range(arguments["shards"]))
    dim = arguments["dim"]
    length = one.shape[dim]
    each = -(-length // len(targets)) or 1
    sizes = [min(each, length - at) for at in range(0, length, each)]
    chunks = one.split(dim, sizes)
    return {target: [chunk] for target, chunk in zip(targets, chunks, strict=False)}


def _split(parts: Parts, arguments: Mapping[str, Any], around: Around) -> Parts:
    _, one = _only(parts)
    dim, first = arguments["dim"], around.targets[0]
    keys = [around.group.first.replace(first, target) for target in around.targets]
    unknown = [key for key in keys if key not in around.wanted]
    if unknown:
        raise LayoutError("the model has no such tensor", [("key", key) for key in unknown])
    sizes = [around.wanted[key][dim] for key in keys]
    return {
        target: [part] for target, part in zip(around.targets, one.split(dim, sizes), strict=True)
    }


def _transpose(parts: Parts, arguments: Mapping[str, Any], around: Around) -> Parts:
    source, one = _only(parts)
    target = around.whole(source)
    if arguments.get("check_dims") and one.shape == around.wanted.get(around.group.first):
        return {target: [one]}
    return {target: [one.transpose(arguments["dim0"], arguments["dim1"])]}


def _interleave(parts: Parts, arguments: Mapping[str, Any], around: Around) -> Parts:
    _, one = _only(parts)
    dim = arguments["dim"] % len(one.shape)
    half = one.shape[dim] // 2
    pair = (2, half) if arguments.get("inverse") else (half, 2)
    apart = one.reshape((*one.shape[:dim], *pair, *one.shape[dim + 1 :]))
    return {around.targets[0]: [apart.transpose(dim, dim + 1).reshape(one.shape)]}


def _flatten(parts: Parts, arguments: Mapping[str, Any], around: Around) -> Parts:
    del arguments
    source, one = _only(parts)
    return {around.whole(source): [one.reshape((one.shape[0], math.prod(one.shape[1:])))]}


def _unflatten(parts: Parts, arguments: Mapping[str, Any], around: Around) -> Parts:
    source, one = _only(parts)
    shape = (one.shape[0], arguments["in_channels"], *arguments["kernel_size"])
    return {around.whole(source): [one.reshape(shape)]}


def _rope(parts: Parts, arguments: Mapping[str, Any], around: Around) -> Parts:
    """Rows of a head from pairs beside each other to halves, or back."""
    names, heads = arguments.get("permute_layer_names"), arguments["heads"]
    is_single = len(around.targets) == len(around.group.source_patterns) == 1
    made: Parts = {}
    for pattern, some in parts.items():
        target = around.targets[0] if is_single else pattern
        made[target] = some
        if names is None or any(name in pattern for name in names):
            (one,) = some
            rows = one.shape[0]
            half = rows // heads // 2
            pair = (2, half) if arguments.get("inverse") else (half, 2)
            apart = one.reshape((heads, *pair, *one.shape[1:]))
            made[target] = [apart.transpose(1, 2).reshape(one.shape)]
    return made


def _ernie_join(parts: Parts, arguments: Mapping[str, Any], around: Around) -> Parts:
    """Experts of text and of vision in one list, each stacked, and their projections joined."""
    made: Parts = {}
    count = len(around.targets)
    for at, target in enumerate(around.targets):
        stacks = []
        for pattern in around.group.source_patterns:
            some = parts[pattern]
            each = -(-len(some) // count)
            stacks.append(Composed.stack(some[at * each : (at + 1) * each], arguments["stack_dim"]))
        made[target] = [Composed.concatenate(stacks, arguments["concat_dim"])]
    return made


def _ernie_part(parts: Parts, arguments: Mapping[str, Any], around: Around) -> Parts:
    made: Parts = {}
    stack, join, count = arguments["stack_dim"], arguments["concat_dim"], len(around.targets)
    for at, target in enumerate(around.targets):
        index = 0
        for pattern in around.group.source_patterns:
            one = parts[pattern][0]
            each = -(-one.shape[join] // count)
            sizes = [min(each, one.shape[join] - n) for n in range(0, one.shape[join], each)]
            chunk = one.split(join, sizes)[at]
            shape = (*chunk.shape[:stack], *chunk.shape[stack + 1 :])
            for expert in range(chunk.shape[stack]):
                key = target.replace("*", str(index))
                made[key] = [chunk.cut(stack, expert, expert + 1).reshape(shape)]
                index += 1
    return made


_ACTS: Mapping[str, Callable[[Parts, Mapping[str, Any], Around], Parts]] = {
    "Chunk": _chunk,
    "Concatenate": _concatenate,
    "Conv3dToLinear": _flatten,
    "ErnieFuseAndSplitTextVisionExperts": _ernie_join,
    "ErnieSplitAndDecoupleTextVisionExperts": _ernie_part,
    "Interleave": _interleave,
    "LinearToConv3d": _unflatten,
    "MergeModulelist": _merge,
    "PermuteForRope": _rope,
    "Split": _split,
    "SplitModulelist": _unmerge,
    "Transpose": _transpose,
}
