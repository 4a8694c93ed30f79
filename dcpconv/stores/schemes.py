"""From what the user typed to a path: of this machine, of a bucket, of a repository on a hub.

A URL of a store that is not served is refused.  ``Path("s3://bucket/x")`` is the directory ``x`` in
a directory named ``s3:``, so no URL may ever become a plain path.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from dcpconv.core.errors import DcpconvError
from dcpconv.stores.remote import Origin, RemotePath

if TYPE_CHECKING:
    from dcpconv.stores.store import Store

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)")
"""Of two letters and more, as a drive has one; a ``Path`` has lost one of two slashes."""

_HUB_ID = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")

HUB: Final = "hf"
OBJECTS: Final = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gs",
    "gcs": "gs",
    "az": "az",
    "azure": "az",
    "abfs": "az",
    "abfss": "az",
    "http": "http",
    "https": "https",
}
"""Schemes that obstore serves, and the one name under which errors speak of them."""

_FALLBACK: Final = frozenset(
    {"dbfs", "ftp", "hdfs", "memory", "oci", "oss", "sftp", "smb", "ssh", "tos", "webhdfs"}
)
"""Schemes of fsspec that are stores of their own, and neither caches, archives nor local files."""


class SchemeError(DcpconvError, ValueError):
    """The name is a URL of a store that is not read or written."""


def scheme_of(name: str | os.PathLike[str]) -> str | None:
    """The scheme of a URL in lower case; ``None`` for a path, and for a directory named like one.

    >>> scheme_of("s3://bucket/x"), scheme_of("a/b"), scheme_of("C:/x")
    ('s3', None, None)
    """
    text = os.fspath(name)
    found = _SCHEME.match(text)
    if found is None or (found[2] == "/" and Path(text).exists()):
        return None
    return found[1].lower()


def is_served(scheme: str) -> bool:
    """Whether checkpoints under URLs of this scheme are read."""
    return scheme == HUB or scheme in OBJECTS or _is_of_fsspec(scheme)


def _is_of_fsspec(scheme: str) -> bool:
    """Whether fsspec is here and has a file system for it."""
    return scheme in _FALLBACK and find_spec("fsspec") is not None


def refuse_unserved(name: str | os.PathLike[str]) -> None:
    """Raises for a URL that no store of ours serves.

    Raises:
        SchemeError: It has a scheme such as ``foo://`` or ``file://``.
    """
    scheme = scheme_of(name)
    if scheme is not None and not is_served(scheme):
        raise _refusal(os.fspath(name), "a path, or a URL of s3, gs, az, http, https or hf")


def refuse_scheme(name: str | os.PathLike[str]) -> None:
    """Raises for what is neither a path here nor a name of a model on a hub.

    Raises:
        SchemeError: It has a scheme, such as ``s3://`` or ``file://``.
    """
    scheme = scheme_of(name)
    if scheme is not None and scheme != HUB:
        raise _refusal(os.fspath(name), "a path of this machine")


def _refusal(text: str, expected: str) -> SchemeError:
    found = _SCHEME.match(text)
    assert found is not None  # noqa: S101  scheme_of has matched it
    scheme = found[1].lower()
    from dcpconv.stores.store import without_secrets  # noqa: PLC0415 - only errors need it

    text = without_secrets(text)
    if scheme == "file":
        local = text[found.end(1) + 1 :].removeprefix("//").removeprefix("localhost")
        hint = f"name the path itself: {local}"
    elif is_served(scheme):
        hint = "checkpoints are read from URLs, and results of convert written to them; copy the"
        hint += " rest to a disk first"
    else:
        hint = "copy it to a disk first, and name the path; hf://org/name is read from a hub"
    return SchemeError(
        f"{found[1]}:// is no place that dcpconv reads or writes"
        + (" here" if is_served(scheme) else ""),
        [("found", text), ("expected", expected)],
        hint=hint,
    )


def is_hub_id(name: str) -> bool:
    """Whether a name is ``hf://...``, or ``org/name`` where no such path is here.

    >>> is_hub_id("hf://org/name@main"), is_hub_id("a/b/c"), is_hub_id("./a")
    (True, False, False)
    """
    if name.startswith("hf://"):
        return True
    found = _HUB_ID.fullmatch(name)
    return bool(found) and not name.startswith((".", "/")) and not Path(name).exists()


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
    url = _with_both_slashes(text, scheme)
    store, key = _store(url, scheme)
    return RemotePath(Origin(store, path_of, url), key)


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
        from dcpconv.stores.buckets import open_objects  # noqa: PLC0415

        return open_objects(text, OBJECTS[scheme])
    from dcpconv.stores.fsspec_store import open_fsspec  # noqa: PLC0415

    return open_fsspec(text)
