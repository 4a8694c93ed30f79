"""Scenes for ``dist_worlds``: weights into a model under every parallelism.

Run as a script by ``launch``; ``prepare`` writes what the scenes read.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import torch_save_to_dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from dcpconv.loading.init_weights import load_init_weights
from dcpconv.loading.storage_reader import CheckpointReader
from support.worlds.dist_worlds import Scene, take_part
from support.worlds.load_faults import FAULTS, Read, hostile
from support.worlds.sharded_models import (
    DEVICE,
    VOCAB,
    Wrap,
    build,
    checkpointed,
    compiled,
    ddp,
    expected,
    fsdp1,
    fsdp2,
    fsdp2_over_tp,
    hsdp,
    lingua_weights,
    local_parameters,
    local_tensors,
    offloaded,
    plain,
    tp,
)

READS: tuple[Read, ...] = ("all", "once", "rank0")
WRAPS: dict[int, dict[str, tuple[Wrap, tuple[bool, ...]]]] = {
    2: {
        "plain": (plain, (True, False)),
        "ddp": (ddp, (False,)),
        "fsdp1-flat": (fsdp1(original=False), (False,)),
        "fsdp1": (fsdp1(original=True), (False,)),
        "fsdp2": (fsdp2(), (True, False)),
        "offloaded": (offloaded, (True, False)),
        "tp": (tp(), (True, False)),
        "tp-uneven": (tp(uneven=True), (True,)),
        "compiled": (compiled, (True,)),
        "checkpointed": (checkpointed, (True,)),
    },
    4: {
        "fsdp1": (fsdp1(original=True), (False,)),
        "fsdp2": (fsdp2(), (True, False)),
        "hsdp": (hsdp, (True, False)),
        "fsdp2-tp": (fsdp2_over_tp(uneven=False), (True, False)),
        "fsdp2-tp-uneven": (fsdp2_over_tp(uneven=True), (True,)),
    },
}
"""By world size: how a model is wrapped, and whether it may be on the meta device then."""

RUNS_FORWARD = ("plain", "ddp", "fsdp1", "fsdp2", "hsdp", "tp", "fsdp2-tp")
"""The others either compile, or gather what torch cannot gather unevenly."""


def prepare(directory: Path, worlds: Iterable[int] = (2, 4)) -> None:
    """Write the checkpoints that scenes read, in worlds of several sizes."""
    from support.models.hf_models import save_hf, tiny

    for name, tied in (("untied", False), ("tied", True)):
        model = tiny("llama", tie_word_embeddings=tied)
        save_hf(model, directory / f"hf-{name}", max_shard_size="200KB")
        weights = lingua_weights(model.state_dict(), tied=tied)
        torch.save(weights, directory / f"{name}.pt")
        torch.save({"model": weights, "step": 3}, directory / f"lingua-{name}.pth")
        torch_save_to_dcp(directory / f"lingua-{name}.pth", directory / f"dcp-{name}")
    weights = torch.load(directory / "untied.pt")
    for name, change in FAULTS.items():
        torch.save({"model": change(dict(weights))}, directory / f"{name}.pth")
    save_hf(tiny("qwen3"), directory / "other-family")
    save_hf(tiny("llama").to(torch.bfloat16), directory / "bf16")
    for ranks in worlds:
        for rank in range(ranks):
            last = rank == ranks - 1
            for name in ("truncated", "shrinking", "different"):
                source = "bf16" if last and name == "different" else "hf-untied"
                shutil.copytree(directory / source, directory / f"{name}-{rank}-of-{ranks}")
        victim = min((directory / f"truncated-{ranks - 1}-of-{ranks}").glob("*.safetensors"))
        with victim.open("r+b") as file:
            file.truncate(victim.stat().st_size - 100)


def _loads(wrap: Wrap, *, meta: bool, read: Read, name: str) -> Scene:
    """The shards after loading are those that torch makes of the right weights."""

    def scene(directory: Path) -> Any:
        model = wrap(build(meta=meta))
        device = DEVICE if wrap is plain else None  # meshes say it for the others
        report = load_init_weights(model, directory / "hf-untied", read=read, device=device)
        right = wrap(expected(directory))
        _equal(local_tensors(model), local_tensors(right))
        if name in RUNS_FORWARD:
            tokens = torch.arange(34, device=DEVICE).reshape(2, 17) % VOCAB
            with torch.no_grad():
                assert torch.equal(_whole(model(tokens)), _whole(right(tokens)))
        if name not in {"fsdp2-tp-uneven", "tp-uneven"}:
            full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            # torch keeps the component of a compiled module inside a checkpoint wrapper.
            bare = {key.replace("_orig_mod.", ""): tensor for key, tensor in full.items()}
            _equal(bare, torch.load(directory / "untied.pt"))
        return {
            "bytes": report.nbytes,
            "read": report.nbytes_read,
            "received": report.nbytes_received,
            "tensors": len(report.loaded),
        }

    return scene


def _equal(found: Mapping[str, Any], right: Mapping[str, Tensor]) -> None:
    assert set(found) == set(right), set(found) ^ set(right)
    for key, tensor in right.items():
        assert torch.equal(found[key].to(tensor.device), tensor), key


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _from(source: str, *, tied: bool = False, meta: bool = True) -> Scene:
    """Sources of every form, into FSDP2."""

    def scene(directory: Path) -> Any:
        bare = build(meta=meta, tied=tied)
        bare.tok_embeddings.weight.requires_grad = False
        model = fsdp2()(bare)
        report = load_init_weights(model, directory / source)
        _equal(local_tensors(model), local_tensors(fsdp2()(expected(directory, tied=tied))))
        embedding = model.get_parameter("tok_embeddings.weight")
        assert not embedding.requires_grad
        assert model.get_parameter("norm.weight").requires_grad
        if tied:
            assert model.get_submodule("output.tied_module").weight is embedding
        return {"tied": report.tied, "family": report.family, "form": report.form}

    return scene


def _casts(directory: Path) -> Any:
    model = fsdp2()(build(meta=True, dtype=torch.float16))
    source = torch.load(directory / "untied.pt")
    if dist.get_rank() == 0:
        source["norm.weight"][0] = 1e30
        source["norm.weight"][90] = 1e-30
        torch.save(source, directory / "extreme.pt")
    dist.barrier()
    report = load_init_weights(model, directory / "extreme.pt")
    assert model.get_parameter("norm.weight").dtype is torch.float16
    kept = fsdp2()(build(meta=False, dtype=torch.float16))
    load_init_weights(kept, directory / "untied.pt", dtype="source")
    assert kept.get_parameter("norm.weight").dtype is torch.float32
    _equal(local_parameters(kept), local_parameters(fsdp2()(expected(directory))))
    return {
        "casts": report.casts,
        "lossy": [[o.key, o.overflowed, o.underflowed] for o in report.lossy],
    }


def _hugging_face(directory: Path) -> Any:
    """A model of transformers on the meta device, tied, with its RoPE table."""
    from support.models.hf_models import tiny

    right = tiny("llama", tie_word_embeddings=True).to(DEVICE)
    with torch.device("meta"):
        model = type(right)(right.config)
    for layer in model.model.layers:
        torch.distributed.fsdp.fully_shard(layer)
    torch.distributed.fsdp.fully_shard(model)
    report = load_init_weights(model, directory / "hf-tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = torch.arange(34, device=DEVICE).reshape(2, 17) % VOCAB
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, right(tokens).logits)
    return {"tied": report.tied, "buffers": report.computed_buffers}


def _pipeline(directory: Path) -> Any:
    """Every rank holds other layers, and nobody finds the others' unexpected."""
    model = build(meta=True)
    first = dist.get_rank() == 0
    if first:
        del model.norm, model.output
    else:
        del model.tok_embeddings
    kept = range(1) if first else range(1, 3)
    model.layers = nn.ModuleDict({str(layer): model.layers[layer] for layer in kept})  # type: ignore[assignment]
    report = load_init_weights(model, directory / "hf-untied", to="lingua")
    weights = torch.load(directory / "untied.pt")
    _equal(
        dict(model.named_parameters()),
        {k: weights[k] for k, _ in model.named_parameters()},
    )
    return {"loaded": len(report.loaded)}


