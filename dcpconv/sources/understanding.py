"""The one way from what the user typed to a source: opened, recognised and measured, once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dcpconv.core.catalog import Catalog, Shapes
from dcpconv.core.errors import NotACheckpointError, SpecError
from dcpconv.core.spec import ModelSpec
from dcpconv.families import configs
from dcpconv.families.beside import weights_beside
from dcpconv.families.configs.patching import patched_spec
from dcpconv.families.keymaps import Keymap, is_known, keymaps
from dcpconv.families.parameter_files import ParameterFile, read_parameter_file
from dcpconv.sources.numbers import inferred_spec, shares_head
from dcpconv.sources.opening import End, Openable, Opened, only_config, open_source
from dcpconv.sources.recognition import Weights, recognise
from dcpconv.sources.said import Said
from dcpconv.sources.selection import select, why_no_weights
from dcpconv.stores.schemes import path_of

if TYPE_CHECKING:
    from dcpconv.sources.live_models import LiveModel
    from dcpconv.sources.scales import Scaled

_FIELDS = frozenset(ModelSpec.model_fields)


@dataclass(frozen=True, slots=True)
class Source:
    """What the user named, and all that is known of it from headers alone.

    Attributes:
        catalog: Everything it holds; chunks where bytes are behind the keys.
        weights: Its weights and their naming, with the evidence.
        spec: The model's numbers, where a file, the user or the shapes say them.
        parameters: The parameter file beside it, if there is one.
        said: What the user said of it.
        end: What reports call it.
        problems: What is wrong with its files, one sentence each.
        notes: What else a user should know, one sentence each.
        model: What a live model of transformers says of its names.
        scaled: What became of factors, where weights are multiplied out.
    """

    catalog: Catalog
    weights: Weights
    spec: ModelSpec | None
    parameters: ParameterFile | None
    said: Said
    end: End
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    model: LiveModel | None = None
    scaled: Scaled | None = None

    @property
    def keymap(self) -> Keymap | None:
        """Its naming, or ``None`` where no table is for it: its keys are then kept as stored."""
        return self.weights.keymap

    @property
    def architecture(self) -> str | None:
        """The model that its parameter file names, or that its table is made for first."""
        if self.spec is not None:
            return self.spec.architecture
        if self.parameters is not None and self.parameters.architecture:
            return self.parameters.architecture
        table = self.keymap
        return table.architectures[0] if table and table.architectures else None

    def target_table(self, name: str) -> Keymap:
        """The table to reach; what no file says of the model, the source's table does.

        Classes of transformers with another head may call the base model otherwise.

        Raises:
            KeymapError: No such family, or none of its tables is for this architecture.
        """
        table = self.said.table(name, self.architecture)
        assert table is not None  # noqa: S101  a name was given
        if self.spec is None or self.spec.head not in {"none", "spans"} or not table.base:
            return table
        # Few models have such heads.
        from dcpconv.families.configs.hf_writing import base  # noqa: PLC0415
        from dcpconv.families.keymaps.bases import under  # noqa: PLC0415

        prefix = base(table.parameter_family, self.spec)
        has_head = self.spec.head != "none"
        return table if prefix is None else under(table, prefix, has_head=has_head)


def understand(
    what: Openable,
    said: Said | None = None,
    *,
    only: str | None = None,
    root: str | None = None,
    tables: Iterable[Keymap] | None = None,
    catalog: Catalog | None = None,
    collects: bool = False,
    shapes: Shapes | None = None,
) -> Source:
    """Opens a source, finds its parameter file, recognises its naming and measures the model.

    Args:
        what: A checkpoint of any form, a hub id, a key list, a live model or state_dict.
        said: What the user says of it.
        only: Take only what sits under this key, or keys that match this pattern.
        root: What stands before every key, where the user has said it.
        tables: The tables to choose among; by default those that come with the package.
        catalog: What is opened already, under the name ``what``.
        collects: Whether faults of its files are collected in ``problems`` instead of raised.
        shapes: Of the parameters of a live model, in their order: what its files may lack.

    Raises:
        NotACheckpointError: There is nothing of the kind.
        FormatError: A file is malformed.
        KeymapError: The user's naming is no family, or has no table for this architecture.
        SpecError: A number does not fit, or contradicts the shapes; or the parameter file that the
            user named cannot be read.
    """
    problems: list[str] = []
    if catalog is None:
        opened = open_source(
            what, problems=problems if collects else None, said=said, shapes=shapes
        )
    else:
        opened = Opened(catalog, _named(what, catalog), place=catalog.source)
    source = _recognised(opened, said or Said(), only, root, tables)
    reason = why_no_weights(source.catalog, source.weights.entries)
    if collects and reason is not None and not problems:
        problems.append(reason)
    return replace(source, problems=tuple(problems))


def understand_described(what: Openable, said: Said) -> Source:
    """The same for what a parameter file without a checkpoint may describe, too.

    Raises:
        NotACheckpointError: There is nothing of the kind.
        FormatError: A file is malformed.
        SpecError: The parameter file cannot be read.
    """
    if not isinstance(what, (str, os.PathLike)):
        return understand(what, said)
    from dcpconv.sources.key_lists import is_keylist  # noqa: PLC0415 - conversions read none

    path = path_of(what)
    if path.suffix == ".json" and path.is_file() and not is_keylist(path):
        return _config(path, said)
    try:
        return understand(path, said)
    except NotACheckpointError:
        beside = configs.find_config(path) if path.is_dir() else None
        if beside is None:
            raise
        return _config(beside, said)


def measured(
    weights: Weights, spec: ModelSpec | None, said: Said
) -> tuple[ModelSpec | None, tuple[str, ...]]:
    """The model's numbers once its naming is known, and what they rest on.

    Args:
        weights: The weights and their naming.
        spec: What the parameter file says.
        said: What the user says goes over it; so does what a table of theirs fixes.

    Raises:
        SpecError: A number does not fit, or contradicts the shapes.
    """
    if spec is None:
        return inferred_spec(weights, said.sizes)
    if spec.origin == "meta" and not spec.tied and shares_head(weights):
        spec = spec.model_copy(update={"tied": True})  # params.json has no word for it
    if weights.keymap is not None and weights.keymap.is_headless and not spec.tied:
        spec = spec.model_copy(update={"head": "none"})  # config.json names no class
    own = weights.keymap if weights.keymap is said.keymap else None
    facts = {n: str(v).lower() for n, v in own.facts.items() if n in _FIELDS} if own else {}
    pairs = {**facts, **(said.sizes or {})}
    return (patched_spec(spec, pairs) if pairs else spec), ()


def _config(file: Path, said: Said) -> Source:
    """A model that only its parameter file describes."""
    parameters = read_parameter_file(file)
    if parameters is None or parameters.spec is None:
        configs.read_spec(file)  # raises, and says what is wrong with it
    source = _recognised(only_config(file), replace(said, assets=None), None, None, None)
    from dcpconv.sources.parameter_shapes import (  # noqa: PLC0415 - files have keys of their own
        table_of_config,
    )

    table = table_of_config(source.spec, said)
    return replace(source, weights=replace(source.weights, keymap=table))


def _recognised(
    opened: Opened,
    said: Said,
    only: str | None,
    root: str | None,
    tables: Iterable[Keymap] | None,
) -> Source:
    catalog = select(opened.catalog, only)
    parameters, notes = _parameters(opened, said)
    stated = said.from_ if said.from_ is not None else _known(opened.family)
    spec = parameters.spec if parameters is not None else None
    own = said.table(stated, spec.architecture if spec is not None else None)
    architecture = parameters.architecture if parameters is not None else None
    scaled: Scaled | None = None
    if said.dequantize:
        from dcpconv.sources.scales import multiplied  # noqa: PLC0415 - few conversions need it

        fields = parameters.fields if parameters is not None else None
        catalog, scaled = multiplied(catalog, fields)
    weights = recognise(
        catalog,
        spec=spec,
        architecture=architecture,
        keymap=own,
        root=root,
        tables=tables,
        own=said.keymap,
    )
    if weights.keymap is None and spec is not None and not is_known(spec.architecture):
        spec = None  # numbers that were read as if the model were one that we know
    measure, remarks = measured(weights, spec, said)
    return Source(
        catalog,
        weights,
        measure,
        parameters,
        said,
        replace(opened.end, keys=len(catalog.tensors)),
        notes=(*catalog.notes, *_weights_beside(opened), *notes, *remarks),
        model=opened.model,
        scaled=scaled,
    )


def _weights_beside(opened: Opened) -> tuple[str, ...]:
    place = opened.place
    if place is None or not place.is_dir():
        return ()
    return weights_beside(place, opened.catalog.files)


def _parameters(opened: Opened, said: Said) -> tuple[ParameterFile | None, tuple[str, ...]]:
    """The parameter file in ``--assets``, or beside the source, and what to say about it.

    One that cannot be read is only a note: keys and bytes can be kept without it, and what cannot
    says that it needs one.

    Raises:
        SpecError: The one that the user named cannot be read.
    """
    for place in (said.assets, opened.place):
        if place is None or configs.find_config(place) is None:
            continue
        try:
            found = read_parameter_file(place)
        except SpecError as error:
            if place is said.assets:
                raise
            return None, (f"the config beside the source was not used: {error.in_one_line}",)
        if found is None or not found.trouble or not is_known(found.architecture):
            return found, ()
        if place is said.assets:
            configs.read_spec(place)  # raises
        return found, (f"the config beside the source was not used: {found.trouble}",)
    return None, ()


def _known(family: str) -> str | None:
    """A family that a key list states, unless its table is not among ours: then keys decide."""
    return family if family in keymaps() else None


def _named(what: Openable, catalog: Catalog) -> End:
    name = os.fspath(what) if isinstance(what, (str, os.PathLike)) else type(what).__name__
    return End(name, catalog.form, len(catalog.tensors), len(catalog.files))
