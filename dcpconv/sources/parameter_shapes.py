"""Which parameters a model has, and in which order, before any of its own files says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from dcpconv.core.catalog import Shapes
from dcpconv.core.errors import DcpconvError, LayoutError
from dcpconv.core.spec import ModelSpec
from dcpconv.families.family import parameter_orders
from dcpconv.families.keymaps import Keymap, Row, is_known, keymaps
from dcpconv.families.parameter_files import read_parameter_file
from dcpconv.families.sizes import Sizes
from dcpconv.formats.opening import open_checkpoint
from dcpconv.sources.said import Said

if TYPE_CHECKING:
    from dcpconv.formats.ranks.flat import Parameters


def expected(
    table: Keymap, spec: ModelSpec
) -> Iterator[tuple[str, tuple[int, ...] | None, tuple[str, ...]]]:
    """Key, shape and slots of every tensor that a model has in a naming, from its numbers alone.

    The shape is ``None`` where a layout names an axis whose size the config does not say.  Second
    names of a tied tensor are not among them.
    """
    sizes = Sizes(spec, [table])
    for row in table.rows:
        for values in product(*(range(sizes.usual.get(name, 0)) for name in row.pattern.names)):
            indices = dict(zip(row.pattern.names, values, strict=True))
            if sizes.has(row.when, indices) and not sizes.lacks(row):
                yield row.pattern.key(indices), _shape(sizes, row, indices), row.slots


def _shape(sizes: Sizes, row: Row, indices: Mapping[str, int]) -> tuple[int, ...] | None:
    try:
        return sizes.shape(row, indices)
    except LayoutError:
        return None


def ranked(order: str, keys: Sequence[str], *, strip: str = "") -> list[str] | None:
    """Keys sorted by the rank of every component, or ``None`` where some component has none.

    Args:
        order: Components of a module's children as they are registered.
        keys: What to sort.
        strip: Stands before some keys, and counts for nothing.
    """
    rank = {part: place for place, part in enumerate(order.split())}
    bare = {key: key.removeprefix(strip) for key in keys}
    if any(word not in rank for key in bare.values() for word in words(key)):
        return None
    return sorted(
        keys, key=lambda key: [int(p) if p.isdigit() else rank[p] for p in bare[key].split(".")]
    )


def words(key: str) -> list[str]:
    """Components of a key that are no numbers."""
    return [part for part in key.split(".") if not part.isdigit()]


def table_of_config(spec: ModelSpec | None, said: Said) -> Keymap | None:
    """The naming of the family whose parameter file this is."""
    if spec is None:
        return None
    if said.from_ is not None:
        return said.source_table(spec)
    tables = [t for t in keymaps().values() if spec.architecture in t.architectures]
    own = [table for table in tables if table.config == spec.origin]
    return next(iter((*own, *(table for table in tables if table.family == "hf"))), None)


def find_parameters(place: Path, said: Said, *, live: Shapes | None = None) -> Parameters | None:
    """Names and shapes of the parameters of the model that lies in ``place``, as far as they are
    known from elsewhere: from a checkpoint in ``--assets``, or the parameter file there or in
    ``place``, or from the live model.

    Args:
        place: Where the model's files lie.
        said: What the user says of it.
        live: Parameters of the live model that they are for, in its order.

    Raises:
        SpecError: The parameter file is no JSON object.
        KeymapError: The user's naming is no family, or has no table for this architecture.
    """
    from dcpconv.formats.ranks.flat import Parameters  # noqa: PLC0415 - few files need it

    spec, table = _described(said.assets or place, said)
    found = _stored(said.assets) if said.assets is not None else None
    if found is None and spec is not None and table is not None:
        shapes = {key: shape for key, shape, _ in expected(table, spec) if shape is not None}
        found = Parameters(shapes, is_ordered=False, origin=str(said.assets or place))
    if found is None:
        return Parameters(live, is_ordered=True, origin="the live model") if live else None
    order = parameter_orders().get(table.name) if table is not None else None
    keys = ranked(order, [*found.shapes]) if order is not None else None
    if keys is None:
        return found
    return replace(found, shapes={key: found.shapes[key] for key in keys}, is_ordered=True)


def _described(place: Path, said: Said) -> tuple[ModelSpec | None, Keymap | None]:
    found = read_parameter_file(place)
    spec = found.spec if found is not None else None
    if spec is None or not is_known(spec.architecture):
        return None, None
    return spec, table_of_config(spec, said)


def _stored(path: Path) -> Parameters | None:
    """What another checkpoint of the model holds; a ``torch.save`` file lists it in order."""
    from dcpconv.formats.ranks.flat import Parameters  # noqa: PLC0415 - few files need it

    try:
        catalog = open_checkpoint(path)
    except DcpconvError:  # a directory with nothing but a parameter file is no checkpoint
        return None
    shapes = {k: entry.shape for k, entry in catalog.tensors.items() if k not in catalog.tied}
    is_ordered = catalog.form == "torch" and len(catalog.files) == 1
    return Parameters(shapes, is_ordered, str(path), catalog.tied)
