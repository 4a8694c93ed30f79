"""Checkpoints in a bucket: read by ranges, written in parts, and what is told."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dcpconv import CheckpointReader, check, convert, fingerprint, load_init_weights
from dcpconv.cli.app import app
from dcpconv.core.errors import FormatError, SourceChangedError
from dcpconv.engine.manifests import MANIFEST
from dcpconv.formats.opening import open_checkpoint
from dcpconv.stores.schemes import path_of
from dcpconv.stores.store import StoreError
from support.checkpoints.adapters import factors, peft_tensors, save_peft
from support.checkpoints.check_cases import write_hf
from support.machine.fault_proxy import spoiling
from support.machine.s3_server import BUCKET, Bucket, point_to
from support.versions import load_alone, save_alone

MIB = 1 << 20


def files(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


FORMS: dict[str, dict[str, Any]] = {
    "dcp": {"to": "lingua", "chunks": 2},
    "hf": {"form": "hf", "max_file_size": MIB},
    "one": {"form": "hf"},
    "out.pth": {"to": "lingua"},
}


@pytest.mark.parametrize("name", FORMS)
def test_a_result_has_the_bytes_that_it_has_on_a_disk(
    name: str, bucket: Bucket, model: Path, tmp_path: Path
) -> None:
    """From a disk into a bucket, from there to a disk, and from bucket to bucket."""
    here = tmp_path / "here" / name
    convert(model, here, **FORMS[name])
    afar = bucket.upload(model, "model")
    convert(model, f"s3://{BUCKET}/a/{name}", **FORMS[name])
    convert(afar, f"s3://{BUCKET}/b/{name}", **FORMS[name])
    convert(afar, tmp_path / "c" / name, **FORMS[name])
    assert bucket.contents(f"a/{name}") == files(here)
    assert bucket.contents(f"b/{name}") == files(here)
    assert files(tmp_path / "c" / name) == files(here)
    assert not bucket.unfinished()


@pytest.mark.parametrize("name", FORMS)
def test_the_fingerprint_of_a_result_is_taken_on_its_way_into_a_bucket(
    name: str, bucket: Bucket, model: Path
) -> None:
    report = convert(model, f"s3://{BUCKET}/a/{name}", fingerprint=True, **FORMS[name])
    assert report.fingerprint == fingerprint(model).digest
    assert report.fingerprint_nbytes == 0
    beside = f"out.pth.{MANIFEST}"
    manifest = "a" if name == "out.pth" else f"a/{name}"
    stated = bucket.contents(manifest)[beside if name == "out.pth" else MANIFEST]
    assert json.loads(stated)["fingerprint"] == report.fingerprint


def test_the_manifest_of_a_file_goes_with_it(bucket: Bucket, model: Path) -> None:
    target = f"s3://{BUCKET}/a/out.pth"
    convert(model, target, fingerprint=True)
    convert(model, target, overwrite=True, dtype="bf16")
    assert [*bucket.contents("a")] == ["out.pth"]
    report = convert(model, target, overwrite=True, fingerprint=True)
    stated = json.loads(bucket.contents("a")[f"out.pth.{MANIFEST}"])
    assert stated["fingerprint"] == report.fingerprint == fingerprint(model).digest


def test_what_is_read_back_from_a_bucket_comes_too_late_for_a_manifest(
    bucket: Bucket, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dcpconv.engine.passing.ROOM", 0)
    report = convert(model, f"s3://{BUCKET}/a", to="lingua", fingerprint=True)
    assert report.fingerprint == fingerprint(model).digest
    assert report.fingerprint_nbytes > 0
    assert MANIFEST not in bucket.contents("a")
    assert any("too late for a manifest" in note for note in report.notes)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read_where_it_is(
    name: str, bucket: Bucket, model: Path, tmp_path: Path
) -> None:
    here = tmp_path / "here" / name
    convert(model, here, **FORMS[name])
    afar = bucket.upload(here, f"x/{name}")
    there, local = open_checkpoint(afar), open_checkpoint(here)
    assert there.tensors == local.tensors
    assert there.files == local.files
    assert check(afar, against=model)
    convert(afar, tmp_path / "back", form="dcp", to="stored")
    convert(here, tmp_path / "stored", form="dcp", to="stored")
    assert files(tmp_path / "back") == files(tmp_path / "stored")


def test_what_torch_wrote_is_read_by_a_few_requests(
    bucket: Bucket,
    tensors: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """48 tensors: headers cost 2 requests of a zip, one for each kind of item of a DCP."""
    state = {"model": tensors, "step": 7}
    torch.save(state, tmp_path / "state.pth")
    save_alone(state, checkpoint_id=tmp_path / "dcp")
    names = [bucket.upload(tmp_path / name, name) for name in ("state.pth", "dcp")]
    kinds = len({value.shape for value in tensors.values()}) + 1
    for name, most in zip(names, (3, 1 + kinds), strict=True):
        with spoiling(bucket.url) as proxy:
            point_to(proxy.url, monkeypatch)
            catalog = open_checkpoint(name)
            assert len(proxy.gets(of=f"/{name.rpartition('/')[2]}")) <= most
            assert catalog.tensors == open_checkpoint(tmp_path / name.rpartition("/")[2]).tensors


def test_a_bucket_is_asked_for_no_more_ranges_than_the_plan_has(
    bucket: Bucket, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 tensors that lie side by side are one range, and so is a header."""
    afar = bucket.upload(model, "model")
    with spoiling(bucket.url) as proxy:
        point_to(proxy.url, monkeypatch)
        convert(afar, tmp_path / "out", to="lingua")
        assert len(proxy.gets(of="/model/model.safetensors")) == 2
        assert len(proxy.asked) <= 6


