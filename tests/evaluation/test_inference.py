from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ailurus_hf import AiluRusForSemanticSegmentation, AiluRusImageProcessor
from ailurus_hf.evaluation import segment_image, sliding_window_logits
from tests.factories import tiny_model

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (44, 70, 3), dtype=np.uint8))


def test_labels_have_the_size_of_the_picture():
    model, processor = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.25), AiluRusImageProcessor()
    result = segment_image(model, processor, PICTURE)
    with torch.no_grad():
        output = model(processor(PICTURE, return_tensors="pt")["pixel_values"])
    np.testing.assert_array_equal(result.labels, output.logits[0].argmax(0))
    np.testing.assert_array_equal(result.clusters.ravel(), output.assignment[0])
    assert result.clusters.shape == (6, 9)
    assert result.num_tokens == 14
    assert result.patch_size == (8, 8)


def test_resized_pictures_come_back_at_their_own_size():
    processor = AiluRusImageProcessor(do_resize=True, size={"height": 88, "width": 140})
    result = segment_image(tiny_model(AiluRusForSemanticSegmentation), processor, PICTURE)
    assert result.labels.shape == (44, 70)
    assert result.clusters.shape == (11, 18)
    assert result.patch_size == (4, 4)


def test_half_precision_and_sliding_windows():
    model = tiny_model(AiluRusForSemanticSegmentation, window_size=32, window_stride=16)
    processor = AiluRusImageProcessor()
    result = segment_image(model, processor, PICTURE, sliding_window=True)
    pixel_values = processor(PICTURE, return_tensors="pt")["pixel_values"]
    np.testing.assert_array_equal(result.labels, sliding_window_logits(model, pixel_values, 32, 16)[0].argmax(0))
    assert result.clusters is None
    assert result.num_tokens is None
    assert segment_image(model.bfloat16(), processor, PICTURE).labels.shape == (44, 70)


def test_sliding_windows_need_a_window_size():
    with pytest.raises(ValueError, match=r"sliding_window needs config\.window_size"):
        segment_image(tiny_model(AiluRusForSemanticSegmentation), AiluRusImageProcessor(), PICTURE, sliding_window=True)


@pytest.mark.parametrize(
    ("views", "logits_scale"),
    [
        ({}, 1),
        ({}, 4),
        ({"flip": True}, 1),
        ({"scales": (1, 0.5), "flip": True}, 4),
        ({"sliding_window": True}, 1),
    ],
)
def test_padding_is_no_part_of_the_picture(views, logits_scale):
    class Oracle(torch.nn.Module):
        """Says class 0 for black pixels, 1 for white ones and 2 for what was filled."""

        config = SimpleNamespace(window_size=32, window_stride=32)
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, pixel_values):
            value = pixel_values[:, :1, ::logits_scale, ::logits_scale]
            return SimpleNamespace(logits=torch.cat([-value, value, 0.5 - 4 * value.abs()], dim=1))

    pixels = np.zeros((48, 64, 3), dtype=np.uint8)
    pixels[:24] = 255
    processor = AiluRusImageProcessor(do_pad=True, pad_size={"height": 64, "width": 96})
    labels = segment_image(Oracle(), processor, Image.fromarray(pixels), **views).labels
    assert labels.shape == (48, 64)
    expected = pixels[..., 0] > 0
    near = 8 if logits_scale > 1 or "scales" in views else 0  # bilinear edges
    for part in (np.s_[: 24 - near, : 64 - near], np.s_[24 + near : 48 - near, : 64 - near]):
        np.testing.assert_array_equal(labels[part], expected[part])


def test_clusters_of_padded_pictures_keep_their_place():
    model = tiny_model(AiluRusForSemanticSegmentation, keep_ratio=0.5)
    processor = AiluRusImageProcessor(
        do_resize=True, size={"height": 88, "width": 140}, do_pad=True, pad_size={"height": 96, "width": 160}
    )
    result = segment_image(model, processor, PICTURE)
    assert result.clusters.shape == (12, 20)
    assert result.patch_size == (4, 4)
    crop = AiluRusImageProcessor(do_center_crop=True, crop_size={"height": 32, "width": 32})
    assert segment_image(model, crop, PICTURE).labels.shape == (44, 70)
    assert segment_image(model, crop, PICTURE).clusters is None
