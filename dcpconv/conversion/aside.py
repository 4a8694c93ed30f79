"""Tensors that only one family has a place for, kept in a file of their own beside the result.

ChatGLM's p-tuning prefix is one: transformers' GLM has no such module, yet it is what the user
trained.  Converting away writes it, as it is stored, next to the weights; converting back finds it
there and puts it in its place.
"""

from __future__ import annotations

from dataclasses import replace

from dcpconv.core.outline import Outline
from dcpconv.families.keymaps import Keymap
from dcpconv.formats import safetensors
from dcpconv.plan.coverage import Coverage
from dcpconv.plan.fills import make_plan


def with_aside(
    outline: Outline,
    coverage: Coverage,
    table: Keymap | None,
    *,
    modulus: int,
    is_one_file: bool,
) -> tuple[Outline, tuple[str, ...]]:
    """The files of a result and one more, for what its family has no place for; and what to say.

    Args:
        outline: All other files.
        coverage: Whose ``aside`` is written, unchanged.
        table: The source's, which says what the file is called.
        modulus: Block size to line up with, in bytes.
        is_one_file: Whether the result is no directory, and so has no place for it either.
    """
    if not coverage.aside or table is None:
        return outline, ()
    count = len(coverage.aside)
    if is_one_file:
        parts = (table.part_of(target.key) for target in coverage.aside)
        names = dict.fromkeys(p.prefix.rstrip(".") if p else table.aside_module for p in parts)
        only = f"--only {' or '.join(names)} converts them by themselves"
        return outline, (f"{count} tensors have no place in one file with the others; {only}",)
    tensors = make_plan(replace(coverage, targets=coverage.aside), path_of=lambda key: (key,))
    file = safetensors.one_file(table.aside_file, tensors, modulus=modulus)
    note = f"{count} tensors that {coverage.target} has no place for are in {file.name}"
    return Outline((*outline.files, file), outline.commit), (note,)
