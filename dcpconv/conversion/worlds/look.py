"""What one process knows of a conversion, to be compared with what another knows."""

from __future__ import annotations

from dataclasses import fields

from dcpconv.conversion.deciding import Decided
from dcpconv.engine.worlds.look import Look, digest_of, sources_of


def look_of(decided: Decided) -> Look:
    """Everything that has to be the same in all processes."""
    wanted = decided.job.wanted
    options = {one.name: str(getattr(wanted, one.name)) for one in fields(wanted)}
    return {
        "sources": sources_of(decided.job.catalog),
        "options": {k: v for k, v in options.items() if k not in {"path", "overwrite"}},
        "files": {file.name: digest_of([file]) for file in decided.outline.files},
    }
