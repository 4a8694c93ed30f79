"""Reads the headers of a repository on a hub from afar; no tensor is moved."""

from __future__ import annotations

from pathlib import Path

from dcpconv.core.catalog import Catalog
from dcpconv.core.errors import FormatError
from dcpconv.formats.safetensors.files import Headed, gather
from dcpconv.formats.safetensors.header import parse_entries, parse_header
from dcpconv.formats.safetensors.index import INDEX, SINGLE, choose, parse_index, strays
from dcpconv.stores.hub import Repository

_FIRST = 64 * 1024
"""Bytes of each file asked for first: the header of most shard files, in one round trip."""
_AT_ONCE = 8
"""Requests in flight; latency is what a check of many shard files waits for."""
_CONFIGS = ("config.json", "params.json")


def read_catalog(name: str, *, problems: list[str] | None = None) -> tuple[Catalog, str | None]:
    """What a repository holds, from ranged reads of its headers, and the path of its config.

    Extents name remote files, so nothing can be converted from this catalog; see ``locate``.

    Args:
        name: ``org/name``, with ``@revision`` or not.
        problems: Collects what is wrong with the files instead of raising.

    Raises:
        HubError: There is no such repository, or it cannot be reached.
        NotACheckpointError: The repository has no safetensors.
        FormatError: A file is truncated or malformed.
    """
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415  slow import

    repository = Repository.open(name)
    weights = repository.weights()
    found = problems if problems is not None else []
    weight_map = None
    if INDEX in repository.files and SINGLE not in weights:
        weight_map = parse_index(repository.read(INDEX), f"{name}/{INDEX}")
    found.extend(strays(weights, weight_map) if problems is not None else ())
    names = choose(weights, weight_map, found)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        reads = {file: pool.submit(_header, repository, file) for file in names}
        catalog = gather(
            names,
            lambda file: reads[file].result(),
            weight_map=weight_map,
            directory=Path(repository.name),
            source=Path(name),
            found=found,
            is_strict=problems is None,
        )
    config = next((file for file in _CONFIGS if file in repository.files), None)
    return catalog, str(repository.download(config)) if config else None


def _header(repository: Repository, file: str) -> Headed:
    """Size, tensors and metadata of one file."""
    size, where = repository.files[file], f"{repository.asked}/{file}"
    first = repository.range(file, 0, min(_FIRST, size))

    def read(offset: int, nbytes: int) -> bytes:
        if offset + nbytes <= len(first):
            return first[offset : offset + nbytes]
        return first[offset:] + repository.range(file, len(first), offset + nbytes - len(first))

    start, header = parse_header(read, size, where)
    metadata = header.get("__metadata__") or {}
    if "DCP_SHARDING_INFO" in metadata:
        raise FormatError(
            "the repository holds slices in transformers' distributed form",
            [("file", where)],
            hint="download it and name the path",
        )
    return size, parse_entries(header, start, size, file, where), metadata
