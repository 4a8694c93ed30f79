"""Opens a checkpoint of any form, or says what the path is instead."""

from __future__ import annotations

from pathlib import Path

from dcpconv.catalog import Catalog
from dcpconv.errors import NotACheckpointError
from dcpconv.formats import dcp, safetensors, torchfile

_FSDP_DIRECTORY = "pytorch_model_fsdp_0"


def open_checkpoint(path: str | Path, *, problems: list[str] | None = None) -> Catalog:
    """Reads what a checkpoint holds, without reading its tensors.

    Args:
        path: A directory of safetensors, a ``torch.save`` file or a directory of them, or a DCP
            directory.
        problems: Collects what is wrong with the files instead of raising, so that a check can
            list everything at once.

    Raises:
        NotACheckpointError: The path is absent, or holds no checkpoint; says what it looks like.
        FormatError: A file is truncated, malformed or unsafe.
    """
    path = Path(path)
    if not path.exists():
        raise NotACheckpointError("there is no such file or directory", [("path", path)])
    if dcp.is_dcp(path):
        return dcp.read_catalog(path, problems=problems)
    if safetensors.is_hf(path):
        return safetensors.read_catalog(path, problems=problems)
    if torchfile.is_torch_file(path) or _holds_one_torch_checkpoint(path):
        return torchfile.read_catalog(path)
    raise NotACheckpointError(
        "this is no checkpoint of a form we know",
        [
            ("path", path),
            ("expected", "*.safetensors, a torch.save file, or a DCP directory with .metadata"),
            ("found", _contents(path)),
        ],
        hint=_hint(path),
    )


def _holds_one_torch_checkpoint(path: Path) -> bool:
    names = (torchfile.INDEX_FILE, torchfile.SINGLE_FILE)
    return path.is_dir() and (
        any((path / name).is_file() for name in names) or len([*path.glob("*.pth")]) == 1
    )


def _contents(path: Path) -> str:
    if path.is_file():
        return f"a file of {path.stat().st_size:,} bytes that is neither zip nor pickle"
    names = sorted(item.name for item in path.iterdir())
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more if names else "an empty directory"


def _hint(path: Path) -> str | None:
    if path.is_file():
        return None
    names = {item.name for item in path.iterdir()}
    if _FSDP_DIRECTORY in names:
        return f"accelerate keeps the weights in {path / _FSDP_DIRECTORY}; name that directory"
    if any(name.startswith("pytorch_model_fsdp") and "_rank" in name for name in names):
        return "these are per-rank shards of FSDP's LOCAL_STATE_DICT; only their trainer reads them"
    if any(name.startswith("model_world_size_") for name in names):
        return "these are per-rank files of verl; merge them with its own model_merger first"
    if "adapter_config.json" in names:
        return "this is a PEFT adapter without its base model; merge it into the base first"
    explained = dcp.explain(path)
    if explained:
        return explained
    inner = [item for item in path.iterdir() if item.is_dir() and dcp.is_dcp(item)]
    if inner:
        return f"{len(inner)} DCP directories are inside, such as {max(inner)}; name one"
    files = [item for item in sorted(path.iterdir()) if torchfile.is_torch_file(item)]
    if files:
        return f"name the file: {', '.join(str(item) for item in files[:3])}"
    return None
