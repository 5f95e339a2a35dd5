"""Models of transformers made adaptive in place; see `apply.py`, and `families.py` for the encoders."""

from .apply import apply_ailurus, remove_ailurus, supported_families
from .families import FamilySpec
from .probing import probe

__all__ = ["FamilySpec", "apply_ailurus", "probe", "remove_ailurus", "supported_families"]
