"""Distributed tensors in a ``torch.save`` file, taken apart.

``DTensor`` and ``ShardedTensor`` and all they consist of are read as inert records.  Nothing of
``torch.distributed`` is imported, and no process group is needed.

Source:
    torch 2.13 ``torch/distributed/tensor`` (``_api.py``, ``_dtensor_spec.py``,
    ``placement_types.py``), ``torch/distributed/device_mesh.py``, ``_mesh_layout.py``,
    ``torch/distributed/_shard/sharded_tensor/api.py``; torch 2.2 to 2.9 for the older names of the
    modules and for ``DeviceMesh.mesh``, which ``_layout`` and ``_rank_map`` replaced; torch 2.6 for
    ``_coordinate_on_dim`` without ``_rank``; torchao 0.18 ``float8/fsdp_utils.py``, a weight that
    FSDP2 gathers in fp8, as torchtitan trains it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Final, TypeGuard

from dcpconv.core.catalog import c_strides
from dcpconv.core.errors import FormatError
from dcpconv.formats.torchfile.pieces import (
    Mesh,
    MeshPlacement,
    MeshTensor,
    RankPiece,
    ShardedParts,
)
from dcpconv.formats.torchfile.stand_ins import Ref
from dcpconv.formats.torchfile.stored import StoredTensor, whole_numbers

if TYPE_CHECKING:
    from typing_extensions import Self

WRAPPER: Final = Ref("torch._utils", "_rebuild_wrapper_subclass")
"""The recipe of a tensor that consists of other tensors."""

_MOST_PARTS: Final = 1 << 16
"""Ranks on one side of a mesh, and pieces of a strided split; more is no mesh but an attack."""


class StandIn:
    """An object of a class that is only named; its state is data."""

    args: tuple[object, ...] = ()
    state: object = None

    def __new__(cls, *args: object) -> Self:
        """Keep the arguments of the call that made it."""
        record = super().__new__(cls)
        record.args = args
        return record

    def __setstate__(self, state: object) -> None:
        self.state = state

    def get(self, name: str) -> object:
        """An attribute, or ``None``; slots and ``__dict__`` alike."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        for part in parts:
            if isinstance(part, dict) and name in part:
                return part[name]
        return None


class MeshRecord(StandIn):
    """A ``DeviceMesh``, of which all tensors of a file share one."""

    @cached_property
    def mesh(self) -> Mesh:
        """Its axes and ranks.

        Raises:
            FormatError: It is not one.
        """
        ranks = self.get("_flatten_rank_map") or self.get("_flatten_mesh_list")
        if not _are_numbers(ranks):
            raise FormatError("device mesh lists no ranks")
        tensor, layout = self.get("mesh"), self.get("_layout")
        if isinstance(tensor, StoredTensor):
            axes = tuple(zip(tensor.shape, c_strides(tensor.shape), strict=True))
            nested: tuple[tuple[tuple[int, int], ...], ...] = tuple((axis,) for axis in axes)
        elif isinstance(layout, StandIn):
            nested = _axes(layout)
        else:
            raise FormatError("device mesh has no shape")
        own, place = self.get("_rank"), self.get("_coordinate_on_dim")
        if type(own) is int:
            return Mesh(nested, ranks, own)
        mesh = Mesh(nested, ranks)  # an older one, which only says where in it the rank is
        place = tuple(place) if isinstance(place, list) else place
        return mesh.seen_by(mesh.rank_at(place)) if _are_numbers(place) else mesh


def rebuild(kind: object, args: object, state: object) -> RankPiece | StoredTensor:
    """The piece that a recipe of a wrapper subclass describes, or the tensor that one wraps.

    Args:
        kind: Its class.
        args: Of ``_make_wrapper_subclass``: class, element type, shape, strides, and so on.
        state: Of ``DTensor``, ``ShardedTensor`` or a wrapper around one tensor.

    Raises:
        FormatError: It is none of these, or its parts do not fit.
    """
    record = StandIn()
    record.state = state
    if kind in _DTENSOR and isinstance(args, tuple) and len(args) > 2:
        return _dtensor(args[2], record)
    if kind == _SHARDED and isinstance(state, tuple) and len(state) > 1:
        return _sharded(state[0], state[1])
    if kind == _GATHERED_IN_FP8 and isinstance(args, tuple) and len(args) > 2:
        return _wrapped(args[2], record)
    raise FormatError("tensor is of a class that we cannot take apart", [("class", kind)])


