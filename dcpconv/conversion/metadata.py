"""Where entries of safetensors' ``__metadata__`` go: torchao cannot load its tensors without."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from dcpconv.core.catalog import Form
from dcpconv.core.errors import DcpconvError
from dcpconv.families.side_files import SideFile
from dcpconv.formats import safetensors
from dcpconv.plan.account import Aim


def metadata_for(aim: Aim, keys: Collection[str]) -> Mapping[str, str]:
    """The entries that still hold of a result.

    They speak of tensors by name, so none of them goes along where names change.  A source that
    has no place for them has them in ``--assets``, if the same tensors lie there.

    Args:
        aim: Of the conversion.
        keys: Of the result.
    """
    source = aim.source
    if aim.renames:
        return {}
    if source.catalog.metadata or source.said.assets is None:
        return source.catalog.metadata
    return _of_assets(source.said.assets, keys)


def _of_assets(assets: Path, keys: Collection[str]) -> Mapping[str, str]:
    try:
        if not safetensors.is_hf(assets):
            return safetensors.from_side_file(assets)[0] if assets.is_dir() else {}
        catalog = safetensors.read_catalog(assets)
    except DcpconvError:
        return {}
    return catalog.metadata if catalog.tensors.keys() == set(keys) else {}


def side_file(entries: Mapping[str, str], form: Form) -> tuple[SideFile, ...]:
    """The file that keeps the entries beside a result whose form has no place for them."""
    if not entries or form != "dcp":
        return ()
    return (SideFile(safetensors.SIDE_FILE, text=safetensors.to_side_file(entries)),)


def lost(aim: Aim, *, is_one_file: bool) -> tuple[str, ...]:
    """What to say of entries that do not go along."""
    count = len(aim.source.catalog.metadata)
    if not count:
        return ()
    if aim.renames:
        return (f"{count} entries of __metadata__ speak of names that change; they stay behind",)
    if is_one_file:
        back = f"--assets {aim.source.catalog.source} restores them on the way back"
        return (f"{count} entries of __metadata__ have no place in one file; {back}",)
    return ()
