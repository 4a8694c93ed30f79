"""What a class of transformers calls its tensors in memory, and how it makes them of its files.

transformers keeps published names and names in memory apart: experts are stacked, towers renamed,
projections cut, as its own conversion mapping says.  That mapping is asked here for the keys of a
checkpoint, and its answer is plain data; nothing is imported unless the model is one of its own.

Source:
    transformers 5.23: ``get_model_conversion_mapping`` in ``conversion_mapping.py`` collects the
    renamings and converters of a model and its parts; ``convert_and_load_state_dict_in_model`` in
    ``core_model_loading.py`` applies all renamings and at most one converter to a key, in the order
    of ``dot_natural_key``, then adds or removes ``base_model_prefix``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

_WRAPPED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Components that wrappers put into names of modules; around a whole model also ``module``."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One step of a conversion.

    Attributes:
        name: As transformers calls its class.
        arguments: What it was made with; fields of a config are looked up.
    """

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ConversionGroup:
    """Source tensors that are converted together.

    Attributes:
        first: The first key that they become.
        sources: Source keys in order, by the pattern that each matched.
        source_patterns: All patterns, in the order that operations take them.
        target_patterns: What the patterns become within a key.
        operations: What is done, in order; empty for a mere renaming.
    """

    first: str
    sources: Mapping[str, tuple[str, ...]]
    source_patterns: tuple[str, ...] = ()
    target_patterns: tuple[str, ...] = ()
    operations: tuple[Operation, ...] = ()


@dataclass(frozen=True, slots=True)
class LiveModel:
    """A model of transformers, as far as its names are concerned.

    Attributes:
        name: Its class.
        model_type: As its config says.
        tied: Key -> key of the tensor that it repeats, as the class ties them.
        model: The model itself, or one like it without wrappers and memory.
        computed: Keys that ``save_pretrained`` leaves out because the class computes them.
        dropped: Patterns of stored keys that the class has no use for.
    """

    name: str
    model_type: str
    tied: Mapping[str, str]
    model: Any
    computed: frozenset[str] = frozenset()
    dropped: tuple[str, ...] = ()

    def groups(
        self, keys: Iterable[str], wanted: Mapping[str, object]
    ) -> tuple[ConversionGroup, ...]:
        """What becomes of the keys of a checkpoint.

        Args:
            keys: As a file spells them.
            wanted: The model's own keys; a prefix is added or removed so that they are reached.
        """
        from transformers import core_model_loading as core  # noqa: PLC0415
        from transformers.conversion_mapping import (  # noqa: PLC0415
            get_model_conversion_mapping,
        )

        mapping = get_model_conversion_mapping(self.model)
        renamings = [one for one in mapping if isinstance(one, core.WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, core.WeightConverter)]
        by_pattern = {
            pattern: converter for converter in converters for pattern in converter.source_patterns
        }
        prefix = self.model.base_model_prefix
        converted: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        renamed: list[ConversionGroup] = []
        for key in sorted(keys, key=core.dot_natural_key):
            name, pattern = core.rename_source_key(key, renamings, converters, prefix, wanted)
            if name not in wanted and key in wanted:
                name, pattern = core.rename_source_key(key, [], [], prefix, wanted)
            if pattern is None:
                renamed.append(ConversionGroup(name, {key: (key,)}))
            else:
                _, collected = converted.setdefault(name, (by_pattern[pattern], {}))
                collected.setdefault(pattern, []).append(key)
        return (
            *renamed,
            *(
                ConversionGroup(
                    name,
                    {pattern: tuple(some) for pattern, some in collected.items()},
                    tuple(converter.source_patterns),
                    tuple(converter.target_patterns),
                    tuple(self._operation(one) for one in converter.operations),
                )
                for name, (converter, collected) in converted.items()
            ),
        )

    def published(self, keys: Iterable[str]) -> dict[str, str]:
        """What files call what the model has; ``*`` stands for the number of an expert."""
        from transformers import core_model_loading as core  # noqa: PLC0415
        from transformers.conversion_mapping import (  # noqa: PLC0415
            get_model_conversion_mapping,
        )

        mapping = []
        for one in reversed(get_model_conversion_mapping(self.model, add_legacy=False)):
            # A prefix was there or was not: nothing in the model says which.
            if not isinstance(one, core.PrefixChange):
                with suppress(NotImplementedError, ValueError):  # some have no way back
                    mapping.append(one.reverse_transform())
        renamings = [one for one in mapping if isinstance(one, core.WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, core.WeightConverter)]
        return {
            key: core.rename_source_key(key, renamings, converters, reverse=True)[0]
            for key in sorted(keys, key=core.dot_natural_key)
        }

    def passes_over(self, key: str) -> bool:
        """Whether the class drops a stored key without a word."""
        return any(re.search(pattern, key) for pattern in self.dropped)

    def _operation(self, operation: Any) -> Operation:
        arguments = {
            name: value for name, value in vars(operation).items() if not name.startswith("_")
        }
        config = self.model.config
        attribute = arguments.get("num_shards_attribute")
        if attribute is not None:
            arguments["shards"] = getattr(config.get_text_config(), attribute)
        if type(operation).__name__ == "PermuteForRope":
            key = arguments.get("subconfig_key")
            part = getattr(config, key, config) if key is not None else config
            arguments["heads"] = getattr(part, "num_attention_heads", 1)
        return Operation(type(operation).__name__, arguments)


