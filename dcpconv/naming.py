"""What the user and the files say about a model: its config, its naming, the naming to reach."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from dcpconv import configs
from dcpconv.catalog import Catalog
from dcpconv.configs.patching import patched_spec
from dcpconv.coverage import Fault
from dcpconv.errors import DcpconvError, NotExpressibleError, SpecError
from dcpconv.idle import SELECTION_BIAS
from dcpconv.keymaps import Keymap, resolve_family
from dcpconv.recognition import Weights, recognise
from dcpconv.sizes import inferred_spec, shares_head
from dcpconv.spec import FEATURES, ModelSpec

_CHOICES = FEATURES | {SELECTION_BIAS, "rope_theta", "overflow"}
"""What ``--allow`` takes: features, and what else may be lost without another shape coming out."""

_SHAPES = frozenset({"n_heads", "n_kv_heads", "head_dim", "untied", "architecture"})
"""Refusals that cannot be overruled: the tensors themselves would not fit the target's code."""


def parse_allowed(names: str | Sequence[str]) -> tuple[str, ...]:
    """The names in ``allow``, several of which may stand in one text, after commas.

    Raises:
        DcpconvError: A name is of nothing that can be left out; lists them all.

    >>> parse_allowed(["rope_scaling,qkv_bias"])
    ('rope_scaling', 'qkv_bias')
    """
    texts = [names] if isinstance(names, str) else names
    found = tuple(name.strip() for text in texts for name in text.split(",") if name.strip())
    fixed = [name for name in found if name in _SHAPES]
    unknown = [name for name in found if name not in _CHOICES | _SHAPES]
    if fixed or unknown:
        raise DcpconvError(
            "not everything can be left out",
            [
                *(
                    ("fixed", f"{name}: the tensors would not fit the target's code")
                    for name in fixed
                ),
                *(("unknown", name) for name in unknown),
                ("expected", ", ".join(sorted(_CHOICES))),
            ],
        )
    return found


def find_spec(
    catalog: Catalog, assets: str | os.PathLike[str] | None
) -> tuple[ModelSpec | None, tuple[str, ...]]:
    """The config beside the source, or in ``assets``, and what to say about it.

    A config that cannot be read is only a note here: keys and bytes can be kept without it, and
    what cannot says that it needs one.

    Raises:
        SpecError: The config in ``assets`` cannot be read.
    """
    for place in (assets, catalog.source):
        if place is None or configs.find_config(Path(place)) is None:
            continue
        try:
            return configs.read_spec(Path(place)), ()
        except SpecError as error:
            if place is assets:
                raise
            facts = "; ".join(f"{label} {value}" for label, value in error.facts)
            return None, (f"the config beside the source was not used: {error.headline} ({facts})",)
    return None, ()


def settle(
    catalog: Catalog,
    spec: ModelSpec | None,
    *,
    from_: str | None = None,
    own: Keymap | None = None,
    sizes: Mapping[str, str] | None = None,
    root: str | None = None,
) -> tuple[Weights, ModelSpec | None, tuple[str, ...]]:
    """The weights of a checkpoint in their naming, the model's numbers, and what these rest on.

    Args:
        catalog: The checkpoint.
        spec: What the config says, where one was found.
        from_: Naming of the source, where the user has said it.
        own: The user's own table, which ``from_`` may name.
        sizes: What the user says of the model, from ``parse_pairs``; it goes over the config.
        root: What stands before every key, where the user has said it.

    Raises:
        KeymapError: ``from_`` is no family, or none of its tables is for this architecture.
        SpecError: A number does not fit, or contradicts the shapes.
    """
    weights = recognise(catalog, spec=spec, keymap=named_keymap(from_, own, spec), root=root)
    settled, notes = settled_spec(weights, spec, sizes or {})
    return weights, settled, notes


def settled_spec(
    weights: Weights, spec: ModelSpec | None, sizes: Mapping[str, str]
) -> tuple[ModelSpec | None, tuple[str, ...]]:
    """The model's numbers once its naming is known, and what they rest on.

    Args:
        weights: The weights and their naming.
        spec: What the config says.
        sizes: What the user says, from ``parse_pairs``; it goes over the config.

    Raises:
        SpecError: A number does not fit, or contradicts the shapes.
    """
    if spec is None:
        return inferred_spec(weights, sizes)
    if spec.origin == "meta" and not spec.tied and shares_head(weights):
        spec = spec.model_copy(update={"tied": True})  # params.json has no word for it
    return (patched_spec(spec, sizes) if sizes else spec), ()


def named_keymap(name: str | None, own: Keymap | None, spec: ModelSpec | None) -> Keymap | None:
    """The table that ``name`` means: the user's own or one of ours; ``None`` for no name.

    Raises:
        KeymapError: No such family, or none of its tables is for this architecture.
    """
    if name is None:
        return None
    if own is not None and name == own.name:
        return own
    return resolve_family(name, spec.architecture if spec else None)


def target_keymap(
    name: str, own: Keymap | None, source: Keymap | None, spec: ModelSpec | None
) -> Keymap:
    """The table to reach; what the config does not say, the source's table does.

    Raises:
        KeymapError: No such family, or none of its tables is for this architecture.
    """
    if own is not None and name == own.name:
        return own
    return resolve_family(name, spec.architecture if spec else architecture_of(source))


def architecture_of(keymap: Keymap | None) -> str | None:
    """The model a table is made for first, if it says."""
    return keymap.architectures[0] if keymap and keymap.architectures else None


def refused_features(target: Keymap, spec: ModelSpec) -> tuple[Fault, ...]:
    """What the target's config file cannot say about the model, ``key`` being the feature."""
    refusals = configs.refusals(target.parameter_family, spec)
    return tuple(Fault(item.name, item.reason) for item in refusals)


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
            if allow_by and any(fault.key in _CHOICES for fault in refused)
            else None,
        )
