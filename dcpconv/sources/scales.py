"""Weights in few bits with factors beside them, put together as what they are worth.

A weight and its factors find each other by name, whatever the model; their shapes say which factor
belongs to which elements.  The result is a catalog of the unquantised model: what its tensors are
multiplied by is said in ``TensorEntry.factors``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from dcpconv.core.catalog import Catalog, Factors, KeyPath, TensorEntry, c_strides
from dcpconv.core.dtypes import BY_NAME, FP4
from dcpconv.formats.torchfile import meta_scales
from dcpconv.sources.unscalable import unscalable

_UINT8, _INT8, _E8M0 = (BY_NAME[name] for name in ("uint8", "int8", "float8_e8m0fnu"))

_MX = 32
"""Elements of an MX block.  Source: OCP Microscaling Formats (MX) 1.0, table 1."""

_BLOCK = (128, 128)
"""Rows and columns of a block where nothing says.  Source: deepseek-ai/DeepSeek-V3 config.json."""

_OF_KEY = ("_scale_inv", "_scale")
"""What the key of factors adds to the key of a weight.

Source: model.safetensors.index.json of deepseek-ai/DeepSeek-V3; compressed-tensors 0.20
``NaiveQuantizationCompressor``; NVIDIA Model Optimizer, ``hf_quant_config.json`` exports.
"""

_OF_COLUMNS = meta_scales.SCALE
"""What the key of one factor per column adds, where a stack of matrices lies in one: each of them,
or each equal part of their rows, has a row of factors."""

_OF_MODULE = ("scale", "qscale_weight")
"""What stands instead of ``weight`` in the key of factors.

Source: deepseek-ai/DeepSeek-V3 ``inference/convert.py``; vLLM ``model_executor/models/mistral.py``.
"""

_PACKED = (("_blocks", "_scales"), (".blocks", ".scales"), ("_packed", "_scale"))
"""Ends of the keys of MXFP4 elements, two to a byte, and of their exponents.

Source: openai/gpt-oss-20b, its model.safetensors.index.json and that of its ``original`` directory
(``gpt_oss/torch/weights.py``); compressed-tensors 0.20 ``MXFP4PackedCompressor``.
"""

_ACTIVATIONS = (
    "input_scale",
    "output_scale",
    "input_global_scale",
    "activation_scale",
    "input_zero_point",
    "output_zero_point",
    "qscale_act",
)
"""What stands instead of ``weight`` in keys that speak of activations alone."""

_CACHE = (".q_scale", ".k_scale", ".v_scale", ".kv_scale", ".prob_output_scale")
"""Ends of the keys of single numbers that speak of attention's cache.

Source: vLLM ``model_executor/layers/quantization/kv_cache.py``.
"""

_OFFSETS = ("weight_zero_point", "weight_g_idx", "weight_scale_2", "weight_global_scale")
"""Further tensors of a weight, of which a multiplication by factors would know nothing."""

_DROPPED = "scales activations, of which an unquantised model knows nothing"


@dataclass(frozen=True, slots=True)
class Scaled:
    """What became of factors.

    Attributes:
        names: Stored keys of the factors by stored key of the weight.
        dropped: Stored keys of what speaks of activations alone, with the reason.
        unlike: ``(key, expected shape, found shape)`` of factors that do not fit their weight.
        refused: ``(key, reason)`` of what cannot be multiplied out.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[tuple[str, str], ...] = ()
    unlike: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()


