"""Tensors out of checkpoints that `torch.load(weights_only=True)` refuses, without running anything in them.

mmengine's checkpoints keep training logs beside the weights, whose pickles name classes of other packages and
`builtins.getattr`. Here every name that is not needed to rebuild a tensor becomes a placeholder that ignores whatever
is done to it, so nothing outside PyTorch's own tensor builder is ever called.
"""

import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .reading import CheckpointError

__all__ = ["read_torch_file_inertly"]

_BUILDERS = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("collections", "OrderedDict"),
}


class _Placeholder:
    """Stands for any object of a foreign class, and for foreign classes and functions themselves."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Placeholder":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> "_Placeholder":
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) in _BUILDERS:
            return super().find_class(module_name, global_name)
        return _Placeholder


def read_torch_file_inertly(path: Path) -> Any:
    """Read a `torch.save` file in the zip format on the CPU, placeholders for all but tensors and containers.

    Raises:
        CheckpointError: the file is damaged, in PyTorch's old format, or a TorchScript archive.
    """
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is refused: it holds more than tensors, in PyTorch's old format")
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("constants.pkl") for name in archive.namelist()):
            raise CheckpointError(f"{path} is refused: it is a TorchScript archive, which holds code")
    reader: Any = SimpleNamespace(__name__="inert_pickle", Unpickler=_InertUnpickler)
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader)
    except Exception as error:  # damaged archives raise whatever their bytes happen to spell
        raise CheckpointError(f"{path} is damaged or cut short: it cannot be read as a PyTorch checkpoint") from error
