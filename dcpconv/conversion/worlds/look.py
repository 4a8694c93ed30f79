"""What one process knows of a conversion, to be compared with what another knows."""

from __future__ import annotations

from dataclasses import asdict

from dcpconv.conversion.deciding import Decided
from dcpconv.engine.worlds.look import Look, digest_of, sources_of


def look_of(decided: Decided) -> Look:
    """Everything that has to be the same in all processes."""
    options = {
        name: str(value) for name, value in asdict(decided.job.wanted).items() if name != "path"
    }
    return {
        "sources": sources_of(decided.job.catalog),
        "options": {name: value for name, value in options.items() if name != "overwrite"},
        "files": {file.name: digest_of([file]) for file in decided.outline.files},
    }
