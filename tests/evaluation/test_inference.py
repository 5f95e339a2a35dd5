import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from ailurus_hf import AiluRusForSemanticSegmentation, AiluRusImageProcessor
from ailurus_hf.evaluation import class_scores, segment_image, sliding_window_logits
from ailurus_hf.modeling import image_processing_ailurus
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
    "views", [{"flip": True}, {"scales": (0.5, 1, 1.25), "flip": True}, {"sliding_window": True, "flip": True}]
)
@pytest.mark.parametrize("enlarged", [1, 3])
def test_views_are_added_up_in_little_memory(monkeypatch, views, enlarged):
    """As all views at once, in full size; the picture is `enlarged` times as large as what the model sees."""
    model = tiny_model(AiluRusForSemanticSegmentation, window_size=48, window_stride=32, num_labels=12)
    size = (3 * 44, 3 * 70)
    picture = PICTURE.resize(size[::-1])
    processor = AiluRusImageProcessor(
        do_resize=True, size={"height": size[0] // enlarged, "width": size[1] // enlarged}
    )
    pixel_values = processor(picture, return_tensors="pt")["pixel_values"]
    seen = []
    for scale in views.get("scales", (1,)):
        for mirrored in (False, True):
            view = pixel_values
            if scale != 1:
                view = interpolate(view, size=[round(side * scale) for side in view.shape[-2:]], mode="bilinear")
            view = view.flip(-1) if mirrored else view
            with torch.no_grad():
                logits = sliding_window_logits(model, view, 48, 32) if "sliding_window" in views else model(view).logits
            logits = logits.flip(-1) if mirrored else logits
            seen.append(interpolate(logits, size=size, mode="bilinear").softmax(1))
    expected = torch.stack(seen).mean(0)
    monkeypatch.setattr(image_processing_ailurus, "STRIP", 2**15)
    full = []  # how many tensors of all classes in full size there are whenever the model is called

    def count(*_):
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
        full.append(sum(tensor.numel() == expected.numel() for tensor in tensors))

    count()
    hook = model.register_forward_pre_hook(count)
    labels = segment_image(model, processor, picture, **views).labels
    hook.remove()
    np.testing.assert_array_equal(labels, expected[0].argmax(0))
    # The sum, and the windows' where there are some; none where the model sees less than the picture.
    assert max(full) - full[0] <= ((2 if "sliding_window" in views else 1) if enlarged == 1 else 0)
    torch.testing.assert_close(class_scores(model, pixel_values, size, **views), expected, rtol=0, atol=1e-6)


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
