"""However many processes write a result, and with however many threads: the bytes are the same."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from dcpconv import convert
from dcpconv.conversion.report import ConversionReport
from dcpconv.core.errors import LossyCastError
from dcpconv.core.outline import Outline
from dcpconv.engine import cutting
from dcpconv.engine.copying import OutDirectory
from dcpconv.engine.execute import execute
from support.checkpoints.adapters import factors, peft_tensors, save_peft
from support.checkpoints.engine_cases import random_outline, slow_file, store
from support.checkpoints.families import hf_tensors
from support.checkpoints.scaled_blocks import published
from support.machine.mounts import xfs
from support.models.hf_models import save_hf, tiny
from support.versions import save_alone
from support.worlds.conversions import in_threads, make_small, script, start, tree


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    llama = save_hf(tiny("llama"), root / "llama")
    save_hf(tiny("qwen3_moe", dtype=torch.bfloat16), root / "moe")
    save_hf(tiny("llama", vocab_size=132), root / "even")
    published(root)
    convert(llama, root / "llama.pth", form="torch")
    convert(llama, root / "llama.dcp", form="dcp", chunks=3)
    pairs = factors(hf_tensors(llama), ("q_proj", "k_proj", "down_proj"))
    save_peft(root / "adapter", peft_tensors(pairs))
    return root


CONVERSIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hf-dcp": ("llama", "out", {"form": "dcp"}),
    "hf-dcp-chunks": ("llama", "out", {"form": "dcp", "chunks": 5}),
    "hf-torch": ("llama", "out.pth", {}),
    "hf-files": ("llama", "out", {"form": "hf", "max_file_size": 100_000}),
    "relabelled": ("llama", "out", {"to": "lingua"}),
    "cast": ("llama", "out", {"to": "lingua", "dtype": "bf16"}),
    "cast-torch": ("llama", "out.pth", {"to": "meta", "dtype": "fp16"}),
    "model-parallel": ("even", "out", {"form": "torch", "to": "meta", "model_parallel": 2}),
    "fused": ("moe", "out", {"to": "hf-memory-qwen3_moe", "form": "dcp"}),
    "dequantised": ("fp8", "out", {"form": "hf", "dequantize": True}),
    "merged": ("llama", "out", {"form": "hf", "adapter": "adapter"}),
    "merged-cast": ("llama", "out.pth", {"adapter": "adapter", "dtype": "bf16"}),
    "torch-dcp": ("llama.pth", "out", {"form": "dcp"}),
    "dcp-torch": ("llama.dcp", "out.pth", {}),
    "dcp-hf": ("llama.dcp", "out", {"form": "hf"}),
}


@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_the_bytes_are_those_of_one_process(
    name: str, ranks: int, sources: Path, tmp_path: Path
) -> None:
    source, target, options = CONVERSIONS[name]
    if "adapter" in options:
        options = {**options, "adapter": sources / options["adapter"]}
    alone = convert(sources / source, tmp_path / "alone" / target, **options)
    each = {rank: {"jobs": 1 + rank % 3} for rank in range(ranks)}
    found = in_threads(sources / source, tmp_path / "many" / target, ranks, each=each, **options)

    reports = [one for one in found if isinstance(one, ConversionReport)]
    assert len(reports) == ranks, found
    alone_tree, many_tree = (
        {
            file: data.replace(b"/many/", b"/alone/") if file == "params.json" else data
            for file, data in tree(tmp_path / place / target).items()
        }
        for place in ("alone", "many")
    )
    assert many_tree == alone_tree
    assert [path.name for path in (tmp_path / "many").iterdir()] == [target]
    report = reports[0]
    assert sum(share.nbytes for share in report.shares) == report.target.nbytes
    assert sum(1 for share in report.shares if share.nbytes) > 1
    assert sum(report.moved.values()) == sum(alone.moved.values())
    assert replace(report, seconds=0.0) == replace(reports[-1], seconds=0.0)


@pytest.mark.parametrize("seed", range(24))
def test_ranges_written_apart_make_the_whole(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcpconv.engine.units.UNIT", 64 << 10)
    rng = random.Random(seed)
    outline, files = random_outline(rng)
    source = store(tmp_path / "source", files)
    target = tmp_path / "target"
    target.mkdir()
    pieces = cutting.cut(outline, border=512, smallest=rng.choice([512, 9000, 70000]), whole=False)
    for file in outline.files:
        os.close(OutDirectory(target).make(file.name, file.nbytes))
    shares = cutting.deal(pieces, range(len(pieces)), rng.randint(1, 4), reflinks=False)
    assert sorted(index for share in shares for index in share) == list(range(len(pieces)))
    made = os.open(target, os.O_RDONLY)
    rng.shuffle(order := list(shares))
    for share in order:
        for _, stints in cutting.steps(outline, pieces, share, nbytes=rng.choice([1, 100_000])):
            execute(
                outline,
                source=source,
                target=target,
                jobs=rng.randint(1, 3),
                budget=200 << 10,
                stints=stints,
                made=made,
            )
    os.close(made)
    for file in outline.files:
        assert (target / file.name).read_bytes() == slow_file(file, files), file.name


def test_pieces_cover_every_byte_once_and_meet_at_borders() -> None:
    for seed in range(24):
        rng = random.Random(seed)
        outline, _ = random_outline(rng)
        pieces = cutting.cut(outline, border=512, smallest=5000, whole=False)
        for number, file in enumerate(outline.files):
            own = [piece for piece in pieces if piece.file == number]
            assert own[0].start == 0
            assert own[-1].stop == file.nbytes
            assert all(one.stop == two.start for one, two in pairwise(own))
            assert all(piece.start % 512 == 0 for piece in own)
            assert all(piece.stop - piece.start >= 5000 for piece in own) or len(own) == 1
            payload = sum(fill.nbytes for _, fill in file.payloads)
            assert sum(piece.payload for piece in own) == payload
        assert {piece.file for piece in pieces} == set(range(len(outline.files)))


def test_unpacked_items_lie_elsewhere_in_every_process(tmp_path: Path) -> None:
    """Their times are those of the unpacking, and say nothing of the source."""
    pytest.importorskip("zstandard")
    extension = pytest.importorskip("torch.distributed.checkpoint._extension")  # torch 2.7
    writer = FileSystemWriter(tmp_path / "source", _extensions=[extension.ZStandard()])
    tensors = {"a": torch.randn(300, 70), "b": torch.randn(500)}
    save_alone(tensors, storage_writer=writer)
    convert(tmp_path / "source", tmp_path / "one.pth")
    started = [
        start(
            script(),
            *("convert", tmp_path / "source", tmp_path / "two.pth"),
            *("--rank", str(rank), "--of", "2"),
        )
        for rank in range(2)
    ]
    found = [(process.communicate()[1], process.returncode) for process in started]
    assert [code for _, code in found] == [0, 0], found
    assert (tmp_path / "two.pth").read_bytes() == (tmp_path / "one.pth").read_bytes()


def test_casts_of_all_ranks_are_counted_together(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.view(-1)[:: parameter.numel() // 5] = 1e6
    source = save_hf(model, tmp_path / "source")
    with pytest.raises(LossyCastError) as alone:
        convert(source, tmp_path / "out", form="dcp", dtype="fp16")
    found = in_threads(source, tmp_path / "out", 3, form="dcp", dtype="fp16")
    for error in found:
        assert isinstance(error, LossyCastError)
        assert str(error).split("rank")[0].rstrip() in str(alone.value)
        assert [fact for fact in error.facts if fact[0] == "overflow"] == list(alone.value.facts)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]

    allowed = {"form": "dcp", "dtype": "fp16", "allow": ("overflow",)}
    one = convert(source, tmp_path / "one", **allowed)  # type: ignore[arg-type]
    many = in_threads(source, tmp_path / "many", 3, **allowed)[0]
    assert isinstance(many, ConversionReport)
    assert many.lossy == one.lossy
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


def test_blocks_are_shared_as_in_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcpconv.engine.cutting.SMALLEST", 1 << 20)
    monkeypatch.setattr("dcpconv.engine.cutting.STEP", 1 << 21)
    with xfs(tmp_path / "disk") as disk:
        source = save_hf(tiny("llama", hidden_size=192, intermediate_size=640), disk / "source")
        one = convert(source, disk / "one", form="dcp")
        many = in_threads(source, disk / "many", 3, form="dcp")[0]
        assert isinstance(many, ConversionReport)
        assert sum(1 for share in many.shares if share.nbytes) == 3
        assert many.moved["reflinked"] > one.moved["reflinked"] // 2 > 0
        assert tree(disk / "many") == tree(disk / "one")


def test_a_result_without_bytes_to_share_needs_no_share() -> None:
    outline = Outline(())
    assert cutting.cut(outline, border=4096, smallest=4096, whole=False) == ()
    assert cutting.deal((), (), 3, reflinks=False) == ((), (), ())
