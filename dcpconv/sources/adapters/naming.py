"""The adapters that a user names, each with its weight."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dcpconv.core.errors import DcpconvError
from dcpconv.sources.adapters.reading import read_adapter
from dcpconv.sources.adapters.record import Adapter
from dcpconv.stores.schemes import is_remote, path_of


@dataclass(frozen=True, slots=True)
class Weighed:
    """An adapter, and what its updates are multiplied by beside their own scale."""

    adapter: Adapter
    weight: float = 1.0


AdapterName = str | os.PathLike[str]


def adapter_names(names: AdapterName | Sequence[AdapterName]) -> tuple[str, ...]:
    """What the user named, one or several."""
    some = [names] if isinstance(names, str | os.PathLike) else names
    return tuple(os.fspath(name) for name in some)


def read_adapters(names: AdapterName | Sequence[AdapterName]) -> tuple[Weighed, ...]:
    """The adapters that the user named, each ``DIR`` or ``DIR:WEIGHT``.

    Raises:
        NotACheckpointError: One is absent, or is no adapter.
        NotExpressibleError: One cannot be merged.
        FormatError: A file is malformed.
    """
    return tuple(
        Weighed(read_adapter(path_of(name)), weight)
        for name, weight in map(weighed, adapter_names(names))
    )


def weighed(text: str) -> tuple[str, float]:
    """``DIR:0.5`` as its two parts; a name with a colon that is there is a name.

    Raises:
        DcpconvError: The weight is infinite, or no number.
    """
    name, _, number = text.rpartition(":")
    if not name or (not is_remote(text) and Path(text).exists()):
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not math.isfinite(weight):
        raise DcpconvError("an adapter's weight is no number", [("adapter", text)])
    return name, weight
