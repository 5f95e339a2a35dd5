"""Mean intersection over union, pixel and mean accuracy, and IoU of every class."""

from ailurus_hf.evaluation import ConfusionMatrix
from ailurus_hf.evaluation.streaming import StreamingMetric


class MeanIoU(StreamingMetric):
    """Settings: `num_labels`, `ignore_index=255`, `id2label=None` for names in the result."""

    accumulator = ConfusionMatrix
