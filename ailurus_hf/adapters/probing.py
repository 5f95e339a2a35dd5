"""Finding the row of an encoder that the table of families lacks."""



from .arguments import KeyBias, MaskBias, MergedArguments, RotaryPositions
from .controller import EncoderController

_BIASES: tuple[MergedArguments, ...] = (KeyBias(), MaskBias())
_POSITIONS: tuple[MergedArguments, ...] = (MergedArguments(), RotaryPositions())
_TOLERANCE = 1e-4  # of an output's largest value


class _Probe(EncoderController):
    """A controller that groups tokens as it is told, and can withhold the sizes."""
