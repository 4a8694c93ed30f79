"""Does a checkpoint fit?  Every reason at once, from headers alone.

Nothing is converted and no tensor is read; torch is imported only by whoever passes a live model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dcpconv.checking.adapters import adapter_path, check_adapter
from dcpconv.checking.against import (
    compare_keys,
    compare_results,
    dtype_faults,
    nothing_known,
    share_keys,
)
from dcpconv.checking.suggestions import suggest
from dcpconv.core.catalog import Catalog, TensorEntry
from dcpconv.core.dtypes import BY_LABEL
from dcpconv.core.errors import DcpconvError, KeymapError, LayoutError
from dcpconv.core.spec import ModelSpec
from dcpconv.families.keymaps import Keymap
from dcpconv.plan.account import aim_at
from dcpconv.plan.coverage import MISFITS, Coverage, Fault, cover_as_stored
from dcpconv.plan.in_memory import cover_in_memory, spells_like_files
from dcpconv.plan.kept import explains_more
from dcpconv.plan.manifests import cover_manifest, manifest_in
from dcpconv.sources.live_models import LiveModel
from dcpconv.sources.opening import Openable
from dcpconv.sources.recognition import Weights, recognise
from dcpconv.sources.said import STORED, Said
from dcpconv.sources.understanding import Source, understand, understand_described
from dcpconv.stores.schemes import path_of

if TYPE_CHECKING:
    from dcpconv.plan.readers import Readers

_NO_CONFIG = (
    "no config beside the source: its layers and experts are those its keys count; --assets DIR"
    " names one"
)


def check(
    source: Openable,
    *,
    to: str | None = None,
    against: Openable | None = None,
    from_: str | None = None,
    keymap: str | os.PathLike[str] | None = None,
    assets: str | os.PathLike[str] | None = None,
    spec: str | Sequence[str] = (),
    allow: Sequence[str] = (),
    dtypes: bool = False,
    data: bool = False,
    progress: Callable[[int], None] | None = None,
    total: Callable[[int], None] | None = None,
    ranks: Readers | None = None,
) -> Coverage:
    """The account of every key on both sides; true if everything fits.

    Without ``to`` and ``against``: whether the files are whole and every key of the source's own
    naming is there.

    Args:
        source: A checkpoint of any form, a hub id, a key list, a live model or state_dict.
        to: Naming that the source should be convertible into; with ``against``, the target's own.
            ``stored``: keys as they are on either side.
        against: What has the keys and shapes that the source should have: another checkpoint of
            any form and naming, a hub id, a ``config.json`` or ``params.json``, a key list, a live
            model (the meta device is enough) or a state_dict; or the manifest of a fingerprint.
        from_: Naming of the source, where keys leave a choice.
        keymap: A table of your own, which ``to`` and ``from_`` may then name.
        assets: Directory with the source's config, where there is none beside it.
        spec: Numbers of the model that no file states: ``heads=8,kv_heads=2``.
        allow: Features that may be lost although the target cannot express them, by name.
        dtypes: Element types must agree too, with the target's or those the config names;
            otherwise differences are notes.
        data: Read every tensor and compare what it holds with the digests of a manifest.
        progress: Called from the threads with bytes read since its last call.
        total: Called with the bytes that will be read, before the first is.
        ranks: The processes that read the tensors together, each a share; all get the same.

    Raises:
        RankError: The ranks do not read the same, or one of them is gone.
        NotACheckpointError: The source or target is absent or nothing we know.
        FormatError: The source cannot be read at all, or the target is damaged.
        AmbiguousFamilyError: Several namings fit and lead to different bytes.
        KeymapError: No such family.
        LayoutError: A size is needed that neither config nor shapes reveal.
    """
    said = Said.parse(from_=from_, keymap=keymap, assets=assets, spec=spec, allow=allow)
    if isinstance(source, (str, os.PathLike)):
        source = path_of(source)  # lists a store once
    manifest = manifest_in(against)
    if manifest is not None or data:
        return _contents(
            source, manifest, said, data=data, progress=progress, total=total, ranks=ranks
        )
    adapter = adapter_path(source)
    if adapter is not None and to is None:
        return check_adapter(adapter, against, said)
    found = understand(source, said, collects=True)
    notes = list(found.notes)
    if found.parameters is None and found.keymap is not None:
        notes.append(_NO_CONFIG)
    if to is not None and found.spec is not None and found.spec.unsaid:
        names = ", ".join(found.spec.unsaid)
        notes.append(f"no file says {names}: a conversion that writes a parameter file asks")
    target: Source | None = None
    wanted: Mapping[str, TensorEntry] = {}
    try:
        if against is not None:
            spelled = to if to != STORED else None
            target = understand_described(against, Said(from_=spelled, keymap=said.keymap))
            if to == STORED:
                wanted = target.weights.entries
                coverage = compare_keys(found.weights, target.weights, is_tied=False)
            else:
                is_said = from_ is not None or to is not None
                coverage, wanted = _against(found, target, is_said=is_said)
            notes.extend(target.notes)
        else:
            coverage = _by_table(found, to)
    except LayoutError as error:
        hint = "--assets DIR names the model's config.json or params.json"
        raise LayoutError(error.headline, error.facts, hint=hint) from None
    weights = found.weights
    made = ((t.key, t, wanted[t.key]) for t in coverage.targets if t.key in wanted)
    numbers = target.spec if target is not None else found.spec
    unlike = tuple(dtype_faults(made) if wanted else _unlike_config(weights, numbers))
    if unlike and not dtypes:
        notes.append(_mixed(unlike))
    if weights.alternatives:
        names = ", ".join(table.name for table in weights.alternatives)
        notes.append(f"the keys also fit {names}; --from NAME chooses")
    if to is not None and to != STORED:
        notes.extend(weights.doubts)
    coverage = replace(
        coverage,
        problems=found.problems,
        misshapen=(*coverage.misshapen, *(unlike if dtypes else ())),
        read=found.end,
        asked=target.end if target is not None else coverage.asked,
        evidence=weights.evidence,
        notes=tuple(dict.fromkeys((*coverage.notes, *notes))),
    )
    return coverage or replace(coverage, suggestions=suggest(coverage, weights))


def _contents(
    source: Openable,
    manifest: Path | None,
    said: Said,
    *,
    data: bool,
    progress: Callable[[int], None] | None,
    total: Callable[[int], None] | None,
    ranks: Readers | None,
) -> Coverage:
    """The account against a manifest, by contents where they are asked for."""
    if manifest is None:
        raise DcpconvError(
            "only a manifest says what tensors hold",
            [("expected", "--against FILE, written by `dcpconv fingerprint SRC -o FILE`")],
            hint="`dcpconv diff A B` compares the contents of two checkpoints",
        )
    is_named = isinstance(source, (str, os.PathLike))
    what = path_of(source) if data and is_named else source
    found = understand(what, said, collects=True)
    coverage = cover_manifest(
        found, manifest, data=data, progress=progress, total=total, ranks=ranks
    )
    return replace(
        coverage,
        problems=found.problems,
        read=found.end,
        evidence=found.weights.evidence,
        notes=tuple(dict.fromkeys((*found.notes, *coverage.notes))),
    )


def _by_table(source: Source, to: str | None) -> Coverage:
    """The account against a naming: the one asked for, or the source's own."""
    if to is not None and to != STORED:
        return _into(source, source.target_table(to))
    if source.keymap is None:
        coverage = cover_as_stored(source.weights)
        return replace(coverage, notes=("no table is for this model: only the files were checked",))
    return _into(source, source.keymap)


