"""Costs of a model: floating-point operations, and time compared side by side."""

from .flops import count_flops, keep_ratio_at
from .timing import SpeedUp, speed_up, time_side_by_side

__all__ = ["SpeedUp", "count_flops", "keep_ratio_at", "speed_up", "time_side_by_side"]
