"""The part of a checkpoint that the user asks for."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from dataclasses import replace

from dcpconv.core.catalog import Catalog
from dcpconv.core.errors import FormatError


def select(catalog: Catalog, only: str | None) -> Catalog:
    """The part of a checkpoint under one key, or whose keys match a shell pattern.

    Raises:
        FormatError: Nothing is there; says what is.
    """
    if only is None:
        return catalog
    keys = [*catalog.tensors, *catalog.objects]
    under = {key for key in keys if key == only or key.startswith(f"{only}.")}
    chosen = under or {key for key in keys if fnmatch.fnmatchcase(key, only)}
    if not chosen:
        tops = sorted({str(catalog.path_of(key)[0]) for key in keys})
        raise FormatError(
            f"nothing in the checkpoint is under {only!r} or matches it",
            [("source", catalog.source), ("found", ", ".join(tops[:12]))],
            hint="give a container such as model, or a pattern such as 'layers.0.*'",
        )
    return replace(
        catalog,
        tensors={key: entry for key, entry in catalog.tensors.items() if key in chosen},
        objects={key: value for key, value in catalog.objects.items() if key in chosen},
        tied={k: v for k, v in catalog.tied.items() if k in chosen and v in chosen},
    )


_SHOWN = 6
"""Keys named of those that are no tensors."""


_RANDOM = frozenset({"python", "numpy", "cpu", "cuda", "xla", "npu", "hpu", "mlu", "musa"})
"""Keys of the random states that transformers and accelerate save (``rng_state.pth``)."""
_STATE_OF_CPU = (5056,)
_STATES = {_STATE_OF_CPU, (16,)}
"""Shapes of ``torch.get_rng_state()`` and ``torch.cuda.get_rng_state()``, bytes both: accelerate,
verl and others keep them under keys of their own."""
_OPTIMIZER = frozenset({"state", "param_groups"})
"""Keys of ``torch.optim.Optimizer.state_dict()``."""


def why_no_weights(catalog: Catalog, chosen: Collection[object]) -> str | None:
    """What a checkpoint is that holds no model; ``None`` if it may hold one.

    Args:
        catalog: The checkpoint.
        chosen: The tensors that were found to be weights.
    """
    tops = {catalog.path_of(key)[0] for key in (*catalog.tensors, *catalog.objects)}
    if (tops and tops <= _RANDOM and len(tops) > 1) or _are_generators(catalog):
        return "these are the random states of a run, not a model"
    if tops == _OPTIMIZER:
        return "this is the state of an optimizer, not a model"
    return None if chosen else "there are no weights in it"


def _are_generators(catalog: Catalog) -> bool:
    """Whether every tensor is the state of one of torch's generators, whatever it is called."""
    sizes = {
        entry.shape if entry.dtype.name == "uint8" else None for entry in catalog.tensors.values()
    }
    return bool(sizes) and sizes <= _STATES and _STATE_OF_CPU in sizes


def require_tensors(catalog: Catalog, chosen: Collection[object]) -> None:
    """A result without tensors is no result.

    Args:
        catalog: Where they were looked for.
        chosen: The tensors that were found to be weights.

    Raises:
        FormatError: There are none; says what there is instead.
    """
    reason = why_no_weights(catalog, chosen)
    if reason is None:
        return
    from dcpconv.formats.dcp.objects import OpaqueObject  # noqa: PLC0415 - rarely asked
    from dcpconv.formats.torchfile.stand_ins import is_array  # noqa: PLC0415 - likewise

    arrays = [key for key, value in catalog.objects.items() if is_array(value)]
    hint = None
    if arrays:
        hint = (
            "these are NumPy arrays; save tensors:"
            " torch.save({k: torch.from_numpy(v) for k, v in state.items()}, FILE)"
        )
    elif any(isinstance(value, OpaqueObject) for value in catalog.objects.values()):
        hint = "tensors inside objects are not looked for; save a state_dict of tensors"
    elif _are_generators(catalog):
        hint = "the model lies in other files: name those, or the directory that has them"
    elif catalog.tensors:
        hint = "what is there belongs to an optimizer or the like; --only KEY takes a part as it is"
    others = arrays or [*catalog.objects, *catalog.tensors]
    more = len(others) - _SHOWN
    raise FormatError(
        reason,
        [
            ("source", catalog.source),
            *(("found", key) for key in others[:_SHOWN]),
            *([("found", f"and {more} more")] if more > 0 else []),
        ],
        hint=hint,
    )
