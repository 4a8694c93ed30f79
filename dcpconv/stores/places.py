"""From what the user typed to a path: of this machine, of a bucket, or of a repository on a hub."""

from __future__ import annotations

import os
from pathlib import Path

from dcpconv.stores.hub import is_hub_id
from dcpconv.stores.remote import Origin, RemotePath
from dcpconv.stores.schemes import HUB, OBJECTS, refuse_unserved, scheme_of
from dcpconv.stores.store import Store

__all__ = ["is_remote", "path_of", "target_of"]


def is_remote(name: str | os.PathLike[str]) -> bool:
    """Whether a name is a path in a store, or would become one."""
    if isinstance(name, RemotePath):
        return True
    text = os.fspath(name)
    scheme = scheme_of(text)
    return scheme is not None or is_hub_id(text)


def path_of(name: str | os.PathLike[str]) -> Path:
    """The path that a name means; one in a store lists and reads from there.

    A path that is one in a store already is itself, with what has been listed: within one run
    everything is of one state.

    Raises:
        SchemeError: It is a URL of a store that is not served.
        StoreError: A package is not installed, or the URL is malformed.
    """
    if isinstance(name, RemotePath):
        return name
    text = os.fspath(name)
    scheme = scheme_of(text)
    if scheme is not None:
        refuse_unserved(text)
    elif not is_hub_id(text):
        return Path(name)
    store, key = _store(_with_both_slashes(text, scheme), scheme)
    return RemotePath(Origin(store, path_of), key)


def target_of(name: str | os.PathLike[str]) -> Path:
    """Where a result goes: a path, unless it is a URL; ``org/name`` is a directory here.

    Raises:
        SchemeError: It is a URL of a store that is not served.
        StoreError: A package is not installed, or the URL is malformed.
    """
    is_url = isinstance(name, RemotePath) or scheme_of(name) is not None
    return path_of(name) if is_url else Path(name)


def _with_both_slashes(text: str, scheme: str | None) -> str:
    """A URL that was a ``Path`` has lost one of them."""
    if scheme is None or text[len(scheme) :].startswith("://"):
        return text
    return f"{text[: len(scheme)]}://{text[len(scheme) + 2 :]}"


def _store(text: str, scheme: str | None) -> tuple[Store, str]:
    if scheme is None or scheme == HUB:
        from dcpconv.stores.hub_store import HubName, HubStore  # noqa: PLC0415 - few need each

        name = HubName.parse(text)
        return HubStore(name), name.key
    if scheme in OBJECTS:
        from dcpconv.stores.objects import open_objects  # noqa: PLC0415

        return open_objects(text)
    from dcpconv.stores.fsspec_store import open_fsspec  # noqa: PLC0415

    return open_fsspec(text)
