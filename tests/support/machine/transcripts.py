"""Transcripts in Markdown: run again, and compared or written anew.

A block fenced with ``console`` holds commands after ``$`` and what they printed.  All blocks of a
page run in order in one directory, which ``prepare`` fills.

    python tests/support/machine/transcripts.py README.md        # writes what is printed today
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

BLOCK = re.compile(r"(?<=^```console\n)(.*?)(?=^```$)", re.MULTILINE | re.DOTALL)
VARYING = (
    (re.compile(r"^time .*$", re.MULTILINE), "time ..."),
    (re.compile(r"^moved .*$", re.MULTILINE), "moved ..."),
)
"""Lines that differ from machine to machine: seconds, and what the file system can do."""


def prepare(directory: Path) -> None:
    """Makes the checkpoints that the pages speak of.

    ``weights/tiny-llama``; ``weights/lost-key``, the same without one tensor of layer 1;
    ``out/checkpoint-500``, an adapter that was trained on it; ``run``, a run of Trainer;
    ``pretrain_96_resume.pth``, which MiniMind wrote on one rank.
    """
    from safetensors.torch import load_file, save_file

    from support.checkpoints.adapters import factors, peft_tensors, save_peft
    from support.checkpoints.families import hf_tensors
    from support.models.hf_models import save_hf, tiny
    from support.runs.run_dirs import example
    from support.runs.training import MiniMindRun

    model = tiny("llama", tie_word_embeddings=True)
    base = save_hf(model, directory / "weights/tiny-llama")
    pairs = factors(hf_tensors(base), ["q_proj", "v_proj", "down_proj"])
    save_peft(directory / "out/checkpoint-500", peft_tensors(pairs))
    lacking = directory / "weights/lost-key"
    save_hf(model, lacking)
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    save_file(tensors, lacking / "model.safetensors", {"format": "pt"})
    example(directory / "run")
    begun = MiniMindRun.begin("gen3")
    begun.train(1)
    begun.save(directory / "pretrain_96_resume.pth", step=4000)


def run_page(text: str, directory: Path) -> Iterator[tuple[str, str]]:
    """``(block as printed in the page, block as printed today)``, in order."""
    for found in BLOCK.finditer(text):
        block = found.group(1)
        commands = [line[2:] for line in block.splitlines() if line.startswith("$ ")]
        yield block, "".join(f"$ {command}\n{_run(command, directory)}" for command in commands)


def normalised(text: str) -> str:
    """A transcript without what varies."""
    for pattern, word in VARYING:
        text = pattern.sub(word, text)
    return text


def _run(command: str, directory: Path) -> str:
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "100",
        "NO_COLOR": "1",
        "TZ": "UTC",
    }
    found = subprocess.run(
        ["bash", "-c", command],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return found.stdout


def main() -> None:
    """Writes the transcripts of a page anew."""
    page = Path(sys.argv[1])
    text = page.read_text()
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for old, new in list(run_page(text, Path(name))):
            text = text.replace(old, new, 1)
    page.write_text(text)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
