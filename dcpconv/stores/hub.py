"""Repositories on a Hugging Face hub: files by ranges, or downloaded into the hub's own cache.

Source: huggingface_hub 0.30 to 2.4: ``HfApi.model_info`` lists files with sizes, ``hf_hub_url``
serves ranges of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dcpconv.core.errors import DcpconvError, NotACheckpointError
from dcpconv.stores.schemes import refuse_scheme

_ID = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
_ASIDE = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
"""What a conversion downloads: weights, config, tokenizer."""
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


class HubError(DcpconvError, OSError):
    """The hub cannot be reached, or does not give what was asked for."""


def is_hub_id(name: str) -> bool:
    """Whether a name is ``hf://...``, or ``org/name`` where no such path is here.

    >>> is_hub_id("hf://org/name@main"), is_hub_id("a/b/c"), is_hub_id("./a")
    (True, False, False)
    """
    if name.startswith("hf://"):
        return True
    found = _ID.fullmatch(name)
    return bool(found) and not name.startswith((".", "/")) and not Path(name).exists()


def locate(source: str | os.PathLike[str]) -> Path:
    """A local path for what the user named; a hub id is downloaded into the hub's own cache.

    Raises:
        HubError: There is no such repository, or it cannot be reached.
        SchemeError: It is a URL of another kind.
        NotACheckpointError: The repository has no safetensors.
    """
    name = os.fspath(source)
    refuse_scheme(name)
    if not is_hub_id(name):
        return Path(source)
    from huggingface_hub import snapshot_download  # noqa: PLC0415  slow import

    repository = Repository.open(name)
    if repository.is_adapter():
        return locate_adapter(name)
    has_shards = any(not file.startswith("consolidated") for file in repository.weights())
    # Meta and Mistral put the same weights a second time beside those that transformers reads.
    beside = ["*/*", *(["consolidated*"] if has_shards else [])]
    with _complaints(name):
        path = snapshot_download(
            repository.name,
            revision=repository.revision,
            allow_patterns=list(_ASIDE),
            ignore_patterns=beside,
        )
    return Path(path)


def locate_adapter(source: str | os.PathLike[str]) -> Path:
    """A local path for an adapter that the user named; of a hub id only the adapter is downloaded,
    its config and the tokenizer, whatever else lies there.

    Raises:
        HubError: There is no such repository, or it cannot be reached.
        NotACheckpointError: The repository has no adapter.
    """
    name = os.fspath(source)
    if not is_hub_id(name):
        return Path(source)
    from huggingface_hub import snapshot_download  # noqa: PLC0415  slow import

    repository = Repository.open(name)
    weights = next((file for file in _ADAPTER_WEIGHTS if file in repository.files), None)
    if weights is None or _ADAPTER_CONFIG not in repository.files:
        raise NotACheckpointError(
            "the repository has no adapter",
            [
                ("repository", name),
                ("expected", f"{_ADAPTER_CONFIG} and one of {', '.join(_ADAPTER_WEIGHTS)}"),
                ("found", ", ".join(repository.files) or "no files"),
            ],
        )
    with _complaints(name):
        path = snapshot_download(
            repository.name,
            revision=repository.revision,
            allow_patterns=[
                weights,
                *(pattern for pattern in _ASIDE if "safetensors" not in pattern),
            ],
            ignore_patterns=["*/*"],
        )
    return Path(path)


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository at one revision.

    Attributes:
        asked: As the user named it.
        name: ``org/name``.
        revision: Commit that the name led to, so that every file is of the same one.
        files: Size in bytes of every file at the top.
    """

    asked: str
    name: str
    revision: str | None
    files: dict[str, int]

    @classmethod
    def open(cls, asked: str) -> Repository:
        found = _ID.fullmatch(asked)
        if found is None:
            raise NotACheckpointError(
                "this is no name of a model on a hub",
                [("found", asked), ("expected", "org/name or hf://org/name@revision")],
            )
        from huggingface_hub import HfApi  # noqa: PLC0415  slow import

        name, revision = found.groups()
        with _complaints(asked):
            info = HfApi().model_info(name, revision=revision, files_metadata=True)
        files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        return cls(
            asked, name, info.sha or revision, {f: n for f, n in files.items() if "/" not in f}
        )

    def is_adapter(self) -> bool:
        """Whether it holds an adapter and no model."""
        if _ADAPTER_CONFIG not in self.files or not self.files.keys() & {*_ADAPTER_WEIGHTS}:
            return False
        names = [name for name in self.files if name.endswith((".safetensors", ".bin"))]
        return not any(name.startswith(("model", "pytorch_model")) for name in names)

    def weights(self) -> list[str]:
        """Names of the safetensors."""
        names = [name for name in self.files if name.endswith(".safetensors")]
        if names:
            return names
        others = [n for n in self.files if n.endswith((".bin", ".pth", ".pt", ".distcp"))]
        raise NotACheckpointError(
            "the repository has no safetensors",
            [("repository", self.asked), ("found", ", ".join(others or self.files) or "no files")],
            hint="headers of other forms cannot be read from afar; download it and name the path"
            if others
            else None,
        )

    def read(self, file: str) -> bytes:
        """A whole small file."""
        return self.download(file).read_bytes()

    def download(self, file: str) -> Path:
        """A whole small file, through the hub's own cache."""
        from huggingface_hub import hf_hub_download  # noqa: PLC0415  slow import

        with _complaints(self.asked):
            return Path(hf_hub_download(self.name, file, revision=self.revision))

    def range(self, file: str, offset: int, nbytes: int) -> bytes:
        """Bytes of one file, in one request."""
        if nbytes <= 0:
            return b""
        from huggingface_hub import hf_hub_url  # noqa: PLC0415  slow import
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # noqa: PLC0415  slow
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        url = hf_hub_url(self.name, file, revision=self.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={offset}-{offset + nbytes - 1}"}
        with _complaints(self.asked):
            response = get_session().get(url, headers=headers, timeout=60)
            hf_raise_for_status(response)
        data: bytes = response.content
        if response.status_code == 200:
            data = data[offset : offset + nbytes]
        if len(data) != nbytes:
            raise HubError(
                "the hub sent less than it was asked for",
                [("file", file), ("expected", f"{nbytes} bytes, found {len(data)}")],
            )
        return data


@contextmanager
def _complaints(asked: str) -> Iterator[None]:
    """Turns whatever a download may raise into one error that names the repository."""
    try:
        yield
    except DcpconvError:
        raise
    except Exception as error:  # noqa: BLE001  the client below it has many of its own
        raise HubError(
            "the hub did not answer as it should",
            [("name", asked), ("because", (str(error).strip() or repr(error)).splitlines()[0])],
            hint=_hint(error),
        ) from None


def _hint(error: Exception) -> str:
    from huggingface_hub.errors import (  # noqa: PLC0415  slow import
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return "accept the model's terms on the hub and log in: `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "the repository is there, the revision is not"
    if isinstance(error, RepositoryNotFoundError):
        return "neither a path here nor a model there; a private one needs `hf auth login`"
    return "no such path is here, so it was taken for a model on a hub; is HF_ENDPOINT right?"
