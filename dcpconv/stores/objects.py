"""Buckets and static servers, through obstore: ``s3``, ``gs``, ``az``, ``http`` and ``https``.

Source:
    obstore 0.12 over Rust's object_store: credentials come from the environment (``AWS_*``,
    ``GOOGLE_*``, ``AZURE_*``) or from the machine's own identity; an object is read with
    ``If-Match``; an iterable is sent as parts, which are aborted if it raises.  Its errors have
    types for what is absent, denied or changed; of all others only the text has the status.
"""

from __future__ import annotations

import json
import mmap
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn

from dcpconv.stores.answers import code_of, in_short, may_pass, meaning, status_of
from dcpconv.stores.fetching import coalesced, fetch, patiently, pool
from dcpconv.stores.store import (
    Buffer,
    ChangedError,
    Info,
    Store,
    StoreError,
    TransientError,
)

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_WEAK: Final = "W/"
"""What an ETag begins with that a server gives to bodies of the same meaning, whatever their bytes:
nothing can be asked for by it."""
_LONG: Final = 1 << 20
"""Bytes from which a body is worth memory of its own."""
_CHUNK: Final = 512 << 10
"""Bytes of a body that are taken over at a time."""
BESIDE: Final = ".dcpconv-"
"""Follows the name of an object, in that of the one it is copied from; eight hexadecimal digits
follow.  A process that dies may leave it."""
TRIES: Final = 9
"""Requests for one part of an upload, the first included."""
_NO_LISTING: Final = (
    "model.safetensors.index.json",
    "model.safetensors",
    ".metadata",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "config.json",
    "params.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
)
"""What is asked for by name on a server that lists nothing; an index names the rest."""


