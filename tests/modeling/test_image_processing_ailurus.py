import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from ailurus_hf import AiluRusImageProcessor
from ailurus_hf.data import LabelRule

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_values_are_rescaled_and_normalised():
    processor = AiluRusImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    values = processor(Image.fromarray(PIXELS), return_tensors="pt")["pixel_values"]
    expected = (PIXELS / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[0], torch.tensor(expected, dtype=torch.float32).permute(2, 0, 1))


@pytest.mark.parametrize("kind", ["pil", "numpy", "channels first", "tensor"])
def test_inputs_of_every_kind_agree(kind):
    image = {
        "pil": Image.fromarray(PIXELS),
        "numpy": PIXELS,
        "channels first": PIXELS.transpose(2, 0, 1),
        "tensor": torch.tensor(PIXELS).permute(2, 0, 1),
    }[kind]
    processor = AiluRusImageProcessor()
    expected = processor([PIXELS], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(processor(image, return_tensors="np")["pixel_values"], expected)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA"])
def test_pil_images_of_every_mode_become_rgb(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    assert AiluRusImageProcessor()(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 20, 30)


def test_label_maps_are_resized_without_mixing_classes():
    labels = np.arange(600, dtype=np.int32).reshape(20, 30) % 5
    processor = AiluRusImageProcessor(do_resize=True, size={"height": 40, "width": 60})
    batch = processor([PIXELS], [labels], return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 40, 60)
    assert batch["labels"].dtype == torch.int64
    assert torch.equal(batch["labels"][0], torch.tensor(labels).repeat_interleave(2, 0).repeat_interleave(2, 1).long())


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_label_reduction(dtype):
    labels = np.array([[0, 1, 2], [255, 150, 0]], dtype=dtype)
    processor = AiluRusImageProcessor(do_reduce_labels=True)
    reduced = processor([PIXELS[:2, :3]], [labels], return_tensors="np")["labels"][0]
    assert reduced.tolist() == [[255, 0, 1], [255, 149, 255]]
    assert labels[0, 0] == 0
    reduced = processor([PIXELS[:2, :3]], [labels], ignore_index=-100, return_tensors="np")["labels"][0]
    assert reduced.tolist() == [[-100, 0, 1], [-100, 149, -100]]


def test_label_reduction_is_that_of_transformers():
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    settings = {"do_resize": False, "do_reduce_labels": True, "return_tensors": "np"}
    expected = SegformerImageProcessorPil()(image, labels, **settings)["labels"]
    np.testing.assert_array_equal(AiluRusImageProcessor()(image, labels, **settings)["labels"], expected)
    np.testing.assert_array_equal(LabelRule(254, reduce_labels=True)(labels, "map"), expected[0])


def test_post_processing_resizes_logits_before_comparing():
    logits = torch.zeros(2, 3, 2, 2)
    logits[0, 1, :, 0] = 1
    logits[1, 2] = 1
    outputs = SimpleNamespace(logits=logits)
    processor = AiluRusImageProcessor()
    assert [m.tolist() for m in processor.post_process_semantic_segmentation(outputs)] == [[[1, 0]] * 2, [[2, 2]] * 2]
    first, second = processor.post_process_semantic_segmentation(outputs, target_sizes=[(4, 4), (1, 3)])
    assert first.tolist() == [[1, 1, 1, 0]] * 4
    assert second.tolist() == [[2, 2, 2]]


def test_post_processing_wants_one_size_per_image():
    with pytest.raises(ValueError, match="target_sizes must have one size per image, 2, got 1"):
        AiluRusImageProcessor().post_process_semantic_segmentation(
            SimpleNamespace(logits=torch.zeros(2, 3, 2, 2)), target_sizes=[(4, 4)]
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuses_pixels_that_are_not_finite(bad):
    image = PIXELS.astype(np.float32)
    image[3, 4, 0] = bad
    with pytest.raises(ValueError, match="images must have finite pixels, got NaN or infinity in image 1"):
        AiluRusImageProcessor()([PIXELS.astype(np.float32), image])


def test_round_trip(tmp_path):
    AiluRusImageProcessor(image_std=[0.1, 0.2, 0.3], do_reduce_labels=True).save_pretrained(tmp_path)
    loaded = AiluRusImageProcessor.from_pretrained(tmp_path)
    assert list(loaded.image_std) == [0.1, 0.2, 0.3]
    assert loaded.do_reduce_labels is True
