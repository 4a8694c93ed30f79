"""The part of a checkpoint that the user asks for."""

from __future__ import annotations

import fnmatch
from dataclasses import replace

from dcpconv.core.catalog import Catalog
from dcpconv.core.errors import FormatError


def select(catalog: Catalog, only: str | None) -> Catalog:
    """The part of a checkpoint under one key, or whose keys match a shell pattern.

    Raises:
        FormatError: Nothing is there; says what is.
    """
    if only is None:
        return catalog
    keys = [*catalog.tensors, *catalog.objects]
    under = {key for key in keys if key == only or key.startswith(f"{only}.")}
    chosen = under or {key for key in keys if fnmatch.fnmatchcase(key, only)}
    if not chosen:
        tops = sorted({str(catalog.path_of(key)[0]) for key in keys})
        raise FormatError(
            f"nothing in the checkpoint is under {only!r} or matches it",
            [("source", catalog.source), ("found", ", ".join(tops[:12]))],
            hint="give a container such as model, or a pattern such as 'layers.0.*'",
        )
    return replace(
        catalog,
        tensors={key: entry for key, entry in catalog.tensors.items() if key in chosen},
        objects={key: value for key, value in catalog.objects.items() if key in chosen},
        tied={k: v for k, v in catalog.tied.items() if k in chosen and v in chosen},
    )