def _into(source: Source, table: Keymap, *, numbers: ModelSpec | None = None) -> Coverage:
    """The account of a source in a naming.

    Args:
        source: What there is.
        table: The naming.
        numbers: Of the model that the target describes, where it has some of its own.
    """
    spec = numbers if numbers is not None else source.spec
    if source.keymap is None:
        return nothing_known(source.weights, table, spec)
    coverage = aim_at(replace(source, spec=spec), table).cover()
    if explains_more(source.parameters):
        return coverage
    return replace(coverage, unknown=(*coverage.unknown, *coverage.kept))


def _against(
    source: Source, target: Source, *, is_said: bool
) -> tuple[Coverage, Mapping[str, TensorEntry]]:
    """The account against given keys, whatever says them; and what they are.

    Args:
        source: What there is.
        target: What there should be.
        is_said: Whether the user has named a naming on either side.
    """
    if target.end.form == "config":
        table = target.keymap
        if table is None:
            named = target.architecture or "the model of its parameter file"
            raise KeymapError(
                f"there is no table for {named}",
                [("target", target.end.path)],
                hint="check against a live model or a key list: `dcpconv keys SRC -o FILE`",
            )
        return _into(source, table, numbers=target.spec), {}
    live = target.model if target.said.from_ is None else None
    if live is not None and spells_like_files(source.weights, live):
        return _as_live(source.weights, target.catalog, live)
    weights, wanted_keys = source.weights, _keys_of(target, source)
    is_tied = any(one.spec is not None and one.spec.tied for one in (source, target))
    alike = compare_keys(weights, wanted_keys, is_tied=is_tied)
    table = wanted_keys.keymap
    if weights.keymap is None or table is None or _same(weights, wanted_keys):
        return alike, wanted_keys.entries
    # Tables of one group differ in a few rows only, and then keys do not say which one was meant:
    # the account that needs fewer excuses does.
    may_be_alike = not is_said and share_keys(weights, wanted_keys)
    if may_be_alike and alike:
        return alike, wanted_keys.entries
    try:
        going = aim_at(replace(source, spec=source.spec or target.spec), table, form="torch")
        made = replace(going, refused=()).cover()
        converted = compare_results(made, going.weights, wanted_keys)
    except DcpconvError:
        if may_be_alike:
            return alike, wanted_keys.entries
        raise
    accounts = (alike, converted) if may_be_alike else (converted,)
    return min(accounts, key=_faults), wanted_keys.entries


