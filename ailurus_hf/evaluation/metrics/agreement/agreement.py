"""Share of pixels with the class that a reference model, such as the dense one, gives them."""

from ailurus_hf.evaluation import Agreement
from ailurus_hf.evaluation.streaming import StreamingMetric


class AgreementWithDense(StreamingMetric):
    """No settings: `references` are the other model's label maps, and every pixel counts."""

    accumulator = Agreement