def live_model(model: object) -> LiveModel | None:
    """A model of transformers, wrapped in any way; ``None`` for any other, and for versions of
    transformers that have no such mapping."""
    found = _unwrapped(model)
    if found is None:
        return None
    owner = _transformers_class(type(found))
    if owner is None or not _has_mapping():
        return None
    bare = _bare(found, owner)
    names = getattr(bare, "all_tied_weights_keys", None) or {}
    return LiveModel(
        owner.__name__,
        str(getattr(bare.config, "model_type", "")),
        dict(names),
        bare,
        frozenset(getattr(bare, "_keys_to_ignore_on_save", None) or ()),
        tuple(_dropped(bare)),
    )


def _dropped(model: Any) -> Iterator[str]:
    """Patterns of stored keys that a class passes over.

    Source:
        transformers 5.23, ``_adjust_missing_and_unexpected_keys`` in ``modeling_utils.py``: beside
        what the class lists, tables that older versions stored and newer ones compute.
    """
    yield from map(str, getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        yield r"rotary_emb\.inv_freq"
    if any(name.endswith("position_ids") for name in buffers):
        yield r"(^|\.)position_ids$"


def _has_mapping() -> bool:
    try:
        from transformers import conversion_mapping, core_model_loading  # noqa: F401, PLC0415
    except ImportError:
        return False
    return True


def _unwrapped(model: Any) -> Any:
    """The outermost module of transformers under wrappers around the whole model."""
    while model is not None and _transformers_class(type(model)) is None:
        inner = getattr(model, "_modules", {})
        if len(inner) != 1 or next(iter(inner)) not in _WRAPPED | {"module"}:
            return None
        model = next(iter(inner.values()))
    return model


def _transformers_class(kind: type) -> type | None:
    """The class that a model was made of; FSDP2 derives classes of its own from it."""
    bases = {base.__name__ for base in kind.__mro__ if base.__module__.startswith("transformers.")}
    if "PreTrainedModel" not in bases:
        return None
    return next(base for base in kind.__mro__ if not _is_wrapper(base))


def _is_wrapper(kind: type) -> bool:
    return kind.__module__.startswith("torch.distributed")


def _bare(model: Any, owner: type) -> Any:
    """A model whose modules have the names and classes that transformers gave them."""
    if not any(
        any(map(_is_wrapper, type(module).__mro__)) or set(name.split(".")) & set(_WRAPPED)
        for name, module in model.named_modules()
    ):
        return model
    with sys.modules["torch"].device("meta"):  # a live model has imported it
        return owner(model.config)
