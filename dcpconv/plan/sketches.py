"""How the values of one stored tensor are distributed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcpconv.core.catalog import Catalog
from dcpconv.core.errors import CoverageError
from dcpconv.plan.coverage import as_stored
from dcpconv.plan.fills import fill_of
from dcpconv.stores.local import Sources

if TYPE_CHECKING:
    from dcpconv.engine.sketching import Sketch

__all__ = ["Sketch", "sketch_of"]


def sketch_of(catalog: Catalog, key: str) -> Sketch:
    """The distribution of a tensor's values, without what adapters or factors do to it.

    Args:
        catalog: Of a checkpoint of this machine.
        key: As the checkpoint lists it.

    Raises:
        CoverageError: There is no such key.
        FormatError: A file is missing, unreadable or too short.
    """
    from dcpconv.engine.sketching import sketch  # noqa: PLC0415 - imports torch

    entry = catalog.tensors.get(key)
    if entry is None:
        raise CoverageError(
            "there is no such tensor",
            [("source", catalog.source), ("key", key)],
            hint=f"`dcpconv inspect {catalog.source}` lists the keys",
        )
    with Sources.of(catalog) as sources:
        box = fill_of(as_stored(key, entry), (0,) * len(entry.shape), entry.shape)
        return sketch(box, sources=sources)
