"""Models on a Hugging Face hub: their names, their errors, and downloads into the hub's own cache.

Source: huggingface_hub 0.30 to 2.4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dcpconv.core.errors import DcpconvError, NotACheckpointError

_ID = re.compile(r"(?:hf://)?([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")
_ASIDE = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
"""What a conversion downloads: weights, config, tokenizer."""


class HubError(DcpconvError, OSError):
    """The hub cannot be reached, or does not give what was asked for."""


def download(name: str) -> Path:
    """A local path for a hub id, whose weights, config and tokenizer are downloaded into the hub's
    own cache.

    Raises:
        HubError: There is no such repository, or it cannot be reached.
        NotACheckpointError: The name is none of a model on a hub, or the model has no safetensors.
    """
    found = _ID.fullmatch(name)
    if found is None:
        raise NotACheckpointError(
            "only models on a hub are downloaded into its cache",
            [("found", name), ("expected", "org/name or hf://org/name@revision")],
            hint="leave --cache out",
        )
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415  slow import

    repository, revision = found.groups()
    with complaints(name):
        info = HfApi().model_info(repository, revision=revision)
        files = [file.rfilename for file in info.siblings or () if "/" not in file.rfilename]
        weights = [file for file in files if file.endswith(".safetensors")]
        if not weights:
            raise NotACheckpointError(
                "the repository has no safetensors",
                [("repository", name), ("found", ", ".join(files) or "no files")],
                hint="leave --cache out: other forms are read from afar",
            )
        has_shards = any(not file.startswith("consolidated") for file in weights)
        # Meta and Mistral put the same weights a second time beside those that transformers reads.
        beside = ["*/*", *(["consolidated*"] if has_shards else [])]
        path = snapshot_download(
            repository,
            revision=info.sha or revision,
            allow_patterns=list(_ASIDE),
            ignore_patterns=beside,
        )
    return Path(path)


@contextmanager
def complaints(asked: str) -> Iterator[None]:
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
    from huggingface_hub import errors  # noqa: PLC0415  slow import
    from huggingface_hub.errors import (  # noqa: PLC0415  slow import
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return "accept the model's terms on the hub and log in: `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "the repository is there, the revision is not"
    if isinstance(error, getattr(errors, "BucketNotFoundError", ())):
        return "there is no such bucket; a private one needs `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "neither a path here nor a model there; a private one needs `hf auth login`"
    return "no such path is here, so it was taken for a model on a hub; is HF_ENDPOINT right?"
