"""From labelled pictures to the model's inputs."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .augmentation import SegmentationAugmentation
from .images import ImageFileError
from .labelled import LabelledImage

__all__ = ["SegmentationCollator", "SegmentationDataset"]

logger = logging.getLogger(__name__)


class SegmentationDataset(Dataset[dict[str, torch.Tensor]]):
    """Model inputs from a source of labelled pictures, augmented or as they are.

    A view depends on the seed, the epoch and the index alone, not on the process or the worker that draws it or on
    what was drawn before: a run that is resumed, or spread over other workers, sees the same views.

    Args:
        source: a sequence of `LabelledImage`, such as `SegmentationFolder`.
        image_processor: turns pictures and label maps into `pixel_values` and `labels`.
        augmentation: random views for training; None keeps the whole pictures.
        ignore_index: label of pixels that do not count.
        skip_unreadable: put the next readable sample in the place of one whose files are damaged, with a warning that
            names the file, instead of raising.
        seed: with the epoch and the index, what the views are drawn from.
    """

    def __init__(
        self,
        source: Sequence[LabelledImage],
        image_processor: Any,
        augmentation: SegmentationAugmentation | None = None,
        ignore_index: int = 255,
        skip_unreadable: bool = False,
        seed: int = 0,
    ) -> None:
        self.source, self.image_processor, self.augmentation = source, image_processor, augmentation
        self.ignore_index, self.skip_unreadable, self.seed = ignore_index, skip_unreadable, seed
        # In shared memory: workers that outlive an epoch (`persistent_workers`) keep the copy they started with.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # a copy's is its own; what a worker is sent is shared already, and stays so

    @property
    def epoch(self) -> int:
        """The epoch whose views are drawn, in the workers of a data loader too."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Views of another epoch, from the next iterator of the data loader on, whether its workers persist or not."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`pixel_values` (3, height, width) float32 and `labels` (height, width) int64.

        Raises:
            IndexError: there is no such sample.
            ImageFileError: a file is damaged and `skip_unreadable` is False, or no sample can be read at all.
            ValueError: labels outside the classes, or of another size than the picture.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index must be from 0 to {len(self) - 1}, got {index}")
        image, labels, _ = self._read(index)
        settings: dict[str, Any] = {"do_reduce_labels": False}  # the source has done it
        if hasattr(self.image_processor, "ignore_index"):  # those of transformers have none
            settings["ignore_index"] = self.ignore_index
        if self.augmentation is not None:
            # A generator of its own for each view: one that went on would depend on what was drawn before.
            rng = np.random.default_rng((self.seed, self.epoch, index))
            image, labels = self.augmentation(image, labels, rng, self.ignore_index)
            settings["do_resize"] = False
        inputs = self.image_processor(image, labels, return_tensors="pt", **settings)
        return {"pixel_values": inputs["pixel_values"][0], "labels": inputs["labels"][0].long()}

    def _read(self, index: int) -> LabelledImage:
        # Whether a file is damaged shows when it is decoded, not before.
        for offset in range(len(self.source)):
            try:
                return self.source[(index + offset) % len(self.source)]
            except ImageFileError as error:
                if not self.skip_unreadable:
                    raise
                logger.warning("skipped: %s", error)
        raise ImageFileError(f"none of the {len(self.source)} samples can be read")


class SegmentationCollator:
    """Batches samples; smaller ones are filled at the bottom and the right.

    Args:
        ignore_index: label of the filled pixels; the pixels themselves are 0, the image processor's mean colour.
    """

    def __init__(self, ignore_index: int = 255) -> None:
        self.ignore_index = ignore_index

    def __call__(self, samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """(height, width) samples -> `pixel_values` (B, 3, H, W) and `labels` (B, H, W) of the largest height and
        width among them."""
        height = max(sample["labels"].shape[0] for sample in samples)
        width = max(sample["labels"].shape[1] for sample in samples)
        return {
            name: torch.stack([_fill(sample[name], height, width, value) for sample in samples])
            for name, value in (("pixel_values", 0), ("labels", self.ignore_index))
        }


def _fill(tensor: torch.Tensor, height: int, width: int, value: int) -> torch.Tensor:
    padding = (0, width - tensor.shape[-1], 0, height - tensor.shape[-2])
    return torch.nn.functional.pad(tensor, padding, value=value)
