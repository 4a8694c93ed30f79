"""Tensors inside an object: a state dict that was saved with ``flatten_state_dict=False``.

The item of such a value is one ``torch.save`` archive of nested containers.  Its tensors lie in
it as they do in any other, so they are listed under the keys that flattening would have given them.

Source: torch 2.13 ``distributed/checkpoint/default_planner.py``, ``DefaultSavePlanner``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dcpconv.core.catalog import Chunk, Extent, KeyPath, TensorEntry
from dcpconv.formats.dcp.items import NestedTensors
from dcpconv.formats.dcp.objects import OpaqueObject
from dcpconv.formats.torchfile.archive import StoredTensor, UnreadableTensor
from dcpconv.formats.torchfile.nesting import flatten, key_of


@dataclass(slots=True)
class Unfolded:
    """What objects with tensors in them come to; the rest of a checkpoint's objects stay."""

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    objects: dict[str, object] = field(default_factory=dict)
    paths: dict[str, KeyPath] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def unfold(objects: Mapping[str, object], paths: Mapping[str, KeyPath]) -> Unfolded:
    """Every object, those with tensors in their containers taken apart.

    Args:
        objects: By key, as ``read_objects`` gives them.
        paths: How keys are nested, where that is more than ``(key,)``.
    """
    found = Unfolded()
    for key, value in objects.items():
        if isinstance(value, NestedTensors):
            _take_apart(paths.get(key, (key,)), value, found)
        else:
            found.objects[key] = value
    return found


def _take_apart(root: KeyPath, nested: NestedTensors, found: Unfolded) -> None:
    leaves = flatten(
        {"": nested.value},
        is_tensor=lambda leaf: isinstance(leaf, (StoredTensor, UnreadableTensor)),
    )
    for below, leaf in leaves:
        path = (*root, *below[1:])
        key = key_of(path)
        if key in found.tensors or key in found.objects:
            found.problems.append(f"{key}: two values have this key")
        elif isinstance(leaf, StoredTensor):
            found.tensors[key] = _entry(key, leaf, nested.item)
        elif isinstance(leaf, UnreadableTensor):
            found.problems.append(f"{key}: tensor is {leaf.kind}")
            continue
        elif _hides_tensors(leaf):
            found.objects[key] = OpaqueObject(nested.item, "it holds tensors")
        else:
            found.objects[key] = leaf
        if path != (key,):
            found.paths[key] = path


def _entry(key: str, tensor: StoredTensor, item: Extent) -> TensorEntry:
    chunk = Chunk(
        offsets=(0,) * len(tensor.shape),
        sizes=tensor.shape,
        extent=Extent(item.file, item.offset + tensor.offset, tensor.nbytes),
        strides=None if tensor.is_contiguous else tensor.strides,
    )
    return TensorEntry(key, tensor.dtype, tensor.shape, (chunk,))


def _hides_tensors(leaf: object) -> bool:
    if isinstance(leaf, dict):
        return any(map(_hides_tensors, leaf.values()))
    if isinstance(leaf, (list, tuple, set, frozenset)):
        return any(map(_hides_tensors, leaf))
    return isinstance(leaf, StoredTensor)
