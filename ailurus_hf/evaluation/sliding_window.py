"""Sliding-window inference, by the rule of the official Segmenter: overlapping windows, averaged logits."""

import torch
from torch import nn
from torch.nn.functional import interpolate

__all__ = ["sliding_window_logits", "window_starts"]


@torch.no_grad()
def sliding_window_logits(
    model: nn.Module, pixel_values: torch.Tensor, window_size: int, window_stride: int, batch_size: int = 1
) -> torch.Tensor:
    """Predict large images window by window and average the logits where windows overlap.

    Args:
        model: a segmentation model: `model(pixel_values=...)` returns an output with `.logits` of the input's size.
        pixel_values: (B, num_channels, H, W), normalised. An image whose shorter side is below the window is enlarged
            to it (bilinear, the longer side rounded down) and its logits are resized back.
        window_size: side of the square windows in pixels.
        window_stride: distance between neighbouring windows in pixels; at most `window_size`.
        batch_size: windows per forward.

    Returns:
        Logits (B, num_labels, H, W), in float32 for half-precision models. Their softmax over dimension 1 is what the
        original's `inference` returns.

    Raises:
        ValueError: a size is not positive, the stride exceeds the window, or `pixel_values` is not 4-D.
    """
    _check(pixel_values, window_size, window_stride, batch_size)
    height, width = pixel_values.shape[-2:]
    images = _enlarge(pixel_values, window_size)
    starts = [
        (image, top, left)
        for image in range(len(images))
        for top in window_starts(images.shape[-2], window_size, window_stride)
        for left in window_starts(images.shape[-1], window_size, window_stride)
    ]
    total, count = None, images.new_zeros(1, 1, *images.shape[-2:], dtype=torch.float32)
    for first in range(0, len(starts), batch_size):
        batch = starts[first : first + batch_size]
        crops = [images[i, :, top : top + window_size, left : left + window_size] for i, top, left in batch]
        logits = model(pixel_values=torch.stack(crops)).logits
        if total is None:
            dtype = torch.promote_types(logits.dtype, torch.float32)
            total = logits.new_zeros(len(images), logits.shape[1], *images.shape[-2:], dtype=dtype)
        for (i, top, left), window in zip(batch, logits, strict=True):
            total[i, :, top : top + window_size, left : left + window_size] += window
            if i == 0:  # all images have the same windows
                count[..., top : top + window_size, left : left + window_size] += 1
    assert total is not None  # there is at least one window
    total /= count
    return total if images is pixel_values else interpolate(total, size=(height, width), mode="bilinear")


def window_starts(length: int, window_size: int, window_stride: int) -> list[int]:
    """First pixels of the windows along an axis: multiples of the stride, then one window flush with the end.

    Args:
        length: size of the axis in pixels, at least `window_size`.
        window_size: size of a window in pixels.
        window_stride: distance between windows in pixels.
    """
    last = length - window_size
    return [*range(0, last, window_stride), last]


def _enlarge(images: torch.Tensor, window_size: int) -> torch.Tensor:
    """Enlarge images whose shorter side is below the window; the longer side is truncated, as in the original."""
    height, width = images.shape[-2:]
    shorter, longer = min(height, width), max(height, width)
    if shorter >= window_size:
        return images
    length = int(longer / shorter * window_size)
    size = (window_size, length) if height < width else (length, window_size)
    return interpolate(images, size=size, mode="bilinear")


def _check(pixel_values: torch.Tensor, window_size: int, window_stride: int, batch_size: int) -> None:
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pixel_values must be (batch_size, num_channels, height, width), got shape {tuple(pixel_values.shape)}"
        )
    for name, value in (("window_size", window_size), ("window_stride", window_stride), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if window_stride > window_size:
        raise ValueError(
            f"window_stride must be at most window_size={window_size}, or pixels between windows get no logits, "
            f"got {window_stride}"
        )
