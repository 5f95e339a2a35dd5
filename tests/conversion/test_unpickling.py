"""Reading tensors beside arbitrary objects: the tensors are exact, the objects do nothing."""

import builtins
import contextlib
import io
import os
import pickle
import tracemalloc
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ailurus_hf.conversion import CheckpointError
from ailurus_hf.conversion.reading.sources import read_tensors
from ailurus_hf.conversion.reading.unpickling import Placeholder, _Tensor, read_tensors_from_pickle
from tests.conversion.safety_files import Payload, write_program


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("PWNED").exists()


def save_pickle(opcodes: bytes) -> Path:
    write_program(Path("x.pth"), opcodes)
    return Path("x.pth")


def test_tensors_are_exact_and_shared_memory_is_kept() -> None:
    base = torch.randn(4, 6)
    tensors = {
        "plain": base,
        "view": base[1:, ::2].T,
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "half": torch.randn(3).half(),
        "brain": torch.randn(3).bfloat16(),
        "long": torch.arange(5),
        "bool": torch.tensor([True, False]),
    }
    parameter = torch.nn.Parameter(torch.ones(2))
    torch.save({"model": OrderedDict(tensors), "parameter": parameter, "args": Namespace(a=1)}, "x.pth")
    content = read_tensors_from_pickle(Path("x.pth"))
    for name, tensor in tensors.items():
        assert torch.equal(content["model"][name], tensor)
        assert content["model"][name].dtype == tensor.dtype
    assert torch.equal(content["parameter"], torch.ones(2))
    assert isinstance(content["args"], Placeholder)


@pytest.mark.parametrize(
    "harmful",
    [
        Payload(),
        Payload(os.system, "mkdir PWNED"),
        Payload(builtins.exec, "import os; os.mkdir('PWNED')"),
        Payload(builtins.eval, "__import__('os').mkdir('PWNED')"),
        Payload(io.open, "PWNED", "w"),
        Payload(getattr, "x", "upper"),
        [Payload(), {"a": Payload()}],
    ],
)
def test_objects_do_nothing(harmful: Any) -> None:
    torch.save({"model": {"a": torch.ones(2)}, "other": harmful, "log": np.arange(3)}, "x.pth")
    content = read_tensors(Path("x.pth"), objects=True)
    assert torch.equal(content["model"]["a"], torch.ones(2))
    with pytest.raises(CheckpointError, match="is refused"):
        read_tensors(Path("x.pth"))


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cos\nmkdir\nX\x05\x00\x00\x00PWNED\x85R.",  # call a function
        b"(X\x05\x00\x00\x00PWNEDios\nmkdir\n.",  # INST
        b"(cos\nmkdir\nX\x05\x00\x00\x00PWNEDo.",  # OBJ
        b"cbuiltins\ngetattr\ncos\nX\x05\x00\x00\x00mkdir\x86R(X\x05\x00\x00\x00PWNEDtR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__cos\nmkdir\nsb.",  # set attributes of a function
        b"cos\nmkdir\n)\x81}X\x01\x00\x00\x00aK\x01sb.",  # NEWOBJ, then BUILD
        b"\x82\x01.",  # a number of the extension registry
    ],
)
def test_pickle_programs_do_nothing(opcodes: bytes) -> None:
    try:
        content = read_tensors_from_pickle(save_pickle(opcodes))
    except Exception:  # refused: as good
        return
    assert isinstance(content, Placeholder) or content is Placeholder


@pytest.mark.parametrize(
    "opcodes",
    [
        b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"x.",  # a text of 2**60 bytes
        b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"N.",  # a frame of as many
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # memory slot 2**31, for which C's pickle reserves 32 GB
        b"(" * 10_000 + b"t" * 10_000 + b".",  # tuples in tuples
    ],
)
def test_memory_is_what_the_file_holds_not_what_it_announces(opcodes: bytes) -> None:
    tracemalloc.start()
    with contextlib.suppress(CheckpointError):  # "holds a NoneType, expected a dictionary"
        read_tensors(save_pickle(opcodes), objects=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((5,), (1,), 0), ((2,), (4,), 0), ((1,), (1,), 4), ((2,), (-1,), 1), ((1.5,), (1,), 0)],
)
def test_tensors_stay_inside_their_memory(size: Any, stride: Any, offset: int) -> None:
    with pytest.raises(ValueError, match="tensor"):
        _Tensor()(torch.ones(4), offset, size, stride, False, {})


def test_damage_and_other_formats_are_refused_in_one_line() -> None:
    torch.save({"a": torch.ones(50), "b": Payload()}, "x.pth")
    content = Path("x.pth").read_bytes()
    for length in range(0, len(content), 97):
        Path("x.pth").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"x\.pth") as caught:
            read_tensors(Path("x.pth"), objects=True)
        assert "\n" not in str(caught.value)
    for written in (pickle.dumps(Payload()), b"hello"):
        Path("x.pth").write_bytes(written)
        with pytest.raises(CheckpointError, match=r"x\.pth"):
            read_tensors(Path("x.pth"), objects=True)


def test_compressed_archives_are_refused() -> None:
    """They could claim any amount of memory; torch writes none."""
    with zipfile.ZipFile("x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, protocol=2))
    with pytest.raises(ValueError, match="compressed"):
        read_tensors_from_pickle(Path("x.pth"))


def test_never_for_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"model": Payload()}, "x.safetensors")
    monkeypatch.setattr(torch, "load", lambda *arguments, **settings: pytest.fail("torch.load was called"))
    with pytest.raises(CheckpointError, match="not tried as a pickle"):
        read_tensors(Path("x.safetensors"), objects=True)
