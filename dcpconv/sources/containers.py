"""Containers around the weights: what training scripts and trainers put before every key.

Source: Lightning 2.6 ``trainer/connectors/checkpoint_connector.py`` (``state_dict``),
``strategies/fsdp.py`` (``model``, beside ``meta.pt``); Composer 0.32 ``utils/checkpoint.py`` and
``core/state.py`` (``state.model``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final

from dcpconv.core.catalog import KeyPath

NAMES: Final = frozenset(
    {"model", "module", "state_dict", "model_state_dict", "state", "model_state", "MODEL_STATE"}
)
"""Containers and wrappers that stand before the first component of a model's own keys: of training
scripts (``model``, ``state_dict``; ``MODEL_STATE`` in torch's tutorial of ``torchrun``), Composer
(``state``), ``DistributedDataParallel`` (``module``).
"""

_ATTRIBUTES: Final = frozenset({"model", "module", "net", "network"})
"""What a module that trains another one calls it."""

_PREFERRED: Final[Sequence[KeyPath]] = (
    ("state", "model"),
    ("model",),
    ("state_dict",),
    ("model_state_dict",),
    ("model_state",),
    ("MODEL_STATE",),
    ("module",),
)
"""Where weights are, the likeliest first."""

_LIGHTNING: Final = ("pytorch-lightning_version", "lightning_version")


def candidate_roots(
    templates: Iterable[Sequence[str]], *, wrappers: Collection[str] = ()
) -> list[str]:
    """Everything that may stand before the keys of the weights, the shortest first.

    The one attribute under which all keys of a Lightning or Composer container lie is among them,
    whatever its name.

    Args:
        templates: Keys, in components.
        wrappers: Components that may stand anywhere in a key, and mean nothing.

    >>> candidate_roots([("state_dict", "llm", "norm"), ("state_dict", "llm", "head"), ("epoch",)])
    ['', 'state_dict.', 'state_dict.llm.']
    """
    roots = {""}
    inside: dict[str, set[str]] = {}
    for template in templates:
        root = ""
        for place, part in enumerate(template):
            if part not in NAMES and part not in wrappers:
                break
            root += f"{part}."
            roots.add(root)
            inside.setdefault(root, set()).update(template[place + 1 : place + 2])
    for root, parts in inside.items():
        if root in {"state_dict.", "state.model."} and len(parts) == 1:
            roots.add(f"{root}{next(iter(parts))}.")
    return sorted(roots, key=lambda root: (len(root), root))


def nested_root(keys: Iterable[str], paths: Collection[KeyPath], objects: Collection[str]) -> str:
    """The container of the weights, where no table knows their names.

    The attribute that a trainer's module gives the model is taken off too, where all keys lie under
    it: ``state_dict.model.`` of Lightning, ``state.model.model.`` of Composer.

    Args:
        keys: Of all tensors.
        paths: How they nest, where that is more than one name.
        objects: Keys of what is no tensor; Lightning's say that it wrote the file.
    """
    found = next((path for path in _PREFERRED if _is_container(path, paths)), None)
    if found is None:
        return ""
    root = "".join(f"{part}." for part in found)
    is_trainer = found == ("state", "model") or any(name in objects for name in _LIGHTNING)
    first = {key[len(root) :].partition(".")[0] for key in keys if key.startswith(root)}
    if is_trainer and len(first) == 1 and first <= _ATTRIBUTES:
        return f"{root}{first.pop()}."
    return root


def _is_container(path: KeyPath, paths: Collection[KeyPath]) -> bool:
    return any(inner[: len(path)] == path and len(inner) > len(path) for inner in paths)
