"""What differs between two checkpoints, whatever forms, namings and element types they are in."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from dcpconv.comparing.records import Diff
from dcpconv.core.errors import LayoutError
from dcpconv.plan.canonical import Canonical, canonical
from dcpconv.plan.differences import Status, TensorDiff, differences
from dcpconv.sources.said import Said
from dcpconv.sources.selection import require_tensors
from dcpconv.sources.understanding import Source
from dcpconv.sources.with_weights import with_weights

_RANK: Mapping[Status, int] = {
    "shape": 0,
    "only_a": 1,
    "only_b": 2,
    "untold": 3,
    "differs": 4,
    "close": 5,
    "equal": 6,
}


def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    tolerance: float = 0.0,
    only: str | None = None,
    stored: bool = False,
    from_: str | None = None,
    keymap: str | os.PathLike[str] | None = None,
    assets: str | os.PathLike[str] | None = None,
    spec: str | Sequence[str] = (),
    jobs: int | None = None,
    progress: Callable[[int], None] | None = None,
    total: Callable[[int], None] | None = None,
) -> Diff:
    """Compares the weights of two checkpoints, tensor by tensor, in constant memory.

    Bytes are compared first; only where they differ are values measured, in fp32 (fp64 where a
    type needs it), with sums in fp64.  Weights with factors (fp8 in blocks, MXFP4) are multiplied
    out beside plain ones, which is the only thing that torch is imported for.

    Args:
        a: A checkpoint of any form and naming, or a hub id.
        b: Another one.
        tolerance: Largest |a-b| that counts as the same.
        only: Compare only what sits under this key, or keys that match this pattern.
        stored: Compare keys and axes as they are stored, although tables know them.
        from_: Naming of a and b, where keys leave a choice.
        keymap: A table of your own, which ``from_`` may then name.
        assets: Directory with the config of both, where there is none beside one of them.
        spec: Numbers of the model that no file states: ``heads=8,kv_heads=2``.
        jobs: Threads; as many as there are CPUs, 4 at most, by default.
        progress: Called from the threads with bytes of one side compared, or measured, since its
            last call.
        total: Called with the bytes of one side that will be compared, before the first is; and
            again with more, once it is known what has to be measured, too.

    Raises:
        NotACheckpointError: There is nothing of the kind.
        FormatError: A file is truncated or malformed, or there are no tensors.
        AmbiguousFamilyError: Several namings fit and lead to different bytes.
        LayoutError: Elements change places, and neither config nor shapes say where to.
        SourceChangedError: A file changed meanwhile.
    """
    said = Said.parse(from_=from_, keymap=keymap, assets=assets, spec=spec)
    sources = (with_weights(a, said, only), with_weights(b, said, only))
    worth: tuple[str, ...] = ()
    if not stored:
        sources, worth = _as_worth(sources, (a, b), said, only)
    known, notes = _known(sources, is_stored=stored)
    for source, side in zip(sources, known, strict=True):
        require_tensors(source.catalog, side.targets)
    tensors = differences(
        sources, known, tolerance=tolerance, jobs=jobs, progress=progress, total=total
    )
    return Diff(
        sources[0].end,
        sources[1].end,
        (known[0].family, known[1].family),
        tuple(sorted(tensors, key=_by_change)),
        tolerance,
        tuple(dict.fromkeys((*worth, *notes, *known[0].notes, *known[1].notes))),
    )


def _as_worth(
    sources: tuple[Source, Source],
    names: tuple[str | os.PathLike[str], str | os.PathLike[str]],
    said: Said,
    only: str | None,
) -> tuple[tuple[Source, Source], tuple[str, ...]]:
    """The sources, one of them multiplied by its factors where only that one has some."""
    has_factors = [_has_factors(source) for source in sources]
    if has_factors[0] == has_factors[1]:
        return sources, ()
    at = has_factors.index(True)
    made = with_weights(names[at], replace(said, dequantize=True), only)
    if made.scaled is None or made.scaled.unlike or made.scaled.refused:
        return sources, ()
    note = f"what {made.end.path} has factors for is compared as --dequantize would write it"
    return ((made, sources[1]) if at == 0 else (sources[0], made)), (note,)


def _has_factors(source: Source) -> bool:
    if all(entry.dtype.itemsize > 1 for entry in source.catalog.tensors.values()):
        return False
    from dcpconv.sources.scales import multiplied  # noqa: PLC0415 - few weights have any

    fields = source.parameters.fields if source.parameters is not None else None
    return bool(multiplied(source.catalog, fields)[1].names)


def _known(
    sources: tuple[Source, Source], *, is_stored: bool
) -> tuple[tuple[Canonical, Canonical], tuple[str, ...]]:
    """Both sides without their namings; by their keys where that is not possible for both."""
    a, b = sources
    tables = [source.keymap for source in sources]
    notes: tuple[str, ...] = ()
    if not is_stored and all(tables):
        try:
            return (canonical(a), canonical(b)), notes
        except LayoutError:
            if tables[0] is not tables[1]:
                raise
        notes = ("the files do not say how many heads there are: axes are compared as stored",)
    elif not is_stored and any(tables):
        unknown = a if tables[0] is None else b
        notes = (f"no table knows {unknown.end.path}, so keys are compared as they are stored",)
    return (canonical(a, as_it_is_stored=True), canonical(b, as_it_is_stored=True)), notes


def _by_change(tensor: TensorDiff) -> tuple[int, float, float]:
    """What changed most comes first; the order of the model is kept among equals."""
    apart = tensor.apart
    rank = _RANK[tensor.status]
    if apart is None:
        return rank, 0.0, 0.0
    relative = math.inf if math.isnan(apart.relative) else apart.relative
    return rank, -relative, -apart.max_abs
