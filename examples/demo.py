"""Convert a Hugging Face model for Lingua, prove it by logits, train it, and see what changed.

    make demo

Everything is made on the spot, nothing is downloaded.  A small random Llama is saved as Hugging
Face would, converted with the command line, loaded by a Lingua-style FSDP2 trainer on two ranks,
and its logits are compared with those of the original; next to them stand the logits of the same
weights with their keys renamed only, which is what a script without the RoPE relabelling gives.
The ranks save the trained model as Hugging Face has it, and ``dcpconv diff`` says what training
changed, in the terminal and in a page of pictures.  Exits with 1 if a proof fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from lingua_model import LinguaModel
from lingua_style_trainer import fixed_batch

RIGHT = 1e-4
"""Largest |logit difference| that fp32 sums in another order explain; the logits are about 1."""
WRONG = 1e-2
"""Below this the comparison could not see a missing relabelling, and would prove nothing."""
TRAINER = Path(__file__).with_name("lingua_style_trainer.py")
DCPCONV = (sys.executable, "-c", "from dcpconv.cli import main; main()")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.norm": "norm",
}
"""What a renaming script would have: every shape fits, every key matches, the model is broken."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that ended: its output, wall seconds, peak memory in MiB (0.0: unknown), and its
    exit code."""

    stdout: str
    seconds: float
    peak_mib: float
    code: int = 0


class Stage:
    """Runs commands, shows them, and keeps their output in a directory."""

    def __init__(self, console: Console, directory: Path) -> None:
        self.console = console
        self.directory = directory
        self.runs = 0

    def run(
        self,
        name: str,
        command: tuple[str, ...],
        *arguments: str | Path,
        codes: tuple[int, ...] = (0,),
    ) -> Finished:
        """Run ``command`` to its end, shown as ``name``; leave if it exits otherwise.

        The peak is ``VmHWM``, polled: ``ru_maxrss`` would start at this process's own peak.
        """
        words = [os.path.relpath(word) if isinstance(word, Path) else word for word in arguments]
        self.console.print(Text("$ " + " ".join((name, *words)), style="bold"), soft_wrap=True)
        log = (
            self.directory
            / f"{name.split(maxsplit=1)[0]}-{len(list(self.directory.glob('*.log')))}.log"
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        start = time.perf_counter()
        peak = 0.0
        with (
            log.open("w") as out,
            log.with_suffix(".err").open("w") as err,
            subprocess.Popen(  # noqa: S603  # our own commands
                [*command, *words], stdout=out, stderr=err, env=environment
            ) as process,
        ):
            while process.poll() is None:
                peak = max(peak, _peak_mib(process.pid))
                time.sleep(0.002)
            seconds = time.perf_counter() - start
        if process.returncode not in codes:
            self.console.print(Text(log.with_suffix(".err").read_text()), style="red")
            raise SystemExit(f"{name} failed with exit code {process.returncode}")
        return Finished(log.read_text(), seconds, peak, process.returncode)


def _peak_mib(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0


def make_llama(directory: Path, *, is_tied: bool) -> LlamaForCausalLM:
    """Save a Llama whose every tensor is random, norms too: 9 heads of 32 over 3 kv heads."""
    config = LlamaConfig(
        vocab_size=2053,
        hidden_size=288,
        intermediate_size=776,
        num_hidden_layers=5,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 500000.0, "rope_type": "default"},
        tie_word_embeddings=is_tied,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.normal_(1.0, 0.2)
            else:
                weight.normal_(0.0, weight.shape[-1] ** -0.5)
    logging.disable_progress_bar()
    model.save_pretrained(directory, max_shard_size="12MB")
    return model


def renamed_only(llama: LlamaForCausalLM, params_file: Path) -> LinguaModel:
    """The Lingua model that gets Llama's tensors under new names, rows as they are."""
    model = LinguaModel.from_params(json.loads(params_file.read_text()))
    head = "output.tied_module" if model.params.weight_tying else "output"
    state = {}
    for key, value in llama.state_dict().items():
        ours = key
        for old, new in {**NAMES, "lm_head": head}.items():
            ours = ours.replace(old, new)
        state[ours] = value
    model.load_state_dict(state)
    return model


def proof(columns: dict[str, Tensor]) -> Table:
    """How far each column's logits [batch, seq, vocab] are from those of the first."""
    (_, expected), *others = columns.items()
    table = Table(title="Lingua model against Hugging Face, fp32", title_justify="left")
    for head in ("weights", "max |logit diff|", "top token agrees", ""):
        table.add_column(head, justify="left" if head in {"weights", ""} else "right")
    for name, logits in others:
        difference = float((logits - expected).abs().max())
        agreeing = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
        is_right = difference < RIGHT
        table.add_row(
            name,
            f"{difference:.1e}",
            f"{agreeing:.0%}",
            "the same model" if is_right else "another model",
            style="green" if is_right else "red",
        )
    return table


