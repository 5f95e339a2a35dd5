"""Finding the row of an encoder that the table of families lacks."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..modeling.configuration_ailurus import AdaptiveResolutionSettings
from ..modeling.token_merging import TokenGroups, group_tokens
from .arguments import KeyBias, MaskBias, MergedArguments, RotaryPositions
from .call_state import CallStates
from .controller import EncoderController, controllers_of
from .families import FamilySpec

_BIASES: tuple[MergedArguments, ...] = (KeyBias(), MaskBias())
_POSITIONS: tuple[MergedArguments, ...] = (MergedArguments(), RotaryPositions())
_TOLERANCE = 1e-4  # of an output's largest value


class _Probe(EncoderController):
    """A controller that groups tokens as it is told, and can withhold the sizes."""
