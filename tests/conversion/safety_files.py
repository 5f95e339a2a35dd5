"""Unsafe and broken checkpoints in the official Segmenter layout, one function each.

Whoever runs what they hold creates a file or folder PWNED in the current directory.
"""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.conversion.segmenter_files import segmenter_tensors, segmenter_variant, write_segmenter

VARIANT = segmenter_variant()
CODE = "import os\nos.mkdir('PWNED')\n"


class Payload:
    """Calls `function` when unpickled without care."""

    def __init__(self, function: Callable[..., Any] = os.mkdir, *arguments: Any):
        self.function, self.arguments = function, arguments or ("PWNED",)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.arguments


def write_program(path: Path, opcodes: bytes) -> None:
    """A file of torch's zip format around this pickle program."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", opcodes)
        archive.writestr("x/version", "3\n")


def _beside(value: Any, old_format: bool = False) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        content = {"model": segmenter_tensors(VARIANT), "optimizer": value}
        torch.save(content, folder / "checkpoint.pth", _use_new_zipfile_serialization=not old_format)

    return write


def _instead(content: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save(content, folder / "checkpoint.pth")


def _program(opcodes: bytes) -> Callable[[Path], None]:
    return lambda folder: write_program(folder / "checkpoint.pth", opcodes)


def _tensors(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    """The good checkpoint with tensors (dots as double underscores) replaced or left out."""

    def write(folder: Path) -> None:
        named = {name.replace("__", "."): tensor for name, tensor in changes.items()}
        tensors = segmenter_tensors(VARIANT) | named
        torch.save({"model": {k: v for k, v in tensors.items() if v is not None}}, folder / "checkpoint.pth")

    return write


def _yaml(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        with (folder / "variant.yml").open("a") as file:
            file.write(text)

    return write


def _bare_pickle(folder: Path) -> None:
    (folder / "checkpoint.pth").write_bytes(pickle.dumps(Payload()))


def _pickle_named_safetensors(folder: Path) -> None:
    (folder / "checkpoint.pth").unlink()
    torch.save({"model": Payload()}, folder / "model.safetensors")


def _mmseg_config(folder: Path) -> None:
    torch.save({"meta": {"config": CODE}, "state_dict": segmenter_tensors(VARIANT)}, folder / "checkpoint.pth")
    (folder / "config.py").write_text(CODE)


def _truncated(folder: Path) -> None:
    content = (folder / "checkpoint.pth").read_bytes()
    (folder / "checkpoint.pth").write_bytes(content[: len(content) // 2])


BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))

# what changes the good checkpoint, and what the refusal must say
MALICIOUS: dict[str, tuple[Callable[[Path], None], str]] = {
    "os.mkdir beside the weights": (_beside(Payload()), "mkdir', which may run code"),
    "os.system beside the weights": (_beside(Payload(os.system, "mkdir PWNED")), "system', which may run code"),
    "open": (_beside(Payload(open, "PWNED", "w")), "open', which may run code"),
    "eval": (_beside(Payload(eval, "__import__('os').mkdir('PWNED')")), "eval', which may run code"),
    "exec in the old format": (_beside(Payload(exec, CODE), old_format=True), "exec', which may run code"),
    "nested": (_beside([{"state": ({"a": Payload()},)}]), "mkdir', which may run code"),
    "among the tensors": (_instead({"model": {**segmenter_tensors(VARIANT), "x": Payload()}}), "mkdir', which may"),
    "bare pickle": (_bare_pickle, "checkpoint.pth is refused"),
    "INST opcode": (_program(b"(X\x05\x00\x00\x00PWNEDios\nmkdir\n."), "checkpoint.pth is refused"),
    "OBJ opcode": (_program(b"(cos\nmkdir\nX\x05\x00\x00\x00PWNEDo."), "mkdir', which may run code"),
    "getattr": (_program(b"cbuiltins\ngetattr\ncos\nX\x05\x00\x00\x00mkdir\x86R."), "getattr', which may run code"),
    "pickle named safetensors": (_pickle_named_safetensors, "it is not tried as a pickle"),
    "Python config": (_mmseg_config, "no entry 'model' with the weights; it holds 'meta', 'state_dict'"),
    "yaml apply": (_yaml('x: !!python/object/apply:os.mkdir ["PWNED"]\n'), "python/object/apply:os.mkdir"),
    "yaml new": (_yaml('x: !!python/object/new:os.mkdir ["PWNED"]\n'), "python/object/new:os.mkdir"),
    "yaml in a tuple": (_yaml('x: !!python/tuple [!!python/object/apply:os.mkdir ["PWNED"]]\n'), "os.mkdir"),
    "yaml bomb": (_yaml(BOMB), "variant.yml is refused: it holds more than"),
}
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing key": (_tensors(encoder__blocks__1__attn__qkv__bias=None), "missing key in the checkpoint: encoder.blo"),
    "unexpected key": (_tensors(encoder__blocks__3__norm1__weight=torch.ones(64)), "unexpected key in the checkpoint"),
    "short position table": (_tensors(encoder__pos_embed=torch.ones(1, 12, 64)), "wrong shape of encoder.pos_embed"),
    "too many classes": (_tensors(decoder__head__weight=torch.ones(6, 64)), "wrong shape of decoder.head.weight"),
    "transposed": (_tensors(encoder__blocks__0__mlp__fc1__weight=torch.ones(64, 256)), "wrong shape of encoder.blocks"),
    "no entry": (_instead({"state": segmenter_tensors(VARIANT), "epoch": 1}), "it holds 'state', 'epoch'"),
    "no dictionary": (_instead([1, 2]), "holds a list"),
    "truncated": (_truncated, "damaged or cut short"),
}
CONVERTS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "control": dict,
    "common prefix": lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
    "half precision": lambda tensors: {name: tensor.half() for name, tensor in tensors.items()},
    "NaN": lambda tensors: tensors | {"encoder.norm.weight": tensors["encoder.norm.weight"] * torch.nan},
}


def write_unsafe(folder: Path, name: str) -> Path:
    """Write a case of `MALICIOUS` or `BROKEN`; return the folder."""
    write_segmenter(folder, VARIANT)
    (MALICIOUS | BROKEN)[name][0](folder)
    return folder


def write_broken_safetensors(folder: Path) -> dict[str, Path]:
    """Five files that are no whole safetensors file, by what is wrong with them."""
    folder.mkdir()
    save_file({"a": torch.ones(100)}, folder / "good.safetensors")
    content = (folder / "good.safetensors").read_bytes()
    shutil.rmtree(folder)
    folder.mkdir()
    header = json.dumps({"a": {"dtype": "F32", "shape": [100], "data_offsets": [0, 4000]}}).encode()
    broken = {
        "empty": b"",
        "huge_header_length": (2**62).to_bytes(8, "little") + content[8:],
        "truncated_header": content[:20],
        "truncated_data": content[:-1],
        "offsets_out_of_range": len(header).to_bytes(8, "little") + header + bytes(400),
    }
    for name, written in broken.items():
        (folder / f"{name}.safetensors").write_bytes(written)
    return {name: folder / f"{name}.safetensors" for name in broken}
