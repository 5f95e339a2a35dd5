"""Sliding windows as the official Segmenter lays them, against its recorded outputs and against a loop."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from ailurus_hf import AiluRusForSemanticSegmentation, convert_checkpoint
from ailurus_hf.evaluation import sliding_window_logits
from ailurus_hf.evaluation.sliding_window import window_starts
from tests.paths import golden


class Probe(nn.Module):
    """Its logits are the pixels and, in the last channel, the number of the window's column."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        self.batches.append(len(pixel_values))
        column = torch.arange(pixel_values.shape[-1]).expand_as(pixel_values[:, :1]).to(pixel_values)
        return SimpleNamespace(logits=torch.cat([pixel_values, column], dim=1))


@pytest.mark.parametrize("name", ["linear_vit", "mask_vit"])
def test_golden(name: str, tmp_path: object) -> None:
    folder = golden("segmenter", name)
    convert_checkpoint("segmenter", folder, f"{tmp_path}/out")
    model = AiluRusForSemanticSegmentation.from_pretrained(f"{tmp_path}/out", keep_ratio=1.0).eval()
    expected = load_file(folder / "golden.safetensors")
    logits = sliding_window_logits(
        model,
        expected["sliding_window_pixel_values"],
        model.config.window_size,
        model.config.window_stride,
        batch_size=3,
    )
    assert (logits[0] - expected["sliding_window_logits"]).abs().max() <= 3e-5
    assert (logits[0].softmax(0) - expected["sliding_window_probs"]).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [
        (56, 48, 32, [0, 8]),
        (80, 48, 32, [0, 32]),  # the window at 32 ends with the image: not taken twice
        (81, 48, 32, [0, 32, 33]),
        (48, 48, 32, [0]),
        (49, 48, 48, [0, 1]),
    ],
)
def test_window_starts(length: int, window: int, stride: int, starts: list[int]) -> None:
    assert window_starts(length, window, stride) == starts


@given(
    height=st.integers(8, 40),
    width=st.integers(8, 40),
    window=st.integers(1, 8),
    stride=st.integers(1, 8),
    batch_size=st.integers(1, 5),
)
def test_matches_a_loop(height: int, width: int, window: int, stride: int, batch_size: int) -> None:
    stride = min(stride, window)
    images = torch.randn(2, 3, height, width)
    total, count = torch.zeros(2, 4, height, width), torch.zeros(height, width)
    for top in [*range(0, height - window, stride), height - window]:
        for left in [*range(0, width - window, stride), width - window]:
            area = (..., slice(top, top + window), slice(left, left + window))
            total[area] += Probe()(images[area]).logits
            count[area] += 1
    logits = sliding_window_logits(Probe(), images, window, stride, batch_size)
    assert count.min() >= 1
    torch.testing.assert_close(logits, total / count)
    torch.testing.assert_close(logits[:, :3], images)  # averaging equal values changes nothing


def test_batches_of_windows() -> None:
    probe = Probe()
    sliding_window_logits(probe, torch.randn(2, 3, 16, 24), window_size=8, window_stride=8, batch_size=5)
    assert probe.batches == [5, 5, 2]


@pytest.mark.parametrize(
    ("size", "enlarged"), [((20, 30), (32, 48)), ((30, 20), (48, 32)), ((10, 33), (32, 105)), ((20, 20), (32, 32))]
)
def test_small_images_are_enlarged_and_their_logits_reduced(size: tuple[int, int], enlarged: tuple[int, int]) -> None:
    image = torch.randn(1, 3, *size)
    logits = sliding_window_logits(Probe(), image, window_size=32, window_stride=32)
    larger = nn.functional.interpolate(image, size=enlarged, mode="bilinear")
    expected = nn.functional.interpolate(larger, size=size, mode="bilinear")
    torch.testing.assert_close(logits[:, :3], expected)


def test_half_precision_is_summed_in_float32() -> None:
    assert sliding_window_logits(Probe(), torch.randn(1, 3, 16, 16).half(), 8, 4).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.zeros(3, 16, 16), 8, 8), r"got shape \(3, 16, 16\)"),
        ((torch.zeros(1, 3, 16, 16), 0, 8), "window_size must be at least 1, got 0"),
        ((torch.zeros(1, 3, 16, 16), 8, 0), "window_stride must be at least 1, got 0"),
        ((torch.zeros(1, 3, 16, 16), 8, 9), "window_stride must be at most window_size=8"),
        ((torch.zeros(1, 3, 16, 16), 8, 8, 0), "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sliding_window_logits(Probe(), *arguments)
