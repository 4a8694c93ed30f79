"""Everything else that fsspec has a file system for, to read from.

Source: fsspec 2024.2 and later: ``AbstractFileSystem.ls``, ``info``, ``cat_file(start, end)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from dcpconv.stores.store import (
    Buffer,
    Info,
    Store,
    StoreError,
    TransientError,
    without_secrets,
)


def open_fsspec(url: str) -> tuple[FsspecStore, str]:
    """The store that a URL names, and the key in it.

    Raises:
        StoreError: The package that fsspec needs for it is not installed.
    """
    import fsspec  # noqa: PLC0415  rarely needed

    scheme = urlsplit(url).scheme.lower()
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise StoreError(
            f"{scheme}:// is read through fsspec, which lacks a package for it",
            [("found", without_secrets(url)), ("because", error)],
        ) from None
    return FsspecStore(f"{scheme}:/", system), path.strip("/")


class FsspecStore(Store):
    """A file system of fsspec.

    Args:
        root: The scheme.
        system: The file system.
    """

    def __init__(self, root: str, system: Any) -> None:
        super().__init__(root)
        self._system = system

    def _path(self, key: str) -> str:
        return f"{self._system.root_marker}{key}"

    def _list(self, prefix: str) -> Iterable[tuple[str, Info | None]]:
        try:
            with self._complaints(prefix):
                found = self._system.ls(self._path(prefix), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return [
            (node["name"].rstrip("/").rpartition("/")[2], _info(node))
            for node in found
            if node["name"].strip("/") != prefix
        ]

    def _look(self, key: str) -> Info | None:
        try:
            with self._complaints(key):
                self._system.invalidate_cache()
                return _info(self._system.info(self._path(key)))
        except FileNotFoundError:
            return None

    def look_again(self, key: str) -> Info | None:
        prefix, _, name = key.rpartition("/")
        if prefix not in self.listed:
            return self._look(key)
        self._system.invalidate_cache()
        return dict(self._list(prefix)).get(name)  # a listing may say more, or less, than a look

    def get(self, key: str, offset: int, nbytes: int, info: Info) -> Buffer:
        del info
        try:
            data: bytes = self._system.cat_file(self._path(key), start=offset, end=offset + nbytes)
        except Exception as error:  # noqa: BLE001  every protocol has some of its own
            raise TransientError(type(error).__name__) from None
        return data

    @contextmanager
    def _complaints(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise
        except Exception as error:  # noqa: BLE001  every protocol has some of its own
            raise StoreError(
                "the store does not answer as it should",
                [
                    ("object", self.where(key)),
                    ("because", without_secrets(str(error).partition("\n")[0]) or type(error)),
                ],
            ) from None


def _info(node: Any) -> Info | None:
    if node["type"] == "directory":
        return None
    said = [node.get(name) for name in ("ETag", "etag", "checksum", "mtime", "modified", "created")]
    tag = next((str(value) for value in said if value is not None), "")
    return Info(node["size"], tag)
