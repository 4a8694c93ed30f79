"""Names that are URLs: those of stores that are served, and the refusal of all others.

``Path("s3://bucket/x")`` is the directory ``x`` in a directory named ``s3:``, so no URL may ever
become a plain path.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from dcpconv.core.errors import DcpconvError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(//?)")
"""Of two letters and more, as a drive has one; a ``Path`` has lost one of two slashes."""

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


def without_secrets(text: str) -> str:
    """A text in which the URLs have lost what may be a credential: user, password and query.

    >>> without_secrets("GET https://me:secret@host/a?sig=abc failed")
    'GET https://host/a failed'
    """
    text = re.sub(r"(?<=://)[^/\s@]*@", "", text)
    return re.sub(r"(?<=\S)\?[^\s\"']*", "", text) if "://" in text else text