def _adds(directory: Path) -> Any:
    """``strict=False``: what is missing is left alone, or handed over."""
    seen: list[str] = []

    def fill(fqn: str, parameter: Tensor) -> None:
        seen.append(fqn)
        parameter.fill_(7)

    bare = build(meta=True)
    bare.get_submodule("layers.0.attention").register_module(
        "extra", nn.Linear(3, 5, device="meta")
    )
    model = fsdp2()(bare)
    report = load_init_weights(model, directory / "hf-untied", strict=False, init_missing=fill)
    assert _whole(model.get_parameter("layers.0.attention.extra.weight")).eq(7).all()
    untouched = build(meta=False)
    with torch.no_grad():
        untouched.norm.weight.fill_(5)
    alone = load_init_weights(
        fsdp2()(untouched), directory / "missing.pth", strict=False, ignore=["tok_*"]
    )
    assert _whole(untouched.norm.weight).eq(5).all()
    assert _whole(untouched.tok_embeddings.weight).isnan().all()
    return {
        "seen": seen,
        "missing": [key for key, _ in report.missing],
        "alone": [key for key, _ in alone.missing],
        "ignored": [key for key, _ in alone.ignored],
    }


def _by_dcp(source: str, under: str, **options: Any) -> Scene:
    """Stock ``dcp.load`` with our reader, of everything and of some keys."""

    def scene(directory: Path) -> Any:
        model = fsdp2()(build(meta=False))
        state = get_model_state_dict(model)
        container: dict[str, Any] = {under: state} if under else state
        reader = CheckpointReader(directory / source, **options)
        try:
            dcp_load(container, storage_reader=reader)
        except CheckpointException as error:
            raise RuntimeError(repr(error.failures)) from None  # its own text names no reason
        set_model_state_dict(model, state)
        _equal(local_parameters(model), local_parameters(fsdp2()(expected(directory))))
        keys = ("norm.weight", "layers.1.attention.wk.weight")
        prefix = f"{under}." if under else ""
        some: dict[str, Any] = {
            prefix + key: torch.zeros(model.get_parameter(key).shape) for key in keys
        }
        dcp_load(some, storage_reader=CheckpointReader(directory / source, **options))
        right = torch.load(directory / "untied.pt")
        _equal(some, {prefix + key: right[key] for key in keys})

    return scene


