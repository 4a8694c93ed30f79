"""What may help where keys do not fit: likely renames, wrappers, other namings, known formats."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator

from dcpconv.families.keymaps import split_key
from dcpconv.plan.coverage import Coverage
from dcpconv.sources.recognition import Weights, recognise

_KNOWN_MARKS = (
    (
        "_flat_param",
        "FSDP1 flat parameters: save again as SHARDED_STATE_DICT, which keeps the keys",
    ),
    (".lora_A.", "this is a PEFT adapter: merge it into its base model first"),
    (".qweight", "these are GPTQ or AWQ weights: dequantise them with the tool that wrote them"),
    (".quant_state", "these are bitsandbytes weights: save the model again without quantisation"),
)
_RENAMES = 3
"""Likely renames told: more are noise."""
_CLOSE = 0.6
"""Similarity of two keys, as difflib counts, from which one may be the other misspelt."""


def suggest(coverage: Coverage, weights: Weights) -> tuple[str, ...]:
    """What is the most likely cause, in a sentence or a few; nothing where nothing is likely."""
    unknown = [fault.key for fault in coverage.unknown]
    missing = [fault.key for fault in coverage.missing]
    said = list(_marks(weights))
    if unknown and not said:
        said.extend(_prefix(unknown, missing))
    if unknown and not said:
        said.extend(_families(coverage, weights))
    if unknown and not said:
        said.extend(_renames(Counter(split_key(key)[0] for key in unknown), missing))
    return tuple(dict.fromkeys(said))


def _marks(weights: Weights) -> Iterator[str]:
    for mark, text in _KNOWN_MARKS:
        if any(mark in key for key in weights.catalog.tensors):
            yield text
            return


def _prefix(unknown: list[str], missing: list[str]) -> Iterator[str]:
    """One side carries a prefix that the other lacks."""
    for longer, shorter, verb in ((unknown, missing, "carry"), (missing, unknown, "lack")):
        plain = set(shorter)
        prefixes: Counter[str] = Counter()
        for key in longer:
            at = key.find(".")
            while at > 0:
                if key[at + 1 :] in plain:
                    prefixes[key[: at + 1]] += 1
                    break
                at = key.find(".", at + 1)
        for prefix, count in prefixes.most_common(1):
            if 2 * count <= len(longer):
                continue  # of the few that are left, some end alike by chance
            yield (
                f"{count:,} source keys {verb} the prefix {prefix!r} and are the target's otherwise"
            )


def _families(coverage: Coverage, weights: Weights) -> Iterator[str]:
    """The naming that keys speak for, where another was taken and knows fewer of them."""
    best = recognise(weights.catalog)
    if best.keymap is None or best.keymap.name == coverage.source:
        return
    unknown = {fault.key for fault in coverage.unknown}
    count = sum(best.keymap.match(key) is not None for key in best.entries)
    if count > len(weights.entries) - len(unknown):
        total = len(best.entries)
        yield f"did you mean family {best.keymap.name}? it knows {count:,} of the {total:,} keys"


def _renames(found: Iterable[str], missing: list[str]) -> Iterator[str]:
    """Unknown keys that are spelt almost like a missing one."""
    wanted = list(dict.fromkeys(split_key(key)[0] for key in missing))
    for template in list(found)[: 10 * _RENAMES]:
        if template in wanted:
            continue  # the same name with other numbers
        close = max(wanted, key=lambda other: _likeness(template, other), default="")
        if _likeness(template, close) >= _CLOSE:
            yield f"did you mean {_shown(close)}? the source has {_shown(template)}"


def _likeness(one: str, other: str) -> float:
    """How alike two keys are where they differ: a common beginning or end is no likeness."""
    mine, theirs = one.split("."), other.split(".")
    while mine and theirs and mine[0] == theirs[0]:
        del mine[0], theirs[0]
    while mine and theirs and mine[-1] == theirs[-1]:
        del mine[-1], theirs[-1]
    return difflib.SequenceMatcher(None, ".".join(mine), ".".join(theirs)).ratio()


def _shown(template: str) -> str:
    """A template as people write it: ``layers.N.attention.wo.weight``."""
    return template.replace("{}", "N")
