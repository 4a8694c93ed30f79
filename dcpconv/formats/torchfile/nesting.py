"""Nested containers as flat keys and back, exactly as ``torch.distributed.checkpoint`` does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from dcpconv.core.catalog import KeyPath
from dcpconv.core.errors import FormatError

_SPARE_ITEMS: Final = 1024
"""List items that may be missing: empty mappings leave no leaf, so torch's lists can have gaps."""


class DictKey(int):
    """A number in a path that is the key of a mapping, where a plain one is the index of a list.

    Integer optimizer states need it: ``{"state": {0: ...}}``.
    """


def flatten(
    value: Mapping[object, object], *, is_tensor: Callable[[object], bool]
) -> list[tuple[KeyPath, object]]:
    """``(path, leaf)`` in order.

    Mappings are always entered, and their keys become strings; a list only where it holds a mapping
    or a tensor, at any depth of lists; a tuple never.  So ``param_groups`` is entered and ``betas``
    is a leaf.

    Source:
        torch 2.13 ``torch/distributed/checkpoint/_traverse.py``, ``traverse_state_dict``.

    >>> flatten({"lr": [1, 2], "groups": [{"eps": 3}]}, is_tensor=lambda leaf: False)
    [(('lr',), [1, 2]), (('groups', 0, 'eps'), 3)]
    """
    leaves: list[tuple[KeyPath, object]] = []

    def is_leaf(node: object) -> bool:
        if isinstance(node, Mapping):
            return False
        if not isinstance(node, list):
            return True
        return all(is_leaf(item) and not is_tensor(item) for item in node)

    def visit(path: KeyPath, node: object) -> None:
        if isinstance(node, Mapping):
            for key, item in node.items():
                visit((*path, str(key)), item)
        elif isinstance(node, list) and not is_leaf(node):
            for index, item in enumerate(node):
                visit((*path, index), item)
        else:
            leaves.append((path, node))

    visit((), value)
    return leaves


def key_of(path: KeyPath) -> str:
    """The flat key that torch gives a path.

    >>> key_of(("optim", "param_groups", 0, "lr"))
    'optim.param_groups.0.lr'
    """
    return ".".join(map(str, path))


class _Branch(dict[str | int, object]):
    """A container whose kind is not known before all of its keys are."""


def nest(leaves: Iterable[tuple[KeyPath, object]]) -> dict[str, object]:
    """The nested containers with these leaves: a list where paths go on with a number, unless it is
    a ``DictKey``.

    Raises:
        FormatError: Two leaves want the same place, or one lies inside another.

    Source:
        torch 2.13 ``torch/distributed/checkpoint/_traverse.py``, ``set_element``.

    >>> nest([(("groups", 0, "eps"), 3), (("lr",), [1, 2])])
    {'groups': [{'eps': 3}], 'lr': [1, 2]}
    >>> nest([(("state", DictKey(7)), "moments")])
    {'state': {7: 'moments'}}
    """
    root = _Branch()
    refused: list[tuple[str, object]] = []
    for path, leaf in leaves:
        node = root
        for part in path[:-1]:
            following = node.setdefault(part, _Branch())
            if not isinstance(following, _Branch):
                break
            node = following
        else:
            if path and path[-1] not in node:
                node[path[-1]] = leaf
                continue
        refused.append(("key", f"{key_of(path)}, at {path}"))
    if refused:
        raise FormatError("keys do not fit into one nest of containers", refused)
    if any(isinstance(key, int) for key in root):
        raise FormatError("a checkpoint is a mapping, so no path may start with a number")
    return {str(key): _container((str(key),), item) for key, item in root.items()}


def _container(path: KeyPath, node: object) -> object:
    if not isinstance(node, _Branch):
        return node
    items = {key: _container((*path, key), item) for key, item in node.items()}
    indices = [key for key in items if isinstance(key, int) and not isinstance(key, DictKey)]
    if not indices:
        return items
    top = max(indices)
    if len(indices) < len(items) or min(indices) < 0 or top >= 2 * len(items) + _SPARE_ITEMS:
        raise FormatError(
            "container is neither a list nor a mapping",
            [("key", key_of(path)), ("found", f"{len(items)} items, the last number is {top}")],
        )
    return [items.get(index) for index in range(top + 1)]
