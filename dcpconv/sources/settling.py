"""What the user and the files say about a model: its config, its naming, the naming to reach."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from dcpconv.core.catalog import Catalog
from dcpconv.core.errors import SpecError
from dcpconv.core.spec import ModelSpec
from dcpconv.families import configs
from dcpconv.families.configs.patching import patched_spec
from dcpconv.families.keymaps import Keymap, resolve_family
from dcpconv.sources.numbers import inferred_spec, shares_head
from dcpconv.sources.recognition import Weights, recognise


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
            return None, (f"the config beside the source was not used: {error.in_one_line}",)
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
