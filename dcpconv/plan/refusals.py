"""What a target naming cannot express of a model, and what the user lets go all the same."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dcpconv.core.errors import NotExpressibleError
from dcpconv.core.spec import ModelSpec
from dcpconv.families import configs
from dcpconv.families.keymaps import Keymap
from dcpconv.plan.coverage import Fault
from dcpconv.sources.said import CHOICES, FIELD


def refused_features(target: Keymap, spec: ModelSpec, source: Keymap | None) -> tuple[Fault, ...]:
    """What the target cannot say about the model, ``key`` being the feature or the field.

    A field of the parameter file whose meaning nobody here knows may be all the difference, unless
    the result keeps a parameter file of the same class.  A table that follows from a field axes or
    kinds of layers knows what it means.
    """
    refusals = configs.refusals(target.parameter_family, spec)
    refused = [Fault(item.name, item.reason) for item in refusals]
    known: frozenset[str] = frozenset()
    tables = [table for table in (target, source) if table is not None and table.declared]
    if tables and spec.unaccounted:
        from dcpconv.core.declared import fields_of  # noqa: PLC0415 - few tables declare anything

        known = known.union(*(fields_of(table.declared) for table in tables))
    if spec.origin != target.config:
        for text in spec.unaccounted:
            name, _, value = text.partition(": ")
            if name in known:
                continue
            why = f"{value}: nothing here knows what this field does to the model"
            refused.append(Fault(FIELD + name, why))
    return tuple(refused)


def without(faults: Sequence[Fault], allowed: Sequence[str]) -> tuple[Fault, ...]:
    """The faults that the user did not allow by name."""
    return tuple(fault for fault in faults if fault.key not in allowed)


def require_expressible(
    target: Keymap,
    features: Sequence[Fault],
    allowed: Sequence[str],
    *,
    source: str | os.PathLike[str],
    undone: str,
    allow_by: str | None = None,
) -> None:
    """Raises unless the user allowed every feature by name.

    Args:
        target: The naming to reach.
        features: From ``refused_features``.
        allowed: Names of those that may be left out.
        source: What errors call the model.
        undone: What did not happen, ``nothing was written``.
        allow_by: Where the user can allow a feature, how, ``--allow NAME``.

    Raises:
        NotExpressibleError: All reasons are listed.
    """
    refused = without(features, allowed)
    if refused:
        raise NotExpressibleError(
            f"{target.name} cannot express this model; {undone}",
            [("source", source), *(("refused", f"{f.key}: {f.why}") for f in refused)],
            hint=f"{allow_by} leaves a feature out; the logits will then differ"
            if allow_by
            and any(fault.key in CHOICES or fault.key.startswith(FIELD) for fault in refused)
            else None,
        )