def _keys_of(target: Source, source: Source) -> Weights:
    """The keys of a target that names no model: those of the source's, if they are all of that."""
    found = target.weights
    if source.spec is None or target.spec is not None or target.said.from_ is not None:
        return found
    alike = recognise(target.catalog, spec=source.spec)
    if alike.keymap is None or alike.keymap is found.keymap:
        return found
    whole = recognise(target.catalog, tables=[alike.keymap])
    return found if whole.keymap is None else whole


def _as_live(
    weights: Weights, wanted: Catalog, model: LiveModel
) -> tuple[Coverage, Mapping[str, TensorEntry]]:
    """The account against a live model of transformers, which says itself what its files become."""
    shapes = {key: entry.shape for key, entry in wanted.tensors.items()}
    keys = Weights(wanted, wanted.tensors, wanted.tied, None, "", ())
    return compare_results(cover_in_memory(weights, model, shapes), weights, keys), wanted.tensors


def _faults(coverage: Coverage) -> int:
    return sum(len(getattr(coverage, label)) for label in MISFITS)


def _same(weights: Weights, wanted: Weights) -> bool:
    """Whether the source's naming is one that the target may be in."""
    tables = (wanted.keymap, *wanted.alternatives)
    return weights.keymap is not None and weights.keymap.name in {t.name for t in tables if t}


def _unlike_config(weights: Weights, spec: ModelSpec | None) -> Iterator[Fault]:
    """Matrices whose element type is not the one that the config names."""
    stated = BY_LABEL.get(spec.dtype) if spec is not None and spec.dtype is not None else None
    for key, entry in weights.entries.items() if stated is not None else ():
        if entry.dtype != stated and entry.dtype.is_floating_point and len(entry.shape) > 1:
            yield Fault.unlike(key, stated, entry.dtype)


def _mixed(faults: Sequence[Fault]) -> str:
    """One sentence about element types."""
    first, count = faults[0], len(faults)
    keys = f"{first.key} is" if count == 1 else f"{count} keys are not of the type expected:"
    more = "" if count == 1 else f" {first.key} is"
    return f"{keys}{more} {first.found} where {first.expected} was expected"