def multiplied(
    catalog: Catalog, config: Mapping[str, object] | None = None
) -> tuple[Catalog, Scaled]:
    """The catalog of what the weights are worth, without factors, and what became of those.

    Args:
        catalog: As stored.
        config: Fields of the parameter file, which may say how large blocks are.
    """
    stated = stated_block(config)
    tensors = catalog.tensors
    made: dict[str, TensorEntry] = {}
    names: dict[str, str] = {}
    places: dict[str, str] = {}
    unlike = []
    for key, entry in tensors.items():
        if (packed := _packed(key, entry, tensors)) is not None:
            name, factors = packed
            if factors.shape != _exponents(key, entry):
                unlike.append((factors.key, _exponents(key, entry), factors.shape))
                continue
            made[key] = _of_halves(name, entry, factors, is_turned=key.endswith("_blocks"))
            places[name] = key
            names[name] = factors.key
        elif (scale := _factors(key, entry, tensors)) is not None:
            is_columns = scale.key.endswith(_OF_COLUMNS)
            blocks = (
                _columns(entry.shape, scale.shape)
                if is_columns
                else _blocks(entry.shape, scale.shape, stated)
            )
            if blocks is None:
                sizes = zip(entry.shape[-2:], stated or _BLOCK, strict=False)
                expected = (*entry.shape[:-2], *(-(-length // size) for length, size in sizes))
                unlike.append((scale.key, expected, scale.shape))
                continue
            made[key] = replace(entry, factors=Factors(scale, *blocks))
            names[key] = scale.key
    dropped = dict.fromkeys(_activations(tensors, made, is_any=bool(names)), _DROPPED)
    gone = {*names.values(), *dropped, *(key for key, _, _ in unlike)}
    kept = {
        (made[key].key if key in made else key): made.get(key, entry)
        for key, entry in tensors.items()
        if key not in gone
    }
    paths: dict[str, KeyPath] = {
        name: (*catalog.path_of(key)[:-1], _last(catalog.path_of(key), key, name))
        for name, key in places.items()
        if key in catalog.paths
    }
    refused = (*unscalable(tensors, set(made)), *_alone(kept, is_any=bool(names)))
    refused += tuple(_offset(tensors, made))
    return (
        replace(catalog, tensors=kept, paths={**catalog.paths, **paths}),
        Scaled(names, tuple(dropped.items()), tuple(unlike), refused),
    )


def stated_block(config: Mapping[str, object] | None) -> tuple[int, int] | None:
    """Rows and columns of all blocks, from a config of any model; ``None`` where it does not say.

    Source: transformers 5.23 ``FineGrainedFP8Config``; compressed-tensors 0.20
    ``QuantizationArgs``.
    """
    config = config or {}
    stated = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(stated, dict):
        return None
    size = stated.get("weight_block_size")
    found = {_pair(size)} if size is not None else set()
    groups = stated.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            strategy, size = weights.get("strategy"), weights.get("group_size")
            is_grouped = strategy in {"group", "tensor_group"} and isinstance(size, int)
            found.add(_pair([1, size] if is_grouped else weights.get("block_structure")))
    return found.pop() if len(found) == 1 else None


def _pair(value: object) -> tuple[int, int] | None:
    if isinstance(value, (list, tuple)) and len(value) == 2:
        down, across = value
        if isinstance(down, int) and isinstance(across, int) and min(down, across) > 0:
            return down, across
    return None


def _packed(
    key: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry]
) -> tuple[str, TensorEntry] | None:
    """The name of MXFP4 elements, and their exponents, if that is what they are."""
    if entry.dtype is not _UINT8:
        return None
    for end, scales in _PACKED:
        name = key.removesuffix(end)
        factors = tensors.get(name + scales)
        if name == key or factors is None or factors.dtype not in {_UINT8, _E8M0}:
            continue
        if end == "_packed" and factors.shape != _exponents(key, entry):
            continue  # other numbers of bits: the file does not say how many
        rank = 2 if end == "_packed" else 4
        if len(entry.shape) >= rank and 0 not in entry.shape and name not in tensors:
            return name, factors
    return None


def _exponents(key: str, entry: TensorEntry) -> tuple[int, ...]:
    """How many exponents MXFP4 elements need; those in ``X_packed`` are not cut into blocks."""
    if key.endswith("_packed"):
        return (*entry.shape[:-1], -(-2 * entry.shape[-1] // _MX))
    return entry.shape[:-1]


def _of_halves(
    name: str, entry: TensorEntry, factors: TensorEntry, *, is_turned: bool
) -> TensorEntry:
    """Elements that are stored two to a byte, with their factors.

    Args:
        name: Key of the result.
        entry: The bytes; of blocks, the last dim is one block.
        factors: An exponent for each block.
        is_turned: Whether the model has rows where the file has columns, as transformers' experts
            of gpt-oss have.
    """
    is_whole = len(entry.shape) == len(factors.shape)
    across = entry.shape[-1:] if is_whole else (entry.shape[-2] * entry.shape[-1],)
    lead = entry.shape[:-1] if is_whole else entry.shape[:-2]
    columns = 2 * across[0]
    grid = factors.shape[-1]
    shape: tuple[int, ...] = (*lead, columns)
    strides = c_strides(shape)
    if is_turned:
        shape, strides = ((*values[:-2], values[-1], values[-2]) for values in (shape, strides))
    rows = prod(lead)
    size = _MX if is_whole else 2 * entry.shape[-1]
    chunks = tuple(
        replace(chunk, offsets=(0,) * len(shape), sizes=shape, strides=chunk.strides or strides)
        for chunk in entry.chunks
    )
    scale = Factors(factors, (rows, columns), (1, size), (rows, grid))
    return TensorEntry(name, FP4, shape, chunks, factors=scale)


def _last(path: KeyPath, key: str, name: str) -> str | int:
    last = path[-1]
    end = len(key) - len(name)
    return last[:-end] if isinstance(last, str) else last


def _factors(
    key: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry]
) -> TensorEntry | None:
    """The factors of a weight, if it has any."""
    is_float = entry.dtype.is_floating_point and entry.dtype.itemsize == 1
    if not is_float and entry.dtype is not _INT8:
        return None
    module = _module(key)
    names = [key + end for end in (*_OF_KEY, _OF_COLUMNS)]
    names += [module + name for name in _OF_MODULE] if module is not None else []
    for name in names:
        scale = tensors.get(name)
        if scale is not None and (
            scale.dtype.is_floating_point or (scale.dtype is _UINT8 and is_float)
        ):
            return scale
    return None


def _module(key: str) -> str | None:
    """What stands before ``weight``."""
    return key.removesuffix("weight") if key.rpartition(".")[2] == "weight" else None


def _blocks(
    shape: tuple[int, ...], found: tuple[int, ...], stated: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None:
    """``(matrix, block, grid)`` of a weight, from its shape and that of its factors."""
    stack, (rows, columns) = prod(shape[:-2]), ((1,) * 2 + shape)[-2:]
    whole = (max(stack * rows, 1), max(columns, 1))
    if len(found) == 2 * len(shape) and set(found[1::2]) == {1}:
        found = found[::2]  # Model Optimizer keeps the dims that it reduced
    if len(found) == len(shape) >= 2 and found[:-2] == shape[:-2]:
        block = _block_for(shape[-2:], found[-2:], stated)
        if block is not None:
            return (max(rows, 1), max(columns, 1)), block, (found[-2], found[-1])
        if stated is not None:
            return None
    if prod(found) == 1:
        return whole, whole, (1, 1)
    if len(shape) >= 2 and found in {shape[:-1], (*shape[:-1], 1)}:
        return whole, (1, whole[1]), (whole[0], 1)
    if len(shape) > 2 and found in {(stack,), shape[:-2], (*shape[:-2], 1), (*shape[:-2], 1, 1)}:
        matrix = (max(rows, 1), max(columns, 1))
        return matrix, matrix, (1, 1)
    return None


def _columns(
    shape: tuple[int, ...], found: tuple[int, ...]
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None:
    """The same where every column of equal parts of the rows has a factor."""
    if len(shape) != 2 or len(found) != 2 or 0 in found or shape[1] != found[1]:
        return None
    size, rest = divmod(shape[0], found[0])
    return None if rest else (shape, (size, 1), found)


def _block_for(
    shape: tuple[int, ...], grid: tuple[int, ...], stated: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Rows and columns of a block that make as many factors as there are."""
    found = []
    for length, count, usual in zip(shape, grid, stated or _BLOCK, strict=True):
        sizes = [usual]
        if stated is None and count:
            # A power of two, of which at most one fits where there are several blocks; or the
            # length in equal parts.
            sizes += [1 << n for n in range(length.bit_length() + 1)]
            sizes += [length // count] if length % count == 0 and length else []
        size = next((size for size in sizes if -(-length // size) == count), None)
        if size is None:
            return None
        found.append(size)
    return found[0], found[1]


def _activations(
    tensors: Mapping[str, TensorEntry], made: Mapping[str, TensorEntry], *, is_any: bool
) -> Iterator[str]:
    """Keys of factors that speak of activations alone."""
    for key in made:
        module = _module(made[key].key)
        for name in _ACTIVATIONS if module is not None else ():
            if f"{module}{name}" in tensors:
                yield f"{module}{name}"
    for key, entry in tensors.items():
        if is_any and key.endswith(_CACHE) and entry.numel == 1 and entry.dtype.is_floating_point:
            yield key


def _offset(
    tensors: Mapping[str, TensorEntry], made: Mapping[str, TensorEntry]
) -> Iterator[tuple[str, str]]:
    """Weights that are more than elements times factors."""
    for entry in made.values():
        module = _module(entry.key)
        for name in _OFFSETS if module is not None else ():
            if f"{module}{name}" in tensors:
                yield f"{module}{name}", "elements times factors would leave it out"


def _alone(tensors: Mapping[str, TensorEntry], *, is_any: bool) -> Iterator[tuple[str, str]]:
    """Weights in one byte without factors, where others have some."""
    for key, entry in tensors.items():
        is_byte = entry.dtype.is_floating_point and entry.dtype.itemsize == 1
        if is_any and is_byte and entry.factors is None:
            yield key, f"is stored as {entry.dtype.label}, and no factors are beside it"
