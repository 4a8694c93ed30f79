"""Does a checkpoint fit?  Every reason at once, from headers alone.

Nothing is converted and no tensor is read; torch is imported only by whoever passes a live model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

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
from dcpconv.families.configs.patching import parse_pairs
from dcpconv.families.keymaps import Keymap, keymaps, read_keymap, resolve_family
from dcpconv.plan.coverage import MISFITS, Coverage, Fault, cover_as_stored
from dcpconv.plan.in_memory import cover_in_memory, spells_like_files
from dcpconv.plan.left_out import without_idle
from dcpconv.plan.matching import cover
from dcpconv.plan.refusals import parse_allowed, refused_features, without
from dcpconv.sources.live_models import LiveModel
from dcpconv.sources.opening import Named, Side, open_side, open_target
from dcpconv.sources.recognition import Weights, recognise
from dcpconv.sources.settling import named_keymap, settle, target_keymap

_NO_CONFIG = (
    "no config beside the source: its layers and experts are those its keys count; --assets DIR"
    " names one"
)


def check(
    source: Named,
    *,
    to: str | None = None,
    against: Named | None = None,
    from_: str | None = None,
    keymap: str | os.PathLike[str] | None = None,
    assets: str | os.PathLike[str] | None = None,
    spec: str | Sequence[str] = (),
    allow: Sequence[str] = (),
    dtypes: bool = False,
) -> Coverage:
    """The account of every key on both sides; true if everything fits.

    Without ``to`` and ``against``: whether the files are whole and every key of the source's own
    naming is there.

    Args:
        source: A checkpoint of any form, a hub id, a key list, a live model or state_dict.
        to: Naming that the source should be convertible into; with ``against``, the target's own.
        against: What has the keys and shapes that the source should have: another checkpoint of
            any form and naming, a hub id, a ``config.json`` or ``params.json``, a key list, a live
            model (the meta device is enough) or a state_dict.
        from_: Naming of the source, where keys leave a choice.
        keymap: A table of your own, which ``to`` and ``from_`` may then name.
        assets: Directory with the source's config, where there is none beside it.
        spec: Numbers of the model that no file states: ``heads=8,kv_heads=2``.
        allow: Features that may be lost although the target cannot express them, by name.
        dtypes: Element types must agree too, with the target's or those the config names;
            otherwise differences are notes.

    Raises:
        NotACheckpointError: The source or target is absent or nothing we know.
        FormatError: The source cannot be read at all, or the target is damaged.
        AmbiguousFamilyError: Several namings fit and lead to different bytes.
        KeymapError: No such family.
        LayoutError: A size is needed that neither config nor shapes reveal.
    """
    problems: list[str] = []
    allow = parse_allowed(allow)
    directory = os.fspath(assets) if assets is not None else None
    own = read_keymap(Path(keymap)) if keymap is not None else None
    side = open_side(source, assets=directory, problems=problems)
    if not side.catalog.tensors and not problems:
        problems.append("there are no tensors in it")
    named = from_ if from_ is not None else _known(side.family)
    weights, settled, remarks = settle(
        side.catalog, side.spec, from_=named, own=own, sizes=parse_pairs(spec)
    )
    notes = [*side.notes, *remarks]
    if side.spec is None and weights.keymap is not None:
        notes.append(_NO_CONFIG)
    if to is not None and settled is not None and settled.unsaid:
        names = ", ".join(settled.unsaid)
        notes.append(f"no file says {names}: a conversion that writes a parameter file asks")
    side = replace(side, spec=settled)
    try:
        if against is not None:
            target = open_target(against)
            coverage, wanted = _against(
                side, weights, target, own=own, to=to, from_=from_, allow=allow
            )
            notes.extend(target.notes)
        else:
            target, wanted = side, {}
            coverage = _by_table(side, weights, own=own, to=to, allow=allow)
    except LayoutError as error:
        hint = "--assets DIR names the model's config.json or params.json"
        raise LayoutError(error.headline, error.facts, hint=hint) from None
    made = ((t.key, t, wanted[t.key]) for t in coverage.targets if t.key in wanted)
    unlike = tuple(dtype_faults(made) if wanted else _unlike_config(weights, target.spec))
    if unlike and not dtypes:
        notes.append(_mixed(unlike))
    if weights.alternatives:
        names = ", ".join(table.name for table in weights.alternatives)
        notes.append(f"the keys also fit {names}; --from NAME chooses")
    coverage = replace(
        coverage,
        problems=tuple(problems),
        misshapen=(*coverage.misshapen, *(unlike if dtypes else ())),
        read=side.end,
        asked=target.end if against is not None else coverage.asked,
        evidence=weights.evidence,
        notes=tuple(dict.fromkeys((*coverage.notes, *notes))),
    )
    return coverage or replace(coverage, suggestions=suggest(coverage, weights))


def _by_table(
    side: Side, weights: Weights, *, own: Keymap | None, to: str | None, allow: Sequence[str]
) -> Coverage:
    """The account against a naming: the one asked for, or the source's own."""
    if to is not None:
        wanted = target_keymap(to, own, weights.keymap, side.spec)
        return _into(wanted, weights, side.spec, allow=allow)
    if weights.keymap is None:
        coverage = cover_as_stored(weights)
        why = "no naming table knows these keys: only the files were checked"
        return replace(coverage, notes=(why,))
    settled = replace(weights, alternatives=())  # whichever it is, its keys are complete or not
    return cover(settled, weights.keymap, spec=side.spec, omit_ties=weights.keymap.family == "hf")


