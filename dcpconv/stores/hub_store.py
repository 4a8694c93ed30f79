"""Repositories and buckets on a Hugging Face hub, read by ranges at one commit.

Source: huggingface_hub 0.30 to 2.4: ``model_info(files_metadata=True)`` lists files with sizes and
hashes, ``{endpoint}/[datasets/]{id}/resolve/{revision}/{file}`` serves ranges of them; 2.x also has
buckets, listed by ``list_bucket_tree`` and served under ``{endpoint}/buckets/{id}/resolve/{file}``.
"""

from __future__ import annotations

import re
import secrets
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from dcpconv.core.errors import NotACheckpointError, TargetExistsError
from dcpconv.stores.hub import complaints
from dcpconv.stores.store import Buffer, Info, Store, Told, TransientError

_NAME = re.compile(
    r"(?:hf://)?(?:(?P<kind>datasets|buckets|models)/)?"
    r"(?P<id>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.%-]+))?(?:/(?P<key>.*))?"
)
_SMALL: Final = 1 << 20
"""Bytes of a file that goes along with the commit itself."""
_CONFLICT: Final = 412
_MAY_PASS: Final = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository, or what is in it, as the user named it.

    Attributes:
        asked: The name.
        kind: ``model``, ``dataset`` or ``bucket``.
        id: ``org/name``.
        revision: Branch, tag or commit, or ``None``.
        key: A file or directory in it, or empty.
    """

    asked: str
    kind: str
    id: str
    revision: str | None
    key: str

    @classmethod
    def parse(cls, asked: str) -> HubName:
        """The parts of a name.

        Raises:
            NotACheckpointError: It is none.
        """
        is_short = not asked.startswith("hf://")
        # A short name has no key: its revision may have slashes, as branches do.
        found = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", asked) if is_short else None
        if found is not None:
            return cls(asked, "model", found[1], found[2], "")
        parts = _NAME.fullmatch(asked)
        if parts is None:
            raise NotACheckpointError(
                "this is no name of a model on a hub",
                [
                    ("found", asked),
                    (
                        "expected",
                        "org/name, or hf://[datasets/|buckets/]org/name[@revision][/file]",
                    ),
                ],
            )
        kind = (parts["kind"] or "models").removesuffix("s")
        revision = parts["revision"].replace("%2F", "/") if parts["revision"] else None
        return cls(asked, kind, parts["id"], revision, (parts["key"] or "").strip("/"))


class HubStore(Store):
    """A repository at the commit that its name leads to now.

    Args:
        name: As the user named it.
    """

    def __init__(self, name: HubName) -> None:
        root = name.asked[: len(name.asked) - len(name.key)].rstrip("/") if name.key else name.asked
        super().__init__(root.rstrip("/"))
        self.name = name
        self.writes = self.commits = name.kind != "bucket"
        self._files: dict[str, Info] | None = None
        self._commit = name.revision
        self._written: list[Any] = []
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()

    def files(self) -> dict[str, Info]:
        """Every file, listed in one request.

        Raises:
            HubError: There is no such repository, or it cannot be reached.
        """
        if self._files is None:
            with complaints(self.name.asked):
                self._files = self._ask()
        return self._files

    def _ask(self) -> dict[str, Info]:
        from huggingface_hub import HfApi  # noqa: PLC0415  slow import

        api = HfApi()
        if self.name.kind == "bucket":
            if not hasattr(api, "list_bucket_tree"):
                raise NotACheckpointError(
                    "this huggingface_hub knows no buckets",
                    [("found", self.name.asked)],
                    hint="pip install -U huggingface_hub",
                )
            key = self.name.key
            nodes = [*api.list_bucket_tree(self.name.id, prefix=key or None, recursive=True)]
            if key and not nodes:  # no directory: a file, perhaps
                nodes += api.get_bucket_paths_info(self.name.id, [key])
            return {node.path: _of_bucket(node) for node in nodes if hasattr(node, "size")}
        look = api.dataset_info if self.name.kind == "dataset" else api.model_info
        info = look(self.name.id, revision=self.name.revision, files_metadata=True)
        self._commit = info.sha or self.name.revision
        return {
            file.rfilename: Info(file.size or 0, file.blob_id or str(self._commit))
            for file in info.siblings or ()
        }

    def _list(self, prefix: str) -> Iterable[tuple[str, Info | None]]:
        above = f"{prefix}/" if prefix else ""
        found: dict[str, Info | None] = {}
        for name, info in self.files().items():
            if name.startswith(above):
                first, slash, _ = name[len(above) :].partition("/")
                found[first] = None if slash else info
        return found.items()

    def _look(self, key: str) -> Info | None:
        return self.files().get(key)

    def address(self, key: str) -> str:
        kinds = "" if self.name.kind == "model" else f"{self.name.kind}s/"
        revision = f"@{self._commit.replace('/', '%2F')}" if self._commit else ""
        return f"hf://{kinds}{self.name.id}{revision}/{key}".rstrip("/")

    def look_again(self, key: str) -> Info | None:
        if self.name.kind != "bucket":
            return self.info(key)  # a commit does not change
        with complaints(self.name.asked):
            return self._ask().get(key)

    def told(self) -> Told:
        return replace(super().told(), listed={"": self.files()}, revision=self._commit)

    def learn(self, told: Told) -> None:
        files = told.listed[""]
        self.root, self._commit = told.root, told.revision
        self._files = {key: info for key, info in files.items() if info is not None}

    def url(self, key: str) -> str:
        """Where a file is served, at the commit that was listed."""
        from huggingface_hub import HfApi, hf_hub_url  # noqa: PLC0415  slow import

        if self.name.kind == "bucket":
            return f"{HfApi().endpoint}/buckets/{self.name.id}/resolve/{quote(key, safe='')}"
        return hf_hub_url(self.name.id, key, revision=self._commit, repo_type=self.name.kind)

    def get(self, key: str, offset: int, nbytes: int, info: Info) -> Buffer:
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # noqa: PLC0415  slow
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        self.files()  # the commit
        headers = {**build_hf_headers(), "Range": f"bytes={offset}-{offset + nbytes - 1}"}
        # A body that is packed on the way has another length than the bytes asked for.
        headers["Accept-Encoding"] = "identity"
        session = get_session()
        # What a request is given, and what a cut connection raises, differs: httpx or requests.
        client: Any = sys.modules[type(session).__module__.partition(".")[0]]
        follows = "allow_redirects" if client.__name__ == "requests" else "follow_redirects"
        options: dict[str, Any] = {"timeout": 60, follows: True}
        try:
            response = session.get(self.url(key), headers=headers, **options)
            data: bytes = response.content
        except (OSError, getattr(client, "TransportError", OSError)) as error:
            raise TransientError(type(error).__name__) from None
        if response.status_code in _MAY_PASS:
            raise TransientError(f"status {response.status_code}")
        with complaints(self.name.asked):
            hf_raise_for_status(response)
        if response.status_code == 200 and len(data) == info.nbytes:
            return memoryview(data)[offset : offset + nbytes]
        return data

    def walk(self, prefix: str) -> dict[str, Info]:
        from huggingface_hub.errors import RepositoryNotFoundError  # noqa: PLC0415  slow import

        above = f"{prefix}/" if prefix else ""
        with complaints(self.name.asked):
            try:
                self._files = self._ask()
            except RepositoryNotFoundError:
                self._files = {}  # it is made when something is written
        return {key: info for key, info in self._files.items() if key.startswith(above)}

    def put(
        self,
        key: str,
        parts: Iterable[bytes | bytearray],
        *,
        nbytes: int,
        part: int,
        at_once: int,
    ) -> None:
        del part, at_once
        from huggingface_hub import CommitOperationAdd, HfApi  # noqa: PLC0415  slow import

        if nbytes <= _SMALL:
            self._written.append(CommitOperationAdd(key, b"".join(parts)))
            return
        # Of a file object the hash is read first, which would carry the plan out twice.
        self._make_repository()
        file = Path(self._directory(), secrets.token_hex(8))
        try:
            with file.open("wb") as made:
                made.writelines(parts)
            operation = CommitOperationAdd(key, str(file))
            with complaints(self.name.asked):
                HfApi().preupload_lfs_files(
                    self.name.id,
                    additions=[operation],
                    repo_type=self.name.kind,
                    revision=self.name.revision,
                )
            self._written.append(operation)
        finally:
            file.unlink(missing_ok=True)

    def create(self, key: str, data: bytes, *, replaces: Info | None) -> bool:
        del replaces  # the parent of the commit says what it replaces
        from huggingface_hub import CommitOperationAdd  # noqa: PLC0415  slow import

        self._written.append(CommitOperationAdd(key, data))
        return True

    def delete(self, keys: Sequence[str]) -> None:
        from huggingface_hub import CommitOperationDelete  # noqa: PLC0415  slow import

        self._written += [CommitOperationDelete(key) for key in keys]

    def finish(self) -> None:
        from huggingface_hub import HfApi  # noqa: PLC0415  slow import
        from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415  slow import

        self._make_repository()
        with complaints(self.name.asked):
            try:
                HfApi().create_commit(
                    self.name.id,
                    self._written,
                    commit_message="Convert with dcpconv",
                    repo_type=self.name.kind,
                    revision=self.name.revision,
                    parent_commit=self._commit if self._files else None,
                )
            except HfHubHTTPError as error:
                if error.response is None or error.response.status_code != _CONFLICT:
                    raise
                raise TargetExistsError(
                    "somebody else wrote to the repository meanwhile; nothing was committed",
                    [("target", self.name.asked)],
                    hint="look at what is there, and run this again",
                ) from None
        self.abandon()

    def abandon(self) -> None:
        self._written.clear()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _directory(self) -> str:
        with self._lock:
            self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="dcpconv-")
            return self._scratch.name

    def _make_repository(self) -> None:
        """One that is not there is made, for its owner alone to see."""
        if self._files:
            return
        from huggingface_hub import HfApi  # noqa: PLC0415  slow import

        with complaints(self.name.asked):
            HfApi().create_repo(self.name.id, repo_type=self.name.kind, private=True, exist_ok=True)


def _of_bucket(node: Any) -> Info:
    return Info(node.size, str(getattr(node, "xet_hash", None) or getattr(node, "mtime", "")))