class ObjectsStore(Store):
    """A bucket.

    Args:
        root: Its URL.
        reading: Tries once; ``fetch`` tries again.
        writing: Tries parts again by itself.
        copies: Bytes of the largest object that it copies if none of that name is there.
    """

    def __init__(
        self, root: str, reading: ObjectStore, writing: ObjectStore, *, copies: int = 0
    ) -> None:
        super().__init__(root)
        self._copies = copies
        self.writes = True
        self._reading = reading
        self._writing = writing

    def _list(self, prefix: str) -> Iterable[tuple[str, Info | None]]:
        import obstore  # noqa: PLC0415  slow import

        above = f"{prefix}/" if prefix else ""

        def ask() -> Any:
            with self._complaints(prefix, retries=True):
                return obstore.list_with_delimiter(self._reading, prefix or None)

        found = patiently(ask, where=self.where(prefix), expected="what is below it")
        for inner in found["common_prefixes"]:
            yield inner.removeprefix(above).rstrip("/"), None
        for meta in found["objects"]:
            yield meta["path"].removeprefix(above), _info(meta)

    def _look(self, key: str) -> Info | None:
        import obstore  # noqa: PLC0415  slow import

        def ask() -> Any:
            with self._complaints(key, retries=True):
                return obstore.head(self._reading, key)

        try:
            return _info(patiently(ask, where=self.where(key), expected="its length"))
        except FileNotFoundError:
            return None

    def get(self, key: str, offset: int, nbytes: int, info: Info) -> Buffer:
        import obstore  # noqa: PLC0415  slow import

        options: Any = {"range": (offset, offset + nbytes)}
        if info.tag and not info.tag.startswith(_WEAK):
            options["if_match"] = f'"{info.tag}"'
        try:
            with self._complaints(key, retries=True):
                found = obstore.get(self._reading, key, options=options)
                meta = _info(found.meta)
                data = _gathered(found, nbytes) if nbytes >= _LONG else memoryview(found.bytes())
        except FileNotFoundError:
            raise ChangedError from None
        if (info.tag and meta.tag and meta.tag != info.tag) or meta.nbytes != info.nbytes:
            raise ChangedError
        return data

    def put(
        self,
        key: str,
        parts: Iterable[bytes | bytearray],
        *,
        nbytes: int,
        part: int,
        at_once: int,
    ) -> None:
        self._put(key, parts, nbytes=nbytes, part=part, at_once=at_once, old=None)

    def _put(
        self,
        key: str,
        parts: Iterable[bytes | bytearray],
        *,
        nbytes: int,
        part: int,
        at_once: int,
        old: Info | None,
    ) -> None:
        import obstore  # noqa: PLC0415  slow import

        if nbytes <= part:
            with self._complaints(key):
                obstore.put(self._writing, key, b"".join(parts), use_multipart=False)
            return
        options: Any = {"use_multipart": True, "chunk_size": part, "max_concurrency": at_once}
        try:
            with self._complaints(key):
                obstore.put(self._writing, key, iter(parts), **options)
        except FileNotFoundError as error:
            # The upload is gone: it has ended, if the answer to that was lost, or was taken away.
            found = self._look(key)
            if found is None or found.nbytes != nbytes or (old and found.tag == old.tag):
                self._refuse(key, error)

    def put_if(
        self,
        key: str,
        parts: Iterable[bytes | bytearray],
        *,
        nbytes: int,
        part: int,
        at_once: int,
        replaces: Info | None,
    ) -> bool:
        if nbytes <= part:
            return self.create(key, b"".join(parts), replaces=replaces)
        # No client lets the end of an upload in parts be conditional; a copy can be.
        if replaces is None and nbytes <= self._copies:
            beside = f"{key}{BESIDE}{secrets.token_hex(4)}"
            self.put(beside, parts, nbytes=nbytes, part=part, at_once=at_once)
            try:
                return self._copied(beside, key)
            finally:
                with suppress(StoreError):
                    self.delete([beside])
        asked = self._asked_at_last(key, parts, replaces)
        try:
            self._put(key, asked, nbytes=nbytes, part=part, at_once=at_once, old=replaces)
        except ChangedError:
            return False
        return True

    def _asked_at_last(
        self, key: str, parts: Iterable[bytes | bytearray], replaces: Info | None
    ) -> Iterator[bytes | bytearray]:
        """The parts, and then whether what they replace is as it was."""
        yield from parts
        # obstore takes the parts in a thread in which it cannot be asked for anything else.
        found = pool().submit(self._look, key).result()
        if (found and found.tag) != (replaces and replaces.tag):
            raise ChangedError

    def _copied(self, beside: str, key: str) -> bool:
        """Whether an object that was not there was made of another one."""
        import obstore  # noqa: PLC0415  slow import
        from obstore.exceptions import AlreadyExistsError  # noqa: PLC0415  slow import

        try:
            with self._complaints(key, passes=(AlreadyExistsError,)):
                obstore.copy(self._writing, beside, key, overwrite=False)
        except (AlreadyExistsError, ChangedError):
            return self._are_same(beside, key)  # as of a request whose answer was lost
        except (FileNotFoundError, StoreError):
            if not self._are_same(beside, key):
                raise
        return True

    def _are_same(self, one: str, other: str) -> bool:
        a, b = self._look(one), self._look(other)
        if a is None or b is None or a.nbytes != b.nbytes:
            return False
        return all(
            fetch(self, one, *piece, a) == fetch(self, other, *piece, b)
            for piece in coalesced([(0, a.nbytes)])
        )

    def create(self, key: str, data: bytes, *, replaces: Info | None) -> bool:
        import obstore  # noqa: PLC0415  slow import
        from obstore.exceptions import (  # noqa: PLC0415  slow import
            AlreadyExistsError,
            PreconditionError,
        )

        taken = (AlreadyExistsError, PreconditionError)
        try:
            mode: Any = "create" if replaces is None else self._as_it_was(key, replaces)
            with self._complaints(key, passes=taken):
                obstore.put(self._writing, key, data, mode=mode)
        except ChangedError:
            return False
        except taken:
            # A request whose answer was lost is sent again, and finds what it has made itself.
            return self.holds(key, data)
        except StoreError:
            if not self.holds(key, data):  # the last answer may have been lost, too
                raise
        return True

    def _as_it_was(self, key: str, info: Info) -> dict[str, str]:
        """What a request says to replace an object of this version and no other.

        Raises:
            ChangedError: It is another one already.
        """
        del key
        return {"e_tag": f'"{info.tag}"'}

    def holds(self, key: str, data: bytes) -> bool:
        info = self._look(key)
        if info is None or info.nbytes != len(data):
            return False
        return bytes(fetch(self, key, 0, len(data), info)) == data

    def delete(self, keys: Sequence[str]) -> None:
        for _ in pool().map(self._delete, keys):
            pass

    def _delete(self, key: str) -> None:
        import obstore  # noqa: PLC0415  slow import

        def ask() -> None:
            with self._complaints(key, retries=True):
                obstore.delete(self._reading, key)

        with suppress(FileNotFoundError):
            patiently(ask, where=self.where(key), expected="that it is removed")

    @contextmanager
    def _complaints(
        self,
        key: str,
        *,
        retries: bool = False,
        passes: tuple[type[Exception], ...] = (),
    ) -> Iterator[None]:
        """Turns what obstore raises into one error in plain words; absence stays what it is."""
        from obstore.exceptions import (  # noqa: PLC0415  slow import
            BaseError,
            PreconditionError,
        )

        try:
            yield
        except passes:
            raise
        except FileNotFoundError as error:
            if code_of(error) == "NoSuchBucket":
                self._refuse(key, error)
            raise
        except PreconditionError:
            raise ChangedError from None
        except BaseError as error:
            if retries and may_pass(error):
                raise TransientError(in_short(error)) from None
            self._refuse(key, error)

    def _refuse(self, key: str, error: Exception) -> NoReturn:
        status, code = status_of(error), code_of(error)
        headline, hint = meaning(type(error).__name__, status, code)
        tried = [("tried", f"{TRIES} times")] if may_pass(error) else []
        raise StoreError(
            headline,
            [("object", self.where(key)), *tried, ("answer", in_short(error))],
            hint=hint,
        ) from None


