"""What may help where keys do not fit: likely renames, wrappers, other namings, known formats."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator

from dcpconv.coverage import Coverage
from dcpconv.keymaps import Keymap, keymaps, split_key
from dcpconv.recognition import Weights

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
    """Sentences that name a likely cause, the most certain first; none where nothing is likely."""
    unknown = [fault.key for fault in coverage.unknown]
    missing = [fault.key for fault in coverage.missing]
    said = list(_marks(weights))
    if unknown:
        said.extend(_prefix(unknown, missing))
        templates = Counter(split_key(key)[0] for key in unknown)
        said.extend(_families(coverage, weights, templates))
        said.extend(_renames(templates, missing))
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
            yield (
                f"{count:,} source keys {verb} the prefix {prefix!r} and are the target's otherwise"
            )


def _families(coverage: Coverage, weights: Weights, unknown: Counter[str]) -> Iterator[str]:
    """A table that knows more of the keys than the one that was taken."""
    counts = Counter(split_key(key)[0] for key in weights.entries)
    own = coverage.source

    def known(table: Keymap, templates: Counter[str]) -> int:
        return sum(count for template, count in templates.items() if table.knows(template))

    current = keymaps().get(own)
    floor = known(current, counts) if current is not None else 0
    scored = sorted(
        ((known(table, counts), table) for table in keymaps().values() if table.name != own),
        key=lambda scored: -scored[0],
    )
    for count, table in scored[:1]:
        if count > floor and known(table, unknown):
            total = sum(counts.values())
            yield f"did you mean family {table.name}? it knows {count:,} of the {total:,} keys"


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
