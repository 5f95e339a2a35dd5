"""Tensors out of `torch.save` files that hold more than tensors, without running any of it.

Training checkpoints carry their arguments, logs and optimiser state as pickled objects, which
`torch.load(weights_only=True)` refuses. Here every name that a pickle asks for, except those a tensor is made of,
becomes a placeholder that swallows whatever is done to it: nothing is imported, nothing is called.

The pickle machine is Python's own, in its pure Python form: the C one reserves memory as the file tells it to.
"""

import pickle
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

__all__ = ["Placeholder", "read_tensors_from_pickle"]

_MAX_PICKLE_BYTES = 200_000_000
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Placeholder:
    """Stands for any object or function of the pickle; creating, calling and filling it do nothing."""

    # A pickle creates objects by calling the class, or __new__ alone (NEWOBJ); both take whatever arguments it has.
    def __new__(cls, *args: Any, **kwargs: Any) -> "Placeholder":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "Placeholder":
        return self

    # Without it, BUILD would write the pickle's state into __dict__, over the methods of this class.
    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def _ignore(self, *args: Any) -> None:
        pass

    append = extend = add = update = _ignore  # what the opcodes for lists, sets and dictionaries call


class _Dictionary(dict[Any, Any]):
    """What `OrderedDict` becomes: a dictionary whose attributes a pickle cannot set."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Storage(Placeholder):
    """What `torch.FloatStorage` and its like become: a dtype."""

    def __new__(cls, dtype: torch.dtype) -> "_Storage":
        return object.__new__(cls)

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype


class _Tensor(Placeholder):
    """What `torch._utils._rebuild_tensor_v2` becomes: a bounds-checked view of a storage."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        storage, offset, size, stride = args[:4]
        numbers = (offset, *size, *stride)
        if not all(type(number) is int and number >= 0 for number in numbers) or len(size) != len(stride):
            raise ValueError("a tensor's shape is not made of numbers")
        # as_strided checks the bounds of the storage, which may be larger than what this tensor was given of the file
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if not isinstance(storage, torch.Tensor) or (0 not in size and last >= len(storage)):
            raise ValueError("a tensor is larger than the memory stored for it")
        return storage.as_strided(size, stride, offset)


class _Parameter(Placeholder):
    """What `torch._utils._rebuild_parameter` becomes: the tensor alone, without gradient or hooks."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0]


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dictionary,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor(),
    ("torch._utils", "_rebuild_parameter"): _Parameter(),
    **{("torch", name): _Storage(dtype) for name, dtype in _STORAGES.items()},
}


class _InertUnpickler(pickle._Unpickler):
    def __init__(self, archive: zipfile.ZipFile, folder: str, content: bytes):
        super().__init__(BytesIO(content), encoding="utf-8")
        self._archive, self._folder = archive, folder
        self._storages: dict[str, torch.Tensor] = {}

    # The one door to code. Only names that stand for data get through, and none of them is looked up in a module.
    def find_class(self, module: str, name: str) -> Any:
        return _KNOWN.get((module, name), Placeholder)

    def get_extension(self, code: int) -> None:
        # copyreg has classes under numbers, and a cache of them that find_class does not see
        self.append(Placeholder)  # type: ignore[attr-defined]  # set by load()

    def persistent_load(self, identity: Any) -> Any:
        """The memory of a tensor, (numel,): `("storage", type, file name, device, numel)` names it."""
        kind, storage, key, _, numel = identity
        if kind != "storage" or not isinstance(storage, _Storage) or type(key) is not str or type(numel) is not int:
            return Placeholder()
        if key not in self._storages:  # tensors that shared memory share it again
            content = _read_member(self._archive, f"{self._folder}/data/{key}")
            # numel is the pickle's word; frombuffer would take it, and -1 means "all there is"
            if numel < 0 or len(content) < numel * storage.dtype.itemsize:
                raise ValueError("a tensor's memory is shorter than it should be")
            # frombuffer refuses empty buffers
            whole = torch.frombuffer(content, dtype=storage.dtype, count=numel) if numel else torch.empty(0)
            self._storages[key] = whole.to(storage.dtype)
        return self._storages[key]


def read_tensors_from_pickle(path: Path) -> Any:
    """Read a `torch.save` file of the zip format: tensors and plain containers are real, all else is `Placeholder`.

    Raises:
        ValueError, KeyError, IndexError, TypeError, OSError, zipfile.BadZipFile, ...: the file is damaged or none.
    """
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = name.removesuffix("/data.pkl")
        if f"{folder}/byteorder" in archive.namelist():
            order = _read_member(archive, f"{folder}/byteorder").decode("ascii")
            if order != sys.byteorder:
                raise ValueError(f"the file's byte order is {order}, this machine's {sys.byteorder}")
        if archive.getinfo(name).file_size > _MAX_PICKLE_BYTES:
            raise ValueError(f"its pickle is larger than {_MAX_PICKLE_BYTES} bytes")
        return _InertUnpickler(archive, folder, bytes(_read_member(archive, name))).load()


def _read_member(archive: zipfile.ZipFile, name: str) -> bytearray:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:  # torch compresses nothing; this bounds the memory
        raise ValueError(f"{name} is compressed")
    return bytearray(archive.read(name))