def _into(
    wanted: Keymap, weights: Weights, spec: ModelSpec | None, *, allow: Sequence[str]
) -> Coverage:
    if weights.keymap is None:
        return nothing_known(weights, wanted, spec)
    is_renamed = wanted.name != weights.keymap.name
    weights, spec = without_idle(weights, spec, wanted, allow=allow)
    refused = refused_features(wanted, spec) if spec is not None and is_renamed else ()
    return cover(
        weights,
        wanted,
        spec=spec,
        omit_ties=wanted.family == "hf",
        refused=without(refused, allow),
    )


def _against(
    side: Side,
    weights: Weights,
    target: Side,
    *,
    own: Keymap | None,
    to: str | None,
    from_: str | None,
    allow: Sequence[str],
) -> tuple[Coverage, Mapping[str, TensorEntry]]:
    """The account against given keys, whatever says them; and what they are."""
    if target.is_config and target.spec is not None:
        name = to or target.family
        wanted = named_keymap(name, own, None) if to else _of_config(name, target.spec)
        assert wanted is not None  # noqa: S101  a name was given
        return _into(wanted, weights, target.spec, allow=allow), {}
    live = target.model if to is None else None
    if live is not None and spells_like_files(weights, side.spec, live):
        return _as_live(weights, target.catalog, live)
    stated = to if to is not None else _known(target.family)
    wanted_keys = recognise(
        target.catalog, spec=target.spec, keymap=named_keymap(stated, own, target.spec)
    )
    is_tied = any(one.spec is not None and one.spec.tied for one in (side, target))
    alike = compare_keys(weights, wanted_keys, is_tied=is_tied)
    table = wanted_keys.keymap
    if weights.keymap is None or table is None or _same(weights, wanted_keys):
        return alike, wanted_keys.entries
    # Tables of one group differ in a few rows only, and then keys do not say which one was meant:
    # the account that needs fewer excuses does.
    may_be_alike = to is None and from_ is None and share_keys(weights, wanted_keys)
    if may_be_alike and alike:
        return alike, wanted_keys.entries
    try:
        source, spec = without_idle(weights, side.spec or target.spec, table, allow=allow)
        converted = compare_results(cover(source, table, spec=spec), source, wanted_keys)
    except DcpconvError:
        if may_be_alike:
            return alike, wanted_keys.entries
        raise
    accounts = (alike, converted) if may_be_alike else (converted,)
    return min(accounts, key=_faults), wanted_keys.entries


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


def _of_config(family: str, spec: ModelSpec) -> Keymap:
    """The table of the model that a parameter file describes."""
    try:
        return resolve_family(family, spec.architecture)
    except KeymapError:
        for table in keymaps().values():
            if spec.architecture in table.architectures:
                return table
        raise


def _known(family: str) -> str | None:
    """A family that a key list states, unless its table is not among ours: then keys decide."""
    return family if family in keymaps() else None


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
