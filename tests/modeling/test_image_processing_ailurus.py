import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

from ailurus_hf import AiluRusImageProcessor
from ailurus_hf.data import LabelRule
from ailurus_hf.modeling import image_processing_ailurus

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


@pytest.mark.parametrize("mode", [np.uint16, np.int32])
def test_sixteen_bits_are_scaled_not_clipped(mode):
    grey = np.array([[0, 257, 32896, 65535]], dtype=mode)
    settings = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    values = AiluRusImageProcessor()(Image.fromarray(grey), **settings)["pixel_values"]
    assert values.tolist() == [[[[0, 1, 128, 255]]] * 3]


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


def test_what_is_filled_does_not_count():
    labels = np.ones((20, 30), dtype=np.uint8)
    for settings, area in (
        ({"do_pad": True, "pad_size": {"height": 24, "width": 40}}, np.s_[:20, :30]),
        ({"do_center_crop": True, "crop_size": {"height": 24, "width": 40}}, np.s_[2:22, 5:35]),
        ({"do_center_crop": True, "crop_size": {"height": 23, "width": 9}}, np.s_[2:22, :9]),
    ):
        for ignore_index in (255, -100, 9):
            batch = AiluRusImageProcessor(**settings)(PIXELS, labels, ignore_index=ignore_index, return_tensors="np")
            [found] = batch["labels"]
            assert (found[area] == 1).all()
            assert (found == ignore_index).sum() == found.size - found[area].size
            assert batch["pixel_values"].shape[-2:] == found.shape


def test_label_maps_hold_any_integer():
    labels = np.array([[0, 254, 255, 256], [65535, -100, 2**31 - 1, -(2**31)]])
    image = PIXELS[:2, :4]
    processor = AiluRusImageProcessor(do_resize=True, size={"height": 4, "width": 8})
    expected = labels.repeat(2, 0).repeat(2, 1)
    for kind in (labels, labels.astype(np.int32), torch.tensor(labels), Image.fromarray(labels.astype(np.int32))):
        found = processor(image, kind, return_tensors="np")["labels"][0]
        np.testing.assert_array_equal(found, expected)
    black_and_white = Image.fromarray(labels > 255)
    np.testing.assert_array_equal(processor(image, black_and_white, return_tensors="np")["labels"][0], expected > 255)
    with pytest.raises(ValueError, match="integers of at most 32 bits"):
        processor(image, labels * 2)
    with pytest.raises(ValueError, match="integers of at most 32 bits"):
        processor(image, labels * 0.5)
    with pytest.raises(ValueError, match="one label per pixel, got 3 channels"):
        processor(image, [Image.fromarray(image)])


