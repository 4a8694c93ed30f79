"""Does an adapter fit its base?  Every pair needs its matrix and shape; headers alone are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from dcpconv.checking.against import expected
from dcpconv.core.catalog import Catalog, TensorEntry
from dcpconv.core.dtypes import BY_NAME
from dcpconv.core.spec import ModelSpec
from dcpconv.families.keymaps import Keymap, resolve_family
from dcpconv.plan.adapting import Weighed, merge_of
from dcpconv.plan.coverage import Coverage, Piece, Target, as_stored
from dcpconv.sources.adapters.reading import WEIGHTS, is_adapter, read_adapter
from dcpconv.sources.opening import End, Named, Side, open_target
from dcpconv.sources.recognition import Weights
from dcpconv.sources.settling import settle


def adapter_path(source: Named) -> Path | None:
    """The directory of a PEFT adapter that the user named, or ``None``."""
    if not isinstance(source, str | os.PathLike):
        return None
    path = Path(source)
    directory = path.parent if path.name in WEIGHTS else path
    return directory if is_adapter(directory) else None


def check_adapter(
    path: Path,
    against: Named | None,
    *,
    own: Keymap | None = None,
    from_: str | None = None,
    sizes: Mapping[str, str],
) -> Coverage:
    """The account of every factor against the base that it shall be merged into.

    Args:
        path: The adapter.
        against: The base: a checkpoint, a ``config.json``, a key list, a live model; without one
            only the adapter itself is checked.
        own: The user's own table.
        from_: Naming of the base, where its keys leave a choice.
        sizes: Numbers of the base that no file states.

    Raises:
        NotExpressibleError: The adapter is of a kind that cannot be merged.
        FormatError: The adapter is not whole, or a file is malformed.
    """
    adapter = read_adapter(path)
    catalog = adapter.catalog
    end = End(str(path), "adapter", len(catalog.tensors), len(catalog.files))
    if against is None:
        targets = tuple(as_stored(key, entry) for key, entry in catalog.tensors.items())
        note = "every factor has its counterpart; --against BASE also says whether it fits its base"
        return Coverage(adapter.kind, adapter.kind, targets, read=end, notes=(*adapter.notes, note))
    side = open_target(against)
    weights, spec, notes = _base(side, own=own, from_=from_, sizes=sizes)
    merged = merge_of(weights, [Weighed(adapter)], spec=spec, dequantize=True)
    stored = {entry.key: entry for entry in weights.entries.values()}
    return Coverage(
        source=adapter.kind,
        target=weights.keymap.name if weights.keymap else "as stored",
        targets=tuple(_targets(merged.found, stored)),
        missing=tuple(merged.missing),
        misshapen=tuple(merged.misshapen),
        read=end,
        asked=side.end,
        notes=(*adapter.notes, *side.notes, *notes, *merged.notes),
    )


def _targets(
    found: list[tuple[str, tuple[str, ...]]], stored: Mapping[str, TensorEntry]
) -> list[Target]:
    made = []
    for key, names in found:
        entries = [stored[name] for name in names if name in stored]
        if entries:
            pieces = tuple(map(Piece, entries))
            made.append(Target(key, entries[0].shape, entries[0].dtype, pieces))
    return made


def _base(
    side: Side, *, own: Keymap | None, from_: str | None, sizes: Mapping[str, str]
) -> tuple[Weights, ModelSpec | None, tuple[str, ...]]:
    if not side.is_config or side.spec is None:
        return settle(side.catalog, side.spec, from_=from_, own=own, sizes=sizes)
    table = own or resolve_family(from_ or side.family, side.spec.architecture)
    dtype = BY_NAME["float32"]  # nothing looks at it
    entries = {
        key: TensorEntry(key, dtype, shape, ())
        for key, shape, _ in expected(table, side.spec)
        if shape is not None
    }
    catalog = Catalog(side.catalog.form, side.catalog.path, side.catalog.source, {}, entries)
    return Weights(catalog, entries, {}, table, "", ()), side.spec, ()
