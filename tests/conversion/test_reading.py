"""Reading checkpoints safely: nothing runs, and what is refused is refused in one line that names the file."""

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ailurus_hf.conversion.reading.files import (
    file_sha256,
    read_safetensors,
    read_yaml,
    state_dict_of,
    strip_common_prefix,
)
from ailurus_hf.conversion.reading.sources import find_weights, license_of, read_json, read_tensors
from ailurus_hf.utils.errors import CheckpointError


class Payload:
    """Creates the folder PWNED when unpickled without care."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("PWNED",)


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("PWNED").exists()


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    return message


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_of_both_formats_load(zipped: bool) -> None:
    torch.save({"model": {"a": torch.ones(2)}}, "x.pth", _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_tensors(Path("x.pth"))["model"]["a"], torch.ones(2))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_torch_file_is_refused_by_name(zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not weaken the reader
    torch.save({"model": {"a": torch.ones(2)}, "other": Payload()}, "x.pth", _use_new_zipfile_serialization=zipped)
    message = refused(lambda: read_tensors(Path("x.pth")))
    assert "x.pth" in message
    assert "mkdir" in message


def test_bare_pickle_is_refused() -> None:
    Path("x.pth").write_bytes(pickle.dumps(Payload()))
    assert "x.pth is refused" in refused(lambda: read_tensors(Path("x.pth")))


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04", b"hello", b"\x00" * 1000, bytes(range(256)) * 16])
def test_files_that_are_no_checkpoint(content: bytes) -> None:
    Path("x.pth").write_bytes(content)
    assert "x.pth" in refused(lambda: read_tensors(Path("x.pth")))


def test_every_truncation_is_refused_or_harmless() -> None:
    torch.save({"model": {"a": torch.ones(50)}}, "x.pth")
    content = Path("x.pth").read_bytes()
    for length in range(0, len(content), 97):
        Path("x.pth").write_bytes(content[:length])
        assert "x.pth" in refused(lambda: read_tensors(Path("x.pth")))


def test_safetensors_load_and_never_fall_back_to_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(2)}, "x.safetensors")
    assert torch.equal(read_safetensors(Path("x.safetensors"))["a"], torch.ones(2))
    torch.save({"model": Payload()}, "y.safetensors")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load was called"))
    assert "y.safetensors" in refused(lambda: read_safetensors(Path("y.safetensors")))


def test_truncated_safetensors() -> None:
    save_file({"a": torch.ones(100)}, "x.safetensors")
    content = Path("x.safetensors").read_bytes()
    for length in (0, 4, 8, 20, len(content) - 1):
        Path("x.safetensors").write_bytes(content[:length])
        assert "x.safetensors" in refused(lambda: read_safetensors(Path("x.safetensors")))


def test_yaml_builds_plain_values_and_tuples() -> None:
    Path("v.yml").write_text("a: !!python/tuple\n- 1\n- !!python/tuple [2, 3]\nb: [x, null, 1.5, true]\n")
    assert read_yaml(Path("v.yml")) == {"a": (1, (2, 3)), "b": ["x", None, 1.5, True]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('a: !!python/object/apply:os.mkdir ["PWNED"]', "os.mkdir"),
        ('a: !!python/object/new:os.mkdir ["PWNED"]', "os.mkdir"),
        ("a: !!python/name:os.mkdir", "os.mkdir"),
        ("a: !!python/module:os", "python/module"),
        ('a: !!python/tuple [!!python/object/apply:os.mkdir ["PWNED"]]', "os.mkdir"),
        ("a: !!python/tuple {b: 1}", "tuple"),
        ("a: [1, 2", "not a readable YAML"),
        ("a: 2020-13-45", "not a readable YAML"),
        ("- 1\n- 2", "list"),
        ("", "NoneType"),
        ("a: " + "[" * 1500, "not a readable YAML"),
        ("a: '" + "x" * 1_000_001 + "'", "larger than"),
    ],
)
def test_yaml_refusals(text: str, said: str) -> None:
    Path("v.yml").write_text(text)
    message = refused(lambda: read_yaml(Path("v.yml")))
    assert "v.yml" in message
    assert said in message


@pytest.mark.parametrize(
    ("text", "said"),
    [("[1]", "must hold a JSON object, got list"), ("[" * 50_000, "not a readable JSON"), ("x" * 50_000_001, "larger")],
)
def test_json_refusals(text: str, said: str) -> None:
    Path("config.json").write_text(text)
    message = refused(lambda: read_json(Path("config.json")))
    assert "config.json" in message
    assert said in message


def test_a_source_that_is_neither_file_nor_folder() -> None:
    os.mkfifo("pipe")
    assert "neither a file nor a folder" in refused(lambda: find_weights("pipe"))


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\na: [\n---\n", None),
        ("x", None),
    ],
)
def test_licence_of_a_card(card: str, expected: str | None) -> None:
    assert license_of(Path()) is None
    Path("README.md").write_text(card)
    assert license_of(Path()) == expected


def test_yaml_that_is_not_text() -> None:
    Path("v.yml").write_bytes(b"\xff\xfe\x00\xd8")
    assert "v.yml" in refused(lambda: read_yaml(Path("v.yml")))


def test_counters_of_batch_norms_are_whole_numbers() -> None:
    tensors = {"bn.num_batches_tracked": torch.tensor(3)}
    assert state_dict_of({"model": tensors}, Path("x"), "model") == tensors


def test_state_dict_is_the_entry_or_the_whole() -> None:
    tensors = {"a": torch.ones(1)}
    assert state_dict_of({"model": tensors, "epoch": 1}, Path("x"), "model") == tensors
    assert state_dict_of(tensors, Path("x"), "model") == tensors


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([1, 2], "list"),
        (torch.ones(2), "Tensor"),
        ({}, "holds nothing"),
        ({"state": {"a": torch.ones(1)}, "epoch": 1}, "'state', 'epoch'"),
        ({"model": {}}, "no tensors"),
        ({"model": None}, "no tensors"),
        ({"model": {"a": 1}}, "a must be a tensor, got int"),
        ({"model": {1: torch.ones(1)}}, "names must be strings"),
        ({"model": {"a": torch.ones(1, dtype=torch.int64)}}, "floating-point"),
        ({"model": {"a": torch.ones(1, dtype=torch.int8)}}, "floating-point tensor, got torch.int8"),
        ({"model": {"a": torch.ones(1).to(torch.float8_e4m3fn)}}, "floating-point tensor, got torch.float8_e4m3fn"),
        ({"model": {"bn.num_batches_tracked": torch.ones(1, dtype=torch.bool)}}, "floating-point"),
        ({"model": {"a": torch.ones(2, 2).to_sparse()}}, "dense"),
        ({"model": {"a": torch.ones(1, device="meta")}}, "dense"),
    ],
)
def test_state_dict_refusals(data: Any, said: str) -> None:
    message = refused(lambda: state_dict_of(data, Path("x.pth"), "model"))
    assert "x.pth" in message
    assert said in message


def test_only_a_common_prefix_is_stripped() -> None:
    one, two = torch.ones(1), torch.ones(2)
    assert strip_common_prefix({"module.a": one, "module.b": two}) == {"a": one, "b": two}
    assert strip_common_prefix({"module.a": one, "b": two}) == {"module.a": one, "b": two}
    for prefix in ("_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "model.module.model."):
        assert strip_common_prefix({f"{prefix}a": one, f"{prefix}b.module.c": two}) == {"a": one, "b.module.c": two}
    assert strip_common_prefix({"module.model.a": one, "module.b": two}) == {"model.a": one, "b": two}
    assert strip_common_prefix({"modules.a": one}) == {"modules.a": one}
    assert strip_common_prefix({}) == {}


def test_sha256() -> None:
    Path("x").write_bytes(b"abc")
    assert file_sha256(Path("x")) == hashlib.sha256(b"abc").hexdigest()
