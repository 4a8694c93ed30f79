"""One digest of a model's weights, the same in every form and naming."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dcpconv.plan.canonical import canonical
from dcpconv.plan.fingerprints import Fingerprint, fingerprint_of
from dcpconv.sources.said import Said
from dcpconv.sources.selection import require_tensors
from dcpconv.sources.with_weights import with_weights

if TYPE_CHECKING:
    from dcpconv.plan.readers import Readers


def fingerprint(
    source: str | os.PathLike[str],
    *,
    from_: str | None = None,
    keymap: str | os.PathLike[str] | None = None,
    assets: str | os.PathLike[str] | None = None,
    spec: str | Sequence[str] = (),
    only: str | None = None,
    stored: bool = False,
    jobs: int | None = None,
    progress: Callable[[int], None] | None = None,
    total: Callable[[int], None] | None = None,
    ranks: Readers | None = None,
) -> Fingerprint:
    """The fingerprint of a checkpoint's weights, and the digest of every tensor.

    The same for every form, naming, sharding and file size of the same weights; another if one
    element differs, or its type.  Every byte is read once; memory does not grow with the model.

    Args:
        source: A checkpoint of any form, or a hub id.
        from_: Its naming, where keys leave a choice.
        keymap: A table of your own, which ``from_`` may then name.
        assets: Directory with the config, where there is none beside the source.
        spec: Numbers of the model that no file states: ``heads=8,kv_heads=2``.
        only: Take only what sits under this key (``model``), or keys that match this pattern.
        stored: Take keys and axes as they are stored, although a table knows them.
        jobs: Threads; as many as there are CPUs, 4 at most, by default.
        progress: Called from the threads with bytes read since its last call.
        total: Called with the bytes that will be read, before the first is.
        ranks: The processes that read this together, each a share; all get the same.

    Raises:
        NotACheckpointError: There is nothing of the kind.
        RankError: The ranks do not read the same, or one of them is gone.
        FormatError: A file is truncated or malformed, or there are no tensors.
        AmbiguousFamilyError: Several namings fit and lead to different bytes.
        LayoutError: Elements change places, and neither config nor shapes say where to.
    """
    said = Said.parse(from_=from_, keymap=keymap, assets=assets, spec=spec)
    found = with_weights(source, said, only)
    known = canonical(found, as_it_is_stored=stored)
    require_tensors(found.catalog, known.targets)
    return fingerprint_of(found, known, jobs=jobs, progress=progress, total=total, ranks=ranks)