def _wrapped(size: object, state: StandIn) -> StoredTensor:
    """The weight inside a wrapper that changes how it is gathered, and none of its elements."""
    tensor = state.get("_tensor")
    if not isinstance(tensor, StoredTensor) or tensor.shape != whole_numbers(size):
        raise FormatError("wrapper lacks its tensor, or says another shape", [("found", size)])
    return tensor


def _are_numbers(value: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(value, tuple) and all(type(item) is int and item >= 0 for item in value)


def _dtensor(size: object, state: StandIn) -> MeshTensor:
    shape, local, spec = whole_numbers(size), state.get("_local_tensor"), state.get("_spec")
    if shape is None or not isinstance(local, StoredTensor) or not isinstance(spec, StandIn):
        raise FormatError("DTensor lacks its local tensor, its shape or its placements")
    mesh, placed = spec.get("mesh"), spec.get("placements")
    if not isinstance(mesh, MeshRecord) or not isinstance(placed, tuple):
        raise FormatError("DTensor lacks its mesh or its placements")
    placements = tuple(_placement(item, len(shape)) for item in placed)
    if len(placements) != len(mesh.mesh.axes):
        raise FormatError("DTensor has another number of placements than its mesh has axes")
    order = _order(spec.get("shard_order"), len(placements))
    return MeshTensor(shape, local, mesh.mesh, placements, order)


def _placement(item: object, dims: int) -> MeshPlacement:
    if not isinstance(item, StandIn):
        raise FormatError("DTensor has a placement that we do not know")
    name = type(item).__name__
    if name == "Replicate":
        return MeshPlacement("replicate")
    if name in {"Partial", "_Partial"}:
        return MeshPlacement("partial")
    dim = item.get("dim")
    factor = item.get("split_factor") if name == "_StridedShard" else 1
    dim = item.args[0] if dim is None and item.args else dim
    is_sensible = type(dim) is int and 0 <= dim < dims
    if not is_sensible or type(factor) is not int or not 0 < factor <= _MOST_PARTS:
        raise FormatError("DTensor has a placement that does not fit", [("found", item.state)])
    assert isinstance(dim, int)  # noqa: S101  tested above
    return MeshPlacement("strided" if name == "_StridedShard" else "shard", dim, factor)


def _order(entries: object, axes: int) -> tuple[int, ...]:
    """Mesh axes in the order in which they cut: as they come, but for what ``shard_order`` says."""
    if axes == 1:
        return (0,)
    said: list[int] = []
    for entry in entries if isinstance(entries, tuple) else ():
        dims = entry.args[1] if isinstance(entry, StandIn) and len(entry.args) == 2 else None
        said.extend(whole_numbers(dims) or ())
    if len(set(said)) != len(said) or any(axis >= axes for axis in said):
        raise FormatError("DTensor has an order of cuts that does not fit", [("found", said)])
    return (*said, *(axis for axis in range(axes) if axis not in said))


def _axes(layout: StandIn) -> tuple[tuple[tuple[int, int], ...], ...]:
    inner = layout.get("axes")
    if isinstance(inner, tuple):
        if not all(isinstance(axis, StandIn) for axis in inner):
            raise FormatError("device mesh has no shape")
        return tuple(_pairs(axis.get("shape"), axis.get("stride")) for axis in inner)
    shape, stride = layout.get("shape"), layout.get("stride")
    if isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride):
        return tuple(_pairs(*pair) for pair in zip(shape, stride, strict=True))
    return (_pairs(shape, stride),)


def _pairs(shape: object, stride: object) -> tuple[tuple[int, int], ...]:
    """Sizes and strides of one axis, outermost first; none for an axis of one rank."""
    sizes = shape if isinstance(shape, tuple) else (shape,)
    steps = stride if isinstance(stride, tuple) else (stride,)
    if not (_are_numbers(sizes) and _are_numbers(steps) and len(sizes) == len(steps)):
        raise FormatError("device mesh has no shape", [("found", f"{shape}, {stride}")])
    if any(not 0 < size <= _MOST_PARTS for size in sizes):
        raise FormatError("device mesh has no sensible size", [("found", shape)])
    # The stride of an axis of one rank may be 0, and means nothing.
    return tuple((size, max(1, step)) for size, step in zip(sizes, steps, strict=True))


