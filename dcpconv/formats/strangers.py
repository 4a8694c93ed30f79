"""What a path is that is no checkpoint of a form we know, and what to name instead."""

from __future__ import annotations

from pathlib import Path

from dcpconv.core.errors import NotACheckpointError
from dcpconv.formats import dcp, torchfile

_FSDP_DIRECTORY = "pytorch_model_fsdp_0"


def explain(path: Path) -> NotACheckpointError:
    """The error for a path that exists and holds no checkpoint."""
    return NotACheckpointError(
        "this is no checkpoint of a form we know",
        [
            ("path", path),
            ("expected", "*.safetensors, a torch.save file, or a DCP directory with .metadata"),
            ("found", _contents(path)),
        ],
        hint=_hint(path),
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
        return f"this is a PEFT adapter; to merge it: dcpconv convert BASE DST --adapter {path}"
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
