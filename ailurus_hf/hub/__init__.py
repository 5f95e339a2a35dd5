"""Sharing: checkpoints that bring their code, and model cards."""

from .model_card import CardResult, CardSource, build_model_card
from .remote_code import save_with_code

__all__ = ["CardResult", "CardSource", "build_model_card", "save_with_code"]