class GoogleStore(ObjectsStore):
    """A bucket of Google's, where a request names a generation, which no listing says.

    Source: cloud.google.com, "Request preconditions": ``x-goog-if-generation-match``.
    """

    def _as_it_was(self, key: str, info: Info) -> dict[str, str]:
        import obstore  # noqa: PLC0415  slow import

        def ask() -> Any:
            with self._complaints(key, retries=True):
                return obstore.head(self._reading, key)

        try:
            meta = patiently(ask, where=self.where(key), expected="its generation")
        except FileNotFoundError:
            raise ChangedError from None
        if _info(meta).tag != info.tag:
            raise ChangedError
        return {"version": meta["version"]}


class HttpStore(ObjectsStore):
    """A server of static files, which lists nothing: names are known, or an index says them."""

    def __init__(self, root: str, reading: ObjectStore, writing: ObjectStore) -> None:
        super().__init__(root, reading, writing)
        self.lists = self.writes = False

    def _list(self, prefix: str) -> Iterable[tuple[str, Info | None]]:
        found = self._those_of(_NO_LISTING, prefix)
        for index in [name for name in found if name.endswith(".index.json")]:
            key = f"{prefix}/{index}" if prefix else index
            found |= self._those_of(self._named_by(key, found[index]), prefix)
        return list(found.items())

    def _those_of(self, names: Collection[str], prefix: str) -> dict[str, Info]:
        """Those of the names that are there."""
        keys = [f"{prefix}/{name}" if prefix else name for name in names]
        looked = zip(names, pool().map(self._look, keys), strict=True)
        return {name: info for name, info in looked if info is not None}

    def _named_by(self, key: str, index: Info) -> set[str]:
        """Files that an index names; whoever reads it tells what is wrong with it."""
        try:
            named = json.loads(bytes(fetch(self, key, 0, index.nbytes, index)))["weight_map"]
            return {name for name in named.values() if isinstance(name, str) and "/" not in name}
        except (ValueError, LookupError, TypeError, AttributeError):
            return set()


def _gathered(found: Any, nbytes: int) -> memoryview:
    """A body in memory of its own, which goes back to the system as soon as nobody needs it.

    What the heap gets of such a length it keeps, and scatters: twice as much as is in use.
    """
    whole, at = memoryview(mmap.mmap(-1, nbytes)), 0
    for chunk in found.stream(min_chunk_size=_CHUNK):
        piece = memoryview(chunk)[: nbytes - at]
        whole[at : at + len(piece)] = piece
        at += len(piece)
    return whole[:at]


def _info(meta: Any) -> Info:
    modified: datetime | None = meta["last_modified"]
    at = int(modified.timestamp()) * 10**9 if modified is not None else 0
    # Azure's listings leave the quotes out that its answers have.
    return Info(meta["size"], (meta["e_tag"] or "").strip('"'), at)