SCENES: dict[int, dict[str, Scene]] = {
    ranks: {
        f"wrap/{name}/{'meta' if meta else 'live'}/{read}": _loads(
            wrap, meta=meta, read=read, name=name
        )
        for name, (wrap, metas) in wraps.items()
        for meta in metas
        for read in (READS if meta is metas[0] else READS[:1])
    }
    for ranks, wraps in WRAPS.items()
}
SCENES[2] |= {
    **{
        f"from/{source}": _from(source, tied=source.endswith(("-tied", "-tied.pth")))
        for source in (
            "hf-untied",
            "hf-tied",
            "lingua-untied.pth",
            "lingua-tied.pth",
            "dcp-untied",
            "dcp-tied",
        )
    },
    "casts": _casts,
    "hugging-face": _hugging_face,
    "pipeline": _pipeline,
    "adds": _adds,
    "dcp/hf": _by_dcp("hf-untied", "", to="lingua"),
    "dcp/hf-root": _by_dcp("hf-untied", "model", to="lingua", root="model"),
    "dcp/pth-as-stored": _by_dcp("lingua-untied.pth", "model"),
    "dcp/dcp-as-stored": _by_dcp("dcp-untied", "model"),
    "dcp/dcp-rebased": _by_dcp("dcp-untied", "", root=""),
    "dcp/truncated": _by_dcp("truncated-1-of-2", "", to="lingua"),
}
for ranks in SCENES:
    SCENES[ranks] |= {f"hostile/{name}": scene for name, scene in hostile(ranks).items()}

if __name__ == "__main__":
    take_part(SCENES)
