"""What a ``torch.save`` file of a whole checkpoint will look like, before any byte moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dcpconv.core.catalog import KeyPath
from dcpconv.core.errors import FormatError
from dcpconv.core.outline import Fill, OutFile, Outline, OutTensor
from dcpconv.formats.torchfile.frames import (
    STORAGE_ALIGNMENT,
    ArchiveLayout,
    add_frame_records,
    tensor_call,
)
from dcpconv.formats.torchfile.nesting import key_of, nest
from dcpconv.formats.torchfile.unpickling import dumps


def outline(
    tensors: Sequence[OutTensor],
    objects: Mapping[KeyPath, object],
    *,
    filename: str,
    modulus: int = 4096,
) -> Outline:
    """One ``torch.save`` file that ``torch.load`` reads with ``weights_only``, mapped or not.

    Args:
        tensors: In the order their payloads will lie; each is one chunk that covers all of it.
            A tied one takes no bytes of its own.
        objects: Values that are not tensors, by where they nest.
        filename: Name of the file in the result.
        modulus: Block size of the file system: a payload that can be cloned starts at the same
            offset as its source, modulo this; at most 32768.

    Raises:
        FormatError: Paths contradict each other, or an object cannot be pickled.
    """
    if not STORAGE_ALIGNMENT <= modulus <= 32768:
        raise ValueError(f"modulus {modulus} is not between {STORAGE_ALIGNMENT} and 32768")
    _check_objects(objects)
    storage_keys = _storage_keys(tensors)
    recipes = [
        (tensor.path, tensor_call(tensor.dtype, tensor.shape, storage_key=storage_keys[tensor.key]))
        for tensor in tensors
    ]
    value = nest([*recipes, *objects.items()])
    layout = ArchiveLayout()
    add_frame_records(layout, value)
    payloads: dict[str, tuple[int, Fill]] = {}
    for tensor in tensors:
        storage_key = storage_keys[tensor.key]
        if storage_key in payloads:
            continue
        fill = _fill(tensor)
        residue, spacing = fill.congruence(modulus), modulus
        # A reader maps the payload, and its elements should not straddle words.
        if residue is None or residue % min(8, tensor.dtype.itemsize):
            residue, spacing = 0, STORAGE_ALIGNMENT
        offset = layout.add_payload(
            f"data/{storage_key}", fill.nbytes, modulus=spacing, residue=residue
        )
        payloads[storage_key] = offset, fill
    layout.finish()
    file = OutFile(
        name=filename,
        nbytes=layout.position,
        literals=tuple(layout.literals),
        payloads=tuple(payloads.values()),
    )
    return Outline(files=(file,))


def _fill(tensor: OutTensor) -> Fill:
    if len(tensor.chunks) != 1 or tensor.chunks[0].sizes != tensor.shape:
        raise ValueError(f"{tensor.key}: a torch.save file holds a tensor in one piece")
    return tensor.chunks[0].fill


def _storage_keys(tensors: Sequence[OutTensor]) -> dict[str, str]:
    """Record ``data/N`` of every tensor; a tied one has its owner's."""
    keys: dict[str, str] = {}
    kinds: dict[str, tuple[object, int]] = {}
    count = 0
    for tensor in tensors:
        kind = (tensor.dtype, _fill(tensor).nbytes)
        if tensor.tied_to in keys and kinds[tensor.tied_to] == kind:
            keys[tensor.key] = keys[tensor.tied_to]
        else:
            keys[tensor.key] = str(count)
            count += 1
        kinds[tensor.key] = kind
    return keys


def _check_objects(objects: Mapping[KeyPath, object]) -> None:
    refused = [
        fact for path, value in objects.items() for fact in _reasons_against(key_of(path), value)
    ]
    if refused:
        raise FormatError("values cannot be stored in a torch.save file", refused)


def _reasons_against(key: str, value: object) -> list[tuple[str, object]]:
    try:
        dumps(value)
    except FormatError as error:
        return [("key", f"{key}: {error.headline}"), *error.facts]
    return []
