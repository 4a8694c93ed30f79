"""``save_weights``: the mirror of ``load_init_weights``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from typing_extensions import TypedDict, Unpack

from dcpconv.conversion.report import ConversionReport
from dcpconv.conversion.saving.storage_writer import CheckpointWriter
from dcpconv.core.catalog import Form
from dcpconv.core.errors import DcpconvError


class SaveOptions(TypedDict, total=False):
    """What ``CheckpointWriter`` takes by these names."""

    form: Form
    from_: str | None
    keymap: str | os.PathLike[str] | None
    root: str | None
    only: str | None
    dtype: str | None
    cast_all: bool
    spec: str | Sequence[str]
    allow: Sequence[str]
    max_file_size: int | None
    overwrite: bool
    fingerprint: bool
    whole_files: bool | None
    jobs: int | None
    progress: Callable[[int], None] | None


def save_weights(
    model: nn.Module | Sequence[nn.Module],
    target: str | os.PathLike[str],
    *,
    to: str | None = None,
    assets: str | os.PathLike[str] | None = None,
    process_group: dist.ProcessGroup | None = None,
    **options: Unpack[SaveOptions],
) -> ConversionReport:
    """Saves a model's weights from every rank, in one pass, in any form and naming.

    To be called in every rank.  Each writes the boxes that it holds to where they belong in the
    result, which is whole or absent.

        save_weights(model, "out/hf", to="hf", assets="out/lingua")

    Args:
        model: Sharded in any way that ``get_model_state_dict`` knows, on any device; or the parts
            of one that this rank holds, as pipelines have them.
        target: Where the result goes: a path that every rank sees, or a URL of ``s3``, ``gs``,
            ``az`` or ``hf``.
        to: Naming of the result; by default ``hf`` for the hf form, else the model's own.
        assets: Directory with the model's config and tokenizer, or its parameter file; a model of
            transformers has its config with it.
        process_group: The ranks that save together; by default all.
        **options: See ``CheckpointWriter``; ``form`` is ``hf`` by default.

    Raises:
        CoverageError: Keys are missing, unknown or misshapen; all are listed.
        NotExpressibleError: The target naming cannot hold the model; all reasons are listed.
        TargetExistsError: The target exists, or is being written.
        NoSpaceError: The disk cannot hold the result.
        StoreError: The store cannot be read, or does not take the result.
        DcpconvError: A rank failed otherwise; every rank raises the same error.
    """
    parts = [model] if isinstance(model, nn.Module) else list(model)
    with _described(parts, assets) as described:
        writer = CheckpointWriter(
            target, to=to, assets=described, process_group=process_group, **options
        )
        state = {key: held for part in parts for key, held in get_model_state_dict(part).items()}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
                save(state, storage_writer=writer, process_group=process_group)
        except CheckpointException as error:
            raise _first(error) from error
        except RuntimeError as error:  # from a collective: all else comes as a CheckpointException
            raise DcpconvError(
                "a rank was lost while saving; nothing was saved",
                [("target", target), ("reason", str(error).strip().splitlines()[0])],
                hint="look at the other ranks' logs for what ended them",
            ) from error
        finally:
            writer.abandon()
    report = writer.report
    assert report is not None  # noqa: S101 - every rank has one once all have written
    return report


def _first(error: CheckpointException) -> Exception:
    """What went wrong on the first rank that failed: torch's own text hides it."""
    rank, (failed, _) = min(error.failures.items())
    if isinstance(failed, DcpconvError):
        return failed
    reason = f"{type(failed).__name__}: {failed}".splitlines()[0]
    return DcpconvError("saving failed; nothing was saved", [("rank", rank), ("reason", reason)])


@contextmanager
def _described(
    parts: Sequence[nn.Module], assets: str | os.PathLike[str] | None
) -> Iterator[str | os.PathLike[str] | None]:
    """Where the model's config is: what the user says, or the model's own, written for a while."""
    bare = _bare(parts[0]) if len(parts) == 1 else None
    config = getattr(bare, "config", None)
    if bare is None or assets is not None or not hasattr(config, "save_pretrained"):
        yield assets
        return
    with TemporaryDirectory(prefix="dcpconv-config-") as directory:
        _write_config(bare, config, Path(directory))
        yield directory


def _write_config(model: nn.Module, config: Any, directory: Path) -> None:
    """As ``save_pretrained`` of the model does; FSDP2 gives every class another name."""
    config = deepcopy(config)
    if not getattr(config, "architectures", None):
        classes = type(model).__mro__
        own = classes[2] if isinstance(model, FSDPModule) else classes[0]
        config.architectures = [own.__name__]
    config.save_pretrained(directory)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)


def _bare(model: nn.Module) -> nn.Module:
    """The module inside DDP, FSDP1 and ``torch.compile``."""
    while True:
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if not isinstance(inner, nn.Module):
            return model
        model = inner
