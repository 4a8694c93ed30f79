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
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn

from dcpconv.stores.fetching import fetch, patiently, pool
from dcpconv.stores.store import (
    Buffer,
    ChangedError,
    Info,
    Store,
    StoreError,
    TransientError,
    without_secrets,
)

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_WEAK: Final = "W/"
"""What an ETag begins with that a server gives to bodies of the same meaning, whatever their bytes:
nothing can be asked for by it."""
_LONG: Final = 1 << 20
"""Bytes from which a body is worth memory of its own."""
_CHUNK: Final = 512 << 10
"""Bytes of a body that are taken over at a time."""
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
    """

    def __init__(self, root: str, reading: ObjectStore, writing: ObjectStore) -> None:
        super().__init__(root)
        self.writes = True
        self._reading = reading
        self._writing = writing

    def _list(self, prefix: str) -> Iterable[tuple[str, Info | None]]:
        import obstore  # noqa: PLC0415  slow import

        above = f"{prefix}/" if prefix else ""

        def ask() -> Any:
            with self._complaints(prefix, may_pass=True):
                return obstore.list_with_delimiter(self._reading, prefix or None)

        found = patiently(ask, where=self.where(prefix), expected="what is below it")
        for inner in found["common_prefixes"]:
            yield inner.removeprefix(above).rstrip("/"), None
        for meta in found["objects"]:
            yield meta["path"].removeprefix(above), _info(meta)

    def _look(self, key: str) -> Info | None:
        import obstore  # noqa: PLC0415  slow import

        def ask() -> Any:
            with self._complaints(key, may_pass=True):
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
            with self._complaints(key, may_pass=True):
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
        import obstore  # noqa: PLC0415  slow import

        with self._complaints(key):
            if nbytes <= part:
                obstore.put(self._writing, key, b"".join(parts), use_multipart=False)
                return
            obstore.put(
                self._writing,
                key,
                iter(parts),
                use_multipart=True,
                chunk_size=part,
                max_concurrency=at_once,
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
            with self._complaints(key, may_pass=True):
                obstore.delete(self._reading, key)

        with suppress(FileNotFoundError):
            patiently(ask, where=self.where(key), expected="that it is removed")

    @contextmanager
    def _complaints(
        self,
        key: str,
        *,
        may_pass: bool = False,
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
            if _code(error) == "NoSuchBucket":
                self._refuse(key, error)
            raise
        except PreconditionError:
            raise ChangedError from None
        except BaseError as error:
            if may_pass and _may_pass(error):
                raise TransientError(in_short(error)) from None
            self._refuse(key, error)

    def _refuse(self, key: str, error: Exception) -> NoReturn:
        status, code = _status(error), _code(error)
        headline, hint = _meaning(type(error).__name__, status, code)
        tried = [("tried", f"{TRIES} times")] if _may_pass(error) else []
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
            with self._complaints(key, may_pass=True):
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


def _status(error: Exception) -> int:
    text = str(error)
    found = _STATUS.search(text)
    if found is None and "redirect without LOCATION" in text:
        return 301  # S3 does not say where the bucket is
    return int(found[1]) if found else 0


def _code(error: Exception) -> str:
    found = _CODE.search(str(error))
    return found[1] if found else ""


def _may_pass(error: Exception) -> bool:
    """Whether another try can help: too many requests, a fault of the server, a cut connection."""
    status = _status(error)
    named = type(error).__name__ in {"PermissionDeniedError", "UnauthenticatedError"}
    unfit = type(error).__name__ in {"NotSupportedError", "InvalidPathError"}
    return not named and not unfit and (status == 0 or status in {408, 429} or status >= 500)


def in_short(error: Exception) -> str:
    """The status and its name, or the first line; nothing in which a credential could be."""
    status, code = _status(error), _code(error)
    if status:
        return f"status {status}" + (f", {code}" if code else "")
    line = without_secrets(str(error).partition("\n")[0])
    return line.rpartition(" - ")[2].rpartition(": ")[2][:160] or line[:160]


def _meaning(kind: str, status: int, code: str) -> tuple[str, str | None]:
    """What an answer means, and what to do."""
    if code == "NoSuchBucket":
        return "there is no such bucket", "is its name right, and the endpoint (AWS_ENDPOINT_URL)?"
    if code in {"PermanentRedirect", "AuthorizationHeaderMalformed"} or status in {301, 307}:
        return "the bucket is in another region", "say which: AWS_REGION=eu-central-1"
    if kind in {"PermissionDeniedError", "UnauthenticatedError"} or status in {401, 403}:
        return (
            "access was denied",
            "the credentials that were found may not do this; are they set, and of this account?",
        )
    if status in {408, 429} or status >= 500:
        return "the store does not answer as it should", "it may be overloaded; run this again"
    if kind == "NotSupportedError":
        return "the server cannot do what is needed", "ranges of bytes have to be served"
    return "the store does not answer as it should", "is the name right, and the endpoint?"
