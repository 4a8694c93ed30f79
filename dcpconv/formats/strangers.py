"""What a path is that is no checkpoint of a form we know, and what to name instead."""

from __future__ import annotations

import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from dcpconv.core.errors import FormatError, NotACheckpointError
from dcpconv.formats import dcp, safetensors, torchfile
from dcpconv.formats.ranks import fsdp, zero_world
from dcpconv.formats.torchfile.roles import is_beside_a_model
from dcpconv.stores.local import OpenFile

_FSDP_DIRECTORY = "pytorch_model_fsdp_0"

_MAGIC: Final = (
    (
        bytes(64),
        "a file that begins with zeros",
        "the download or copy was interrupted; fetch it again",
    ),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file itself: git lfs pull"),
    (
        b"GGUF",
        "a GGUF file",
        "transformers reads it: from_pretrained(DIR, gguf_file=NAME), then save_pretrained(DIR)",
    ),
    (b"\x89HDF", "an HDF5 file", None),
    (b"\x93NUMPY", "a NumPy array", None),
    (b"\x1f\x8b", "a gzip file", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it first"),
    (
        b"\x80",
        "a bare pickle, which torch.save did not write",
        "load it where it was written, and save its tensors with torch.save",
    ),
)
"""First bytes, what they say, and what to do."""


def explain(path: Path) -> NotACheckpointError:
    """The error for a path that exists and holds no checkpoint."""
    if path.is_dir():
        found, hint = _contents(path), _hint(path)
    else:
        found, hint = _file(path)
        if _is_one(path.parent):
            hint = f"it is part of a checkpoint; name the directory: {path.parent}"
    return NotACheckpointError(
        "this is no checkpoint of a form we know",
        [
            ("path", path),
            ("expected", "*.safetensors, a torch.save file, or a DCP directory with .metadata"),
            ("found", found),
        ],
        hint=hint,
    )


def _file(path: Path) -> tuple[str, str | None]:
    """What a file is, and what to do about it."""
    try:
        with OpenFile(path) as file:
            start = file.read(0, 64)
            if start.startswith(b"PK"):
                return _zip(path)
    except FormatError:
        return f"{_kind(path)}, not a file", None
    except OSError as error:
        return f"a file that cannot be read: {error.strerror}", None
    for magic, what, hint in _MAGIC:
        if start.startswith(magic):
            return what, hint
    return f"a file of {path.stat().st_size:,} bytes that is neither zip nor pickle", None


def _kind(path: Path) -> str:
    mode = path.stat().st_mode
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def _zip(path: Path) -> tuple[str, str | None]:
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        hint = "the download or save was interrupted; fetch or save it again"
        return "the beginning of a zip file, without its directory", hint
    if any(name.endswith("/constants.pkl") for name in names):
        hint = "load it with torch.jit.load, and save its state_dict() with torch.save"
        return "a TorchScript program", hint
    if any(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays (npz)", None
    return "a zip file that torch.save did not write", None


def _contents(path: Path) -> str:
    names = sorted(item.name for item in path.iterdir())
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more if names else "an empty directory"


def _hint(path: Path) -> str | None:
    names = {item.name for item in path.iterdir()}
    if _FSDP_DIRECTORY in names:
        return f"accelerate keeps the weights in {path / _FSDP_DIRECTORY}; name that directory"
    ranked = [item for item in sorted(path.iterdir()) if fsdp.is_rank_directory(item)]
    if ranked:
        return f"one file per rank lies in {', '.join(map(str, ranked[:3]))}; name that directory"
    if "adapter_config.json" in names:
        return f"this is a PEFT adapter; to merge it: dcpconv convert BASE DST --adapter {path}"
    explained = dcp.explain(path)
    if explained:
        return explained
    if any(path.glob("*mp_rank_*/model_optim_rng.pt")) or any(
        path.glob("iter_*/mp_rank_*/model_optim_rng.pt")
    ):
        return "this is Megatron's form of its own; its tools write torch_dist, which is a DCP"
    inner = sorted(_checkpoints(path), key=_natural)
    if inner:
        what = "checkpoint is" if len(inner) == 1 else "checkpoints are"
        return f"{len(inner)} {what} inside; name one, such as {inner[-1]}"
    files = [
        item
        for item in sorted(path.iterdir())
        if not is_beside_a_model(item) and torchfile.is_torch_file(item)
    ]
    if files:
        return f"name the file: {', '.join(str(item) for item in files[:3])}"
    if any(map(is_beside_a_model, path.iterdir())):
        return "only what goes beside a model is here (optimizer, random states, arguments)"
    return None


_DEEPEST: Final = 4
"""Levels that are looked through: ``hub/models--org--name/snapshots/COMMIT``."""
_MOST: Final = 2000
"""Directories that are opened to look for one."""


def _checkpoints(path: Path) -> Iterator[Path]:
    """Directories below that hold one: of a run, of a cache of the hub, of Megatron."""
    level, opened = [path], 0
    for _ in range(_DEEPEST):
        following: list[Path] = []
        for directory in level:
            opened += 1
            if opened > _MOST:
                return
            with suppress(OSError):
                following += [item for item in directory.iterdir() if item.is_dir()]
        found = [item for item in following if _is_one(item)]
        yield from found
        if found:
            return
        level = [item for item in following if not item.is_symlink()]


def _is_one(path: Path) -> bool:
    try:
        return (
            dcp.is_dcp(path)
            or safetensors.is_hf(path)
            or torchfile.is_one_in_a_directory(path)
            or fsdp.is_rank_directory(path)
            or zero_world.find(path) is not None
        )
    except (OSError, FormatError):
        return False


def _natural(path: Path) -> list[tuple[int, str]]:
    """``checkpoint-9`` before ``checkpoint-10``."""
    parts = re.split(r"([0-9]{1,18})", str(path))
    return [(int(part), "") if n % 2 else (0, part) for n, part in enumerate(parts)]
