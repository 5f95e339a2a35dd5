"""Which files of a checkpoint folder this package writes."""

import re
from pathlib import Path

from .. import modeling
from ..registry import ARCHITECTURES
from ..utils.files import read_json_object

__all__ = ["is_model_file"]

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_CODE = {file.name for file in Path(str(modeling.__file__)).parent.glob("*.py")}


def is_model_file(path: Path) -> bool:
    """Whether `path` is a file that saving or converting a model of this package writes: weights, the configuration of
    such a model, an image processor's, the modelling code, a model card."""
    if not path.is_file():
        return False
    if path.name == "config.json":
        try:
            return str(read_json_object(path, "a model_type").get("model_type")) in ARCHITECTURES
        except ValueError:
            return False
    if path.name == "README.md":
        return b"ailurus" in path.read_bytes().lower()
    known = path.name == "preprocessor_config.json" or path.name in _CODE
    return known or _WEIGHTS.fullmatch(path.name) is not None
