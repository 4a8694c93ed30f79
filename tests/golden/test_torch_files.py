"""Files that the real torch.save wrote, read by us; files that we outline, read by the real torch.

The bytes are made by the installed torch while the test runs, so they are always those of the
version in use.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from dcpconv.core.errors import FormatError
from dcpconv.core.outline import OutFile
from dcpconv.formats.torchfile.files import is_torch_file, outline, read_catalog
from support.checkpoints.torch_files import (
    DTYPES,
    assemble,
    make_tensor,
    out_tensor,
    payload_of,
    stored_elements,
)

SHAPES = [
    pytest.param((), id="0-d"),
    pytest.param((7,), id="vector"),
    pytest.param((3, 5), id="weight"),
    pytest.param((2, 0, 3), id="empty"),
]


def training_checkpoint() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "scaler": {},
        "wandb_id": None,
        "history": [1.5, [2, "x"], ("t", 1)],
        "extra": [torch.ones(2), {"a": torch.zeros(1), "b": 1}],
    }


def tied_model() -> dict[str, Any]:
    embed = nn.Embedding(11, 6)
    head = nn.Linear(6, 11, bias=False)
    head.weight = embed.weight
    return nn.ModuleDict({"embed": embed, "norm": nn.LayerNorm(6), "head": head}).state_dict()


def views_of_one_storage() -> dict[str, torch.Tensor]:
    base = torch.arange(60, dtype=torch.float32)
    square = base.reshape(6, 10)
    return {
        "whole": base,
        "middle": base[7:20],
        "transposed": square.t(),
        "strided": square[1:5:2, ::3],
        "expanded": base[3:4].expand(4, 5),
        "column": square[:, 4],
        "permuted": base.reshape(3, 4, 5).permute(2, 0, 1),
    }


def parameters() -> dict[str, torch.Tensor]:
    weight = nn.Parameter(torch.randn(3, 4))
    marked = nn.Parameter(torch.randn(2, 2))
    marked.is_expert = True  # type: ignore[attr-defined]
    plain = torch.randn(5)
    plain.note = "x"  # type: ignore[attr-defined]
    frozen = nn.Parameter(torch.randn(3).to(torch.float8_e4m3fn), requires_grad=False)
    return {"weight": weight, "marked": marked, "plain": plain, "frozen": frozen}


def prefixed_names() -> dict[str, torch.Tensor]:
    return OrderedDict(
        [("module._orig_mod.a.weight", torch.ones(2)), ("module.b", torch.zeros(1, 3))]
    )


CASES: list[Any] = [
    pytest.param(training_checkpoint, id="training-checkpoint"),
    pytest.param(tied_model, id="tied-model"),
    pytest.param(views_of_one_storage, id="views"),
    pytest.param(parameters, id="parameters"),
    pytest.param(prefixed_names, id="prefixed"),
    pytest.param(dict, id="nothing"),
]


def saved_at(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


@pytest.mark.parametrize("make", CASES)
def test_catalog_is_what_torch_flattens_and_bytes_are_the_tensors(
    tmp_path: Path, make: Callable[[], dict[str, Any]]
) -> None:
    torch.manual_seed(0)
    value = make()
    path = saved_at(tmp_path / "checkpoint.pth", value)
    flat, mappings = flatten_state_dict(value)

    assert is_torch_file(path)
    catalog = read_catalog(path)

    assert (catalog.form, catalog.path, catalog.source) == ("torch", tmp_path, path)
    assert catalog.files == {"checkpoint.pth": path.stat().st_size}
    assert {key: catalog.path_of(key) for key in (*catalog.tensors, *catalog.objects)} == mappings
    assert list(catalog.tensors) == [k for k, v in flat.items() if isinstance(v, torch.Tensor)]
    for key, entry in catalog.tensors.items():
        expected = flat[key]
        assert isinstance(expected, torch.Tensor)
        stored = stored_elements(catalog, entry)
        assert stored.dtype is expected.dtype
        assert stored.shape == expected.shape
        assert payload_of(stored) == payload_of(expected), key
        assert (entry.chunks[0].strides is None) == expected.is_contiguous()
    objects = {key: leaf for key, leaf in flat.items() if not isinstance(leaf, torch.Tensor)}
    assert catalog.objects == objects


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_rank(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    tensor = make_tensor(DTYPES[name], shape)
    catalog = read_catalog(saved_at(tmp_path / "x.pt", {"w": tensor}))
    entry = catalog.tensors["w"]
    assert (entry.dtype.name, entry.shape) == (name, shape)
    assert payload_of(stored_elements(catalog, entry)) == payload_of(tensor)


def test_one_storage_region_under_two_keys_is_tied(tmp_path: Path) -> None:
    catalog = read_catalog(saved_at(tmp_path / "x.pth", tied_model()))
    assert catalog.tied == {"head.weight": "embed.weight"}
    views = read_catalog(saved_at(tmp_path / "y.pth", views_of_one_storage()))
    assert not views.tied


def test_a_tensor_of_part_of_a_storage_has_only_its_own_bytes(tmp_path: Path) -> None:
    catalog = read_catalog(saved_at(tmp_path / "x.pth", {"a": torch.arange(1000)[10:13]}))
    assert catalog.tensors["a"].chunks[0].extent.nbytes == 24


def test_a_tuple_that_hides_tensors_is_noted(tmp_path: Path) -> None:
    catalog = read_catalog(saved_at(tmp_path / "x.pth", {"a": (torch.ones(2), 1)}))
    assert not catalog.tensors
    assert "a is a tuple" in catalog.notes[0]


def test_torch_written_without_checksums_or_with_other_alignment(tmp_path: Path) -> None:
    weight = torch.arange(7.0)
    config: Any = torch.utils.serialization.config
    with config.patch({"save.storage_alignment": 4096}):
        aligned = read_catalog(saved_at(tmp_path / "a.pth", {"w": weight}))
    assert aligned.tensors["w"].chunks[0].extent.offset % 4096 == 0
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        plain = read_catalog(saved_at(tmp_path / "b.pth", {"w": weight}))
    finally:
        torch.serialization.set_crc32_options(compute_crc32=True)
    for catalog in (aligned, plain):
        assert payload_of(stored_elements(catalog, catalog.tensors["w"])) == payload_of(weight)


REFUSED = [
    pytest.param(lambda: torch.ones(2), "no mapping", id="bare-tensor"),
    pytest.param(lambda: [torch.ones(2)], "no mapping", id="list"),
    pytest.param(lambda: nn.Linear(2, 2), "nn.Module", id="module"),
    pytest.param(lambda: {"m": nn.Linear(2, 2)}, "nn.Module", id="module-inside"),
    pytest.param(lambda: {"w": torch.ones(2).to_sparse()}, "w is sparse", id="sparse"),
    pytest.param(lambda: {"w": torch.ones(2, device="meta")}, "w is meta", id="meta"),
    pytest.param(
        lambda: {"w": torch.ones(2, dtype=torch.cfloat).conj()}, "w is lazily", id="conjugate"
    ),
    pytest.param(
        lambda: {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
        "w is quantized",
        id="quantized",
    ),
    pytest.param(
        lambda: {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "twice", id="one-key-twice"
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_is_no_checkpoint_is_refused_by_name(
    tmp_path: Path, make: Callable[[], object], message: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to drop some of these kinds
        path = saved_at(tmp_path / "x.pth", make())
    with pytest.raises(FormatError) as caught:
        read_catalog(path)
    assert message in str(caught.value)
    assert "x.pth" in str(caught.value)


def test_the_form_before_zip_archives_is_named(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert is_torch_file(path)
    with pytest.raises(FormatError) as caught:
        read_catalog(path)
    assert "--engine torch" in (caught.value.hint or "")


def test_torchscript_is_named(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    buffer = torch.jit.script(nn.Linear(2, 2))
    torch.jit.save(buffer, path)
    with pytest.raises(FormatError):
        read_catalog(path)


def outlined(value: dict[str, Any], directory: Path) -> Path:
    """``value`` as our outline lays it out, payloads taken from its tensors."""
    flat, mappings = flatten_state_dict(value)
    tensors = {key: leaf for key, leaf in flat.items() if isinstance(leaf, torch.Tensor)}
    out = [
        out_tensor(mappings[key], tensor, source_offset=index * 1000 + 8)
        for index, (key, tensor) in enumerate(tensors.items())
    ]
    objects = {mappings[key]: leaf for key, leaf in flat.items() if key not in tensors}
    (file,) = outline(out, objects, filename="ours.pth").files
    _check_layout(file)
    by_fill = {id(tensor.chunks[0].fill): tensors[tensor.key] for tensor in out}
    return assemble(file, directory, lambda fill: payload_of(by_fill[id(fill)]))


def _check_layout(file: OutFile) -> None:
    runs = sorted(
        [
            *((offset, len(data)) for offset, data in file.literals),
            *((offset, fill.nbytes) for offset, fill in file.payloads),
        ]
    )
    ends = [offset + nbytes for offset, nbytes in runs]
    assert all(end <= start for end, (start, _) in zip(ends, runs[1:], strict=False))
    assert ends[-1] == file.nbytes


def _assert_same(ours: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert ours.dtype is expected.dtype
        assert ours.shape == expected.shape
        assert payload_of(ours) == payload_of(expected)
    elif isinstance(expected, dict):
        assert set(ours) == {str(key) for key, item in expected.items() if item != {}}
        for key in expected:
            if expected[key] != {}:
                _assert_same(ours[str(key)], expected[key])
    elif isinstance(expected, list):
        assert len(ours) == len(expected)
        for mine, theirs in zip(ours, expected, strict=True):
            _assert_same(mine, theirs)
    else:
        assert ours == expected
        assert type(ours) is type(expected)


@pytest.mark.parametrize("mapped", [True, False], ids=["mmap", "read"])
@pytest.mark.parametrize("make", CASES)
def test_torch_reads_what_we_outline(
    tmp_path: Path, make: Callable[[], dict[str, Any]], *, mapped: bool
) -> None:
    torch.manual_seed(0)
    value = make()
    path = outlined(value, tmp_path)
    _assert_same(torch.load(path, weights_only=True, mmap=mapped), value)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DTYPES)
def test_torch_reads_every_dtype_we_outline(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    value = {"w": make_tensor(DTYPES[name], shape), "v": make_tensor(DTYPES[name], (9,), seed=1)}
    path = outlined(value, tmp_path)
    for mapped in (True, False):
        _assert_same(torch.load(path, weights_only=True, mmap=mapped), value)
    catalog = read_catalog(path)
    for key, entry in catalog.tensors.items():
        assert payload_of(stored_elements(catalog, entry)) == payload_of(value[key])
