"""Are these the weights of a manifest?  Names, shapes and types from headers, contents if asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dcpconv.core.catalog import TensorEntry
from dcpconv.plan.canonical import IDLE_AS_ZEROS, Canonical, canonical
from dcpconv.plan.coverage import Coverage, Fault, Target
from dcpconv.plan.fingerprints import (
    Fingerprint,
    TensorPrint,
    fingerprint_of,
    is_manifest,
    read_manifest,
)
from dcpconv.sources.opening import End, Openable
from dcpconv.sources.understanding import Source

if TYPE_CHECKING:
    from dcpconv.plan.readers import Readers

_ONLY_HEADERS = "names, shapes and types were compared; --data compares what the tensors hold"


def manifest_in(against: Openable | None) -> Path | None:
    """The manifest that the user named, or ``None``."""
    if not isinstance(against, (str, os.PathLike)):
        return None
    path = Path(against)
    return path if path.suffix == ".json" and path.is_file() and is_manifest(path) else None


def cover_manifest(
    source: Source,
    path: Path,
    *,
    data: bool,
    progress: Callable[[int], None] | None = None,
    total: Callable[[int], None] | None = None,
    ranks: Readers | None = None,
) -> Coverage:
    """The account of a source against a manifest; true if everything agrees.

    Args:
        source: What there is.
        path: The manifest.
        data: Read and digest every tensor whose name, shape and type agree.
        progress: As for ``fingerprint_of``.
        total: Likewise.
        ranks: Likewise.

    Raises:
        FormatError: The manifest is none, or was edited; a tensor cannot be read.
        AmbiguousFamilyError: Several namings fit and lead to different bytes.
        LayoutError: Elements change places, and neither config nor shapes say where to.
    """
    stated = read_manifest(path)
    known = canonical(source, as_it_is_stored=stated.names == "stored")
    expected = {tensor.name: tensor for tensor in stated.tensors}
    made = {target.key: target for target in known.targets}
    missing = [Fault(name, "", kind="absent") for name in expected if name not in made]
    unknown: list[Target] = []
    idle: list[Target] = []
    misshapen, whole = [], []
    for name, target in made.items():
        tensor = expected.get(name)
        if tensor is None:
            (idle if IDLE_AS_ZEROS.intersection(target.slots) else unknown).append(target)
        elif fault := _unlike(target, tensor):
            misshapen.append(fault)
        else:
            whole.append(target)
    changed: list[Fault] = []
    is_read = data and not source.problems
    if is_read:
        some = replace(known, targets=(*whole, *idle))
        made_again = fingerprint_of(source, some, progress=progress, total=total, ranks=ranks)
        found = {tensor.name: tensor for tensor in made_again.tensors}
        changed = [
            _fault(target, f"{target.key} holds other values than the manifest says")
            for target in whole
            if target.key in found and found[target.key].digest != expected[target.key].digest
        ]
        unknown += [target for target in idle if target.key in found]
    naming = known.family or "as stored"
    return Coverage(
        naming,
        stated.family or "as stored",
        tuple(_stored_names(whole)),
        missing=tuple(missing),
        unknown=tuple(_fault(target, f"the manifest has no {target.key}") for target in unknown),
        misshapen=tuple(misshapen),
        changed=tuple(changed),
        ignored=tuple(Fault(key, why) for key, why in known.left_out),
        asked=End(str(path), "digests", len(expected)),
        notes=_notes(stated, known, is_read=is_read),
    )


def _stored_names(targets: list[Target]) -> Iterator[Target]:
    """Targets under the first of the keys that they are stored as, which the user knows."""
    seen: set[str] = set()
    for target in targets:
        key = _key(target)
        yield target if key in seen else replace(target, key=key)
        seen.add(key)


def _key(target: Target) -> str:
    entry: TensorEntry = target.pieces[0].entry
    return entry.key


def _fault(target: Target, why: str) -> Fault:
    return Fault(_key(target), why, target.slots)


def _unlike(target: Target, tensor: TensorPrint) -> Fault | None:
    if target.shape != tensor.shape:
        return Fault.unlike(_key(target), list(tensor.shape), list(target.shape), target.slots)
    if target.dtype.label != tensor.dtype:
        return Fault.unlike(_key(target), tensor.dtype, target.dtype.label, target.slots)
    return None


def _notes(stated: Fingerprint, known: Canonical, *, is_read: bool) -> tuple[str, ...]:
    said = f"all contents were read and compared with {stated.digest}"
    return (*known.notes, said if is_read else _ONLY_HEADERS)