def oracle(processor, sizes, scale=1, **settings):
    """Label maps of pictures of these sizes, one with the pixel's class in place of its colour, and the classes."""
    rng = np.random.default_rng(0)
    # Blocks that resizing cannot blur away.
    truths = [np.kron(rng.integers(3, size=(h // 8, w // 8)), np.ones((8, 8), dtype=np.int64)) for h, w in sizes]
    images = [np.zeros((*size, 3), dtype=np.uint8) for size in sizes]
    labels = processor(images, truths, return_tensors="pt", **settings)["labels"]
    labels = labels[:, ::scale, ::scale]
    filled = torch.where(labels == 255, 0, labels)  # a model says something there too
    logits = torch.nn.functional.one_hot(filled, 3).permute(0, 3, 1, 2).float()
    found = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), sizes, **settings)
    assert [tuple(labels.shape) for labels in found] == sizes
    return [torch.tensor(truth) for truth in truths], found


@pytest.mark.parametrize(
    ("settings", "sizes", "scale"),
    [
        ({"do_pad": True, "pad_size": {"height": 64, "width": 64}}, [(48, 64)], 1),
        ({"do_pad": True, "pad_size": {"height": 64, "width": 96}}, [(48, 64)], 1),
        ({"do_pad": True}, [(48, 64), (96, 32), (16, 16)], 1),
        ({"do_center_crop": True, "crop_size": {"height": 64, "width": 80}}, [(48, 64)], 1),
        ({"do_resize": True, "size": {"height": 96, "width": 128}, "do_pad": True, "pad_size": 160}, [(48, 64)], 1),
        ({"do_resize": True, "size": {"shortest_edge": 96}, "do_pad": True}, [(48, 64), (64, 48)], 1),
    ],
)  # fmt: skip
def test_right_logits_give_right_labels(settings, sizes, scale):
    for made, called in ((settings, {}), ({}, settings)):
        for truth, found in zip(*oracle(AiluRusImageProcessor(**made), sizes, scale, **called), strict=True):
            assert torch.equal(found, truth)


def test_logits_of_lower_resolution_are_cut_too():
    [truth], [found] = oracle(AiluRusImageProcessor(do_pad=True, pad_size={"height": 64, "width": 96}), [(48, 64)], 4)
    assert (found == truth).float().mean() > 0.85  # the rest is on the borders, which bilinear resizing moves


def test_a_picture_of_a_padded_batch_alone():
    processor = AiluRusImageProcessor(do_pad=True)
    logits = torch.zeros(1, 2, 40, 40)
    logits[:, 1, :20, :20] = 1
    [found] = processor.post_process_semantic_segmentation(SimpleNamespace(logits=logits), [(20, 20)])
    assert (found == 1).all()


def test_pixels_that_a_crop_cuts_off_get_the_nearest_class():
    settings = {"do_center_crop": True, "crop_size": {"height": 16, "width": 24}}
    [truth], [found] = oracle(AiluRusImageProcessor(**settings), [(32, 40)])
    assert torch.equal(found[8:24, 8:32], truth[8:24, 8:32])
    assert torch.equal(found[:8, 8:32], truth[8, 8:32].expand(8, -1))
    assert torch.equal(found[8:24, 32:], truth[8:24, 31:32].expand(-1, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 19, 40, 52), (300, 421)),
        ((2, 5, 64, 33), (150, 411)),
        ((1, 150, 200, 150), (151, 140)),  # smaller
        ((1, 7, 12, 500), (333, 101)),
        ((1, 6, 200, 300), (600, 300)),  # along one axis
        ((1, 3, 70, 80), (200, 210)),
        ((1, 2, 70, 80), (200, 210)),
    ],
)
def test_label_maps_in_strips_equal_the_whole(monkeypatch, dtype, layout, shape, size):
    logits = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    expected = torch.nn.functional.interpolate(logits, size=size, mode="bilinear").argmax(1)
    for strip in (2**26, 70_000, 30_000):
        monkeypatch.setattr(image_processing_ailurus, "STRIP", strip)
        assert torch.equal(image_processing_ailurus.resized_label_maps(logits, size), expected)


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow_with_the_classes(monkeypatch, dtype):
    monkeypatch.setattr(image_processing_ailurus, "STRIP", 2**19)
    processor, size = AiluRusImageProcessor(), (600, 800)
    outputs = SimpleNamespace(logits=torch.randn(1, 150, 32, 43, dtype=dtype))
    with Largest() as largest:
        [found] = processor.post_process_semantic_segmentation(outputs, [size])
    assert found.shape == size
    # The map itself, or the four to seven classes that half precision takes at a time; all classes would be 72 million.
    assert largest.elements <= (2**19 if dtype == torch.float32 else 5 * 600 * 800)


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


@pytest.mark.parametrize("std", [0.0, [0.5, 0.0, 0.5], [math.nan] * 3, [-0.5] * 3, math.inf])
def test_settings_that_make_every_picture_the_same_are_refused(std, tmp_path):
    with pytest.raises(ValueError, match="image_std must be finite and above 0"):
        AiluRusImageProcessor(image_std=std)
    with pytest.raises(ValueError, match="image_std must be finite and above 0"):
        AiluRusImageProcessor()(PIXELS, image_std=std)
    AiluRusImageProcessor().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text()) | {"image_std": std}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="image_std must be finite and above 0"):
        AiluRusImageProcessor.from_pretrained(tmp_path)
