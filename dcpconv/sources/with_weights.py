"""Checkpoints whose weights will be read, and not their headers alone."""

from __future__ import annotations

import os

from dcpconv.core.errors import FormatError
from dcpconv.sources.said import Said
from dcpconv.sources.understanding import Source, understand
from dcpconv.stores.schemes import path_of


def with_weights(what: str | os.PathLike[str], said: Said, only: str | None = None) -> Source:
    """A checkpoint of this machine, or one of the Hub, downloaded into its cache.

    Raises:
        NotACheckpointError: There is nothing of the kind.
        FormatError: A file is malformed, or names keys without weights.
    """
    source = understand(path_of(what), said, only=only)
    if any(entry.numel and not entry.chunks for entry in source.weights.entries.values()):
        raise FormatError(
            "there are keys here and no weights",
            [("source", what)],
            hint="`dcpconv check SRC --against KEYS` compares keys and shapes",
        )
    return source