def top_tokens(columns: dict[str, Tensor]) -> Table:
    """The five likeliest tokens after the first sentence, by column."""
    table = Table(title="likeliest next tokens", title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    best = [logits[0, -1].softmax(-1).topk(5) for logits in columns.values()]
    for place in range(5):
        table.add_row(
            *(f"{int(top.indices[place])}  {float(top.values[place]):5.1%}" for top in best)
        )
    return table


def sparkline(values: list[float], blocks: str) -> str:
    """One character of ``blocks`` per value; the last one is for the largest.

    >>> sparkline([4.0, 2.0, 0.0], "_-^")
    '^-_'
    """
    low, high = min(values), max(values)
    steps = (len(blocks) - 1) / (high - low or 1.0)
    return "".join(blocks[int((value - low) * steps + 0.5)] for value in values)


def is_identical(left: Path, right: Path) -> bool:
    """Whether two Hugging Face directories hold the same tensors, bit by bit."""
    first, second = (
        LlamaForCausalLM.from_pretrained(path, dtype="auto").state_dict() for path in (left, right)
    )
    return first.keys() == second.keys() and all(
        torch.equal(first[key].view(torch.int32), second[key].view(torch.int32)) for key in first
    )


def came_back(stage: Stage, out: Path, *, saved: Path) -> tuple[bool, bool]:
    """Bring both checkpoints back to Hugging Face, and show what training changed.

    Args:
        stage: Runs the commands.
        out: Where everything is.
        saved: What the ranks saved.

    Returns:
        Whether the untrained one is the first one again, and whether what the ranks saved is what
        converting their step directory gives.
    """
    hf, again, converted = out / "hf", out / "hf-again", out / "trained-hf"
    dcpconv = partial(stage.run, "dcpconv", DCPCONV)
    dcpconv("convert", out / "lingua", again, "--to", "hf")
    prints = [dcpconv("fingerprint", path).stdout.strip() for path in (hf, again)]
    stage.console.print(Text("\n".join(prints)), soft_wrap=True)
    dcpconv("convert", out / "trained", converted, "--form", "hf")
    is_same = dcpconv("diff", saved, converted, codes=(0, 1)).code == 0
    page = out / "what-training-changed.html"
    changed = dcpconv("diff", hf, saved, "--by", "slot", "--html", page, codes=(0, 1))
    stage.console.print(Text("\n" + changed.stdout.rstrip()), soft_wrap=True)
    stage.console.print(f"pictures  {os.path.relpath(page)}\n")
    return len(set(prints)) == 1 and is_identical(hf, again), is_same


def main() -> None:
    """Run the demonstration; exit with 1 if the proof fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="replaced if it exists")
    parser.add_argument("--untied", action="store_true", help="give the output its own weight")
    parser.add_argument("--steps", type=int, default=40, help="training steps")
    args = parser.parse_args()
    out: Path = args.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    console = Console(highlight=False)
    stage = Stage(console, out)
    hf, lingua, trained = (out / name for name in ("hf", "lingua", "trained"))

    llama = make_llama(hf, is_tied=not args.untied)
    console.print(
        Text(stage.run("dcpconv", DCPCONV, "inspect", hf).stdout.split("\n\n")[0]), soft_wrap=True
    )
    converted = stage.run("dcpconv", DCPCONV, "convert", hf, lingua, "--to", "lingua")
    console.print(Text(converted.stdout.rstrip()), soft_wrap=True)
    console.print(
        f"took      {converted.seconds:.2f} s for the whole process,"
        f" {converted.peak_mib:.0f} MiB of memory at its peak\n"
    )
    logits_file = out / "logits.pt"
    training = stage.run(
        "torchrun --nproc-per-node 2",
        TORCHRUN,
        TRAINER,
        lingua,
        "--steps",
        str(args.steps),
        "--logits",
        logits_file,
        "--save",
        trained,
        "--save-hf",
        out,
        "--hf-every",
        str(args.steps),
    )
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", training.stdout)]

    tokens = fixed_batch(llama.config.vocab_size)
    with torch.no_grad():
        columns = {
            "Hugging Face": llama(tokens).logits,
            "keys renamed only": renamed_only(llama, lingua / "params.json")(tokens),
            "converted, on 2 ranks": torch.load(logits_file, weights_only=True),
        }
    console.print()
    console.print(proof(columns))
    console.print(top_tokens(columns))
    bars = "".join(map(chr, range(0x2581, 0x2589))) if "utf" in console.encoding else " .:=#@"
    console.print(
        Text(
            f"loss      {losses[0]:.2f} {sparkline(losses, bars)} {losses[-1]:.2f}"
            f"  {len(losses)} AdamW steps\n"
        )
    )
    is_exact, is_same = came_back(stage, out, saved=out / f"step-{args.steps}")

    expected, wrong, right = columns.values()
    checks = {
        f"converted logits agree to {RIGHT:g}": float((right - expected).abs().max()) < RIGHT,
        f"renamed-only logits differ by {WRONG:g}": float((wrong - expected).abs().max()) > WRONG,
        "the loss falls": losses[-1] < losses[0] - 1,
        "converted back, every bit is the same": is_exact,
        "what the ranks saved is what converting their step gives": is_same,
    }
    for what, holds in checks.items():
        console.print(Text(f"{'pass' if holds else 'FAIL'}  {what}", "green" if holds else "red"))
    raise SystemExit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
