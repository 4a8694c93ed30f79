"""Repositories and buckets on a Hugging Face hub, read by ranges at one commit.

Source: huggingface_hub 0.30 to 2.4: ``model_info(files_metadata=True)`` lists files with sizes and
hashes, ``{endpoint}/[datasets/]{id}/resolve/{revision}/{file}`` serves ranges of them; 2.x also has
buckets, listed by ``list_bucket_tree`` and served under ``{endpoint}/buckets/{id}/resolve/{file}``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from dcpconv.core.errors import NotACheckpointError
from dcpconv.stores.hub import complaints
from dcpconv.stores.store import Buffer, Info, Store, TransientError

_NAME = re.compile(
    r"(?:hf://)?(?:(?P<kind>datasets|buckets|models)/)?"
    r"(?P<id>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.%-]+))?(?:/(?P<key>.*))?"
)
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
        self._files: dict[str, Info] | None = None
        self._commit = name.revision

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
            nodes = api.list_bucket_tree(self.name.id, prefix=self.name.key or None, recursive=True)
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


def _of_bucket(node: Any) -> Info:
    return Info(node.size, str(getattr(node, "xet_hash", None) or getattr(node, "mtime", "")))