@pytest.mark.parametrize(("files_of_it", "most"), [(1, 1), (5, 6)])
def test_a_check_takes_two_round_trips_and_one_for_each_file(
    files_of_it: int, most: int, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {f"layers.{n}.weight": (3, 5) for n in range(300)}
    afar = bucket.upload(write_hf(tmp_path / "x", shapes, files=files_of_it, config=None), "x")
    with spoiling(bucket.url) as proxy:
        point_to(proxy.url, monkeypatch)
        assert check(afar)
        assert len([one for one in proxy.asked if "list-type" in one.path]) == 1
        assert len([one for one in proxy.asked if one.range]) == most


def test_a_live_model_is_filled_from_a_bucket(
    bucket: Bucket, model: Path, tensors: dict[str, torch.Tensor]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    afar = bucket.upload(model, "model")
    live = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).bfloat16()
    report = load_init_weights(live, afar)
    assert report.source == afar
    state = live.state_dict()
    assert all(torch.equal(state[key], value) for key, value in tensors.items())


@pytest.mark.parametrize("form", ["dcp", "state.pth"])
def test_a_reader_gives_tensors_and_objects_from_a_bucket(
    form: str, bucket: Bucket, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    state = {"model": tensors, "step": 7, "opt": {"lr": 0.5}}
    torch.save(state, tmp_path / "state.pth")
    save_alone(state, checkpoint_id=tmp_path / "dcp")
    afar = bucket.upload(tmp_path / form, form)
    found: dict[str, Any] = {
        "model": {key: torch.zeros_like(value) for key, value in tensors.items()},
        "step": 0,
        "opt": {"lr": 0.0},
    }
    load_alone(found, storage_reader=CheckpointReader(afar))
    assert (found["step"], found["opt"]["lr"]) == (7, 0.5)
    assert all(torch.equal(found["model"][key], value) for key, value in tensors.items())


def test_an_adapter_and_its_base_may_be_in_buckets(
    bucket: Bucket, model: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    adapter = save_peft(tmp_path / "adapter", peft_tensors(factors(tensors, ["o_proj"])))
    base, change = bucket.upload(model, "model"), bucket.upload(adapter, "adapter")
    expected = tmp_path / "expected"
    convert(model, expected, form="hf", adapter=adapter)
    pairs: list[tuple[str | Path, str | Path]] = [(base, change), (model, change), (base, adapter)]
    for number, (one, other) in enumerate(pairs):
        convert(one, tmp_path / f"out{number}", form="hf", adapter=other)
        assert files(tmp_path / f"out{number}") == files(expected)


def test_a_changed_object_is_an_error(bucket: Bucket, model: Path, tmp_path: Path) -> None:
    source = path_of(bucket.upload(model, "model"))
    open_checkpoint(source)
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    key = "model/model.safetensors"
    bucket.client.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))
    with pytest.raises(SourceChangedError, match="another object has its name"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_item_that_is_unlike_the_others_is_told_when_it_is_read(
    bucket: Bucket, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Of many items of a kind one is looked at when a DCP is opened."""
    save_alone(tensors, checkpoint_id=tmp_path / "dcp")
    local = open_checkpoint(tmp_path / "dcp")
    file = next((tmp_path / "dcp").glob("*.distcp"))
    last = max(
        (e.chunks[0].extent for k, e in local.tensors.items() if k.endswith("o_proj.weight")),
        key=lambda extent: extent.offset,
    )
    data = bytearray(file.read_bytes())
    data[last.offset - 200] ^= 0xFF
    file.write_bytes(data)
    afar = bucket.upload(tmp_path / "dcp", "dcp")
    assert open_checkpoint(afar).tensors == local.tensors
    with pytest.raises(FormatError, match="does not begin as others"):
        convert(afar, tmp_path / "out", form="torch", to="stored")


PLAIN = [
    pytest.param("404 NoSuchBucket", "there is no such bucket", id="bucket"),
    pytest.param("403 AccessDenied", "access was denied", id="denied"),
    pytest.param("403 InvalidAccessKeyId", "access was denied", id="key"),
    pytest.param("301 PermanentRedirect", "in another region", id="region"),
]


@pytest.mark.parametrize(("answer", "words"), PLAIN)
def test_what_is_wrong_is_said_in_plain_words(
    answer: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            del format, args

        def do_GET(self) -> None:
            status, _, code = answer.partition(" ")
            body = f"<Error><Code>{code}</Code><Message>secret-of-the-tests</Message></Error>"
            self.send_response(int(status))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

    pytest.importorskip("obstore")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        point_to(f"http://127.0.0.1:{server.server_address[1]}", monkeypatch)
        with pytest.raises(StoreError, match=words) as caught:
            check("s3://other/model")
    finally:
        server.shutdown()
        server.server_close()
    assert "s3://other/model" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_server_that_never_answers_is_one_error_with_what_was_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setattr("dcpconv.stores.fetching._FIRST_PAUSE", 0.001)
    point_to("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(StoreError) as caught:
        check("s3://bucket/model")
    labels = [label for label, _ in caught.value.facts]
    assert labels == ["object", "expected", "tried", "answer"]


def test_runs_in_a_bucket_are_listed_resolved_and_verified(bucket: Bucket, model: Path) -> None:
    (model / "trainer_state.json").write_text(json.dumps({"global_step": 500}))
    bucket.upload(model, "run/checkpoint-500")
    (model / "trainer_state.json").unlink()
    bucket.upload(model, "run/checkpoint-1000")
    run = f"s3://{BUCKET}/run"

    def ask(*words: str) -> tuple[int, str]:
        found = CliRunner().invoke(app, ["runs", *words])
        return found.exit_code, found.stdout

    code, text = ask("list", run)
    assert code == 0
    assert f"{run}/checkpoint-500" in text
    assert "no trainer_state.json" in text
    assert ask("latest", run) == (0, f"{run}/checkpoint-500\n")
    assert ask("resolve", run, "500")[1] == f"{run}/checkpoint-500\n"
    assert ask("verify", run)[0] == 1
    assert ask("prune", run, "--keep-last", "1")[0] == 2