def _sharded(local: object, metadata: object) -> ShardedParts:
    shape = whole_numbers(metadata.get("size")) if isinstance(metadata, StandIn) else None
    every = metadata.get("shards_metadata") if isinstance(metadata, StandIn) else None
    if shape is None or not isinstance(local, list) or not isinstance(every, list):
        raise FormatError("ShardedTensor lacks its shape or its shards")
    parts = []
    for shard in local:
        tensor = shard.get("tensor") if isinstance(shard, StandIn) else None
        place = shard.get("metadata") if isinstance(shard, StandIn) else None
        if not isinstance(tensor, StoredTensor) or not isinstance(place, StandIn):
            raise FormatError("ShardedTensor has a shard without its tensor or its place")
        offsets, sizes = (
            whole_numbers(place.get("shard_offsets")),
            whole_numbers(place.get("shard_sizes")),
        )
        if offsets is None or sizes is None or not len(offsets) == len(sizes) == len(shape):
            raise FormatError("ShardedTensor has a shard without offsets and sizes")
        if sizes != tensor.shape:
            facts = [("expected", list(sizes)), ("found", list(tensor.shape))]
            raise FormatError("ShardedTensor has a shard of another shape than it says", facts)
        parts.append((offsets, sizes, tensor))
    return ShardedParts(shape, tuple(parts), len(every))


def _member(owner: object, name: object) -> object:
    """What ``getattr`` is for in a ``ShardedTensor``: a nested class, and a member of an enum."""
    if owner == _SHARDED and name == "ProcessGroupState":
        return type("ProcessGroupState", (StandIn,), {})
    if owner is _MemoryFormat and isinstance(name, str):
        return name
    raise FormatError(
        "pickle takes an attribute of something",
        [("global", "builtins.getattr")],
        kind="untrusted",
    )


def _class(name: str, base: type[StandIn] = StandIn) -> type[StandIn]:
    return type(name, (base,), {})


class _MemoryFormat(StandIn):
    """An enum, whose members are made by a call or taken by name."""


_TENSOR = "torch.distributed.tensor"
_OLD_TENSOR = "torch.distributed._tensor"
_SHARD = "torch.distributed._shard"
_DTENSOR: Final = tuple(
    Ref(module, "DTensor")
    for module in (_TENSOR, f"{_TENSOR}._api", _OLD_TENSOR, f"{_OLD_TENSOR}.api")
)
_SHARDED: Final = Ref(f"{_SHARD}.sharded_tensor.api", "ShardedTensor")
_FLOAT8 = "torchao.float8"
_GATHERED_IN_FP8: Final = Ref(f"{_FLOAT8}.fsdp_utils", "WeightWithDynamicFloat8CastTensor")

_SPEC_MODULES = (
    f"{_TENSOR}._dtensor_spec",
    f"{_OLD_TENSOR}._dtensor_spec",
    f"{_OLD_TENSOR}.placement_types",
)
_PLACEMENT_MODULES = (
    f"{_TENSOR}.placement_types",
    f"{_OLD_TENSOR}.placement_types",
    "torch._C._distributed",
)

NAMES: Final[Mapping[tuple[str, str], Callable[..., object]]] = {
    (WRAPPER.module, WRAPPER.name): Ref,
    **{(ref.module, ref.name): Ref for ref in (*_DTENSOR, _SHARDED, _GATHERED_IN_FP8)},
    **{
        (f"{_FLOAT8}.{module}", name): _class(name)
        for module in ("float8_training_tensor", "float8_tensor")
        for name in ("LinearMMConfig", "ScaledMMConfig")
    },
    **{
        (module, name): _class(name)
        for module in _SPEC_MODULES
        for name in ("DTensorSpec", "TensorMeta", "ShardOrderEntry")
    },
    **{
        (module, name): _class(name)
        for module in _PLACEMENT_MODULES
        for name in ("Shard", "_StridedShard", "Replicate", "Partial", "_Partial")
    },
    **{
        (module, "DeviceMesh"): _class("DeviceMesh", MeshRecord)
        for module in ("torch.distributed.device_mesh", f"{_OLD_TENSOR}.device_mesh")
    },
    **{
        ("torch.distributed._mesh_layout", name): _class(name)
        for name in ("_MeshLayout", "_FlatLayout")
    },
    **{
        (f"{_SHARD}.{module}", name): _class(name)
        for module, name in (
            ("metadata", "ShardMetadata"),
            ("sharded_tensor.metadata", "ShardedTensorMetadata"),
            ("sharded_tensor.metadata", "TensorProperties"),
            ("sharded_tensor.shard", "Shard"),
            ("sharding_spec.chunk_sharding_spec", "ChunkShardingSpec"),
            ("sharding_spec.api", "EnumerableShardingSpec"),
        )
    },
    (f"{_SHARD}.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): _MemoryFormat,
    ("torch.distributed.remote_device", "_remote_device"): _class("_remote_device"),
    ("builtins", "getattr"): _member,
    ("__builtin__", "getattr"): _member,
}
"""Globals of distributed tensors; each becomes a record."""
