import numpy as np
import pytest
import torch
from PIL import Image

from ailurus_hf import AiluRusImageProcessor, LookupViTForVideoClassification, LookupViTVideoProcessor
from tests.factories import tiny_lookupvit


def frames(count=8, height=24, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (count, height, width, 3), dtype=np.uint8)


def test_frames_are_prepared_as_images():
    video = frames()
    expected = AiluRusImageProcessor()(list(video), return_tensors="pt")["pixel_values"]
    pictures = [Image.fromarray(frame) for frame in video]
    for given in (video, list(video), torch.from_numpy(video).permute(0, 3, 1, 2), pictures):
        found = LookupViTVideoProcessor()(given, return_tensors="pt")["pixel_values"]
        assert torch.equal(found, expected[None])


def test_batches_and_sizes():
    videos = [frames(8, seed=1), frames(8, 30, 40, seed=2)]
    processor = LookupViTVideoProcessor(do_resize=True, size={"height": 16, "width": 16})
    pixels = processor(videos, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 8, 3, 16, 16)
    assert torch.equal(pixels[1:], processor(videos[1], return_tensors="pt")["pixel_values"])
    assert torch.equal(torch.tensor(np.array(processor(videos)["pixel_values"])), pixels)
    assert processor(np.stack([frames(), frames()]), return_tensors="np")["pixel_values"].shape == (2, 8, 3, 16, 16)


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(8, 4, [1, 3, 5, 7]), (9, 3, [1, 4, 7]), (7, 7, list(range(7))), (2, 4, [0, 0, 1, 1]), (100, 1, [50])],
)
def test_frames_are_evenly_spread(total, count, expected):
    video = np.zeros((total, 8, 8, 3), dtype=np.uint8) + np.arange(total, dtype=np.uint8)[:, None, None, None]
    pixels = LookupViTVideoProcessor()(video, num_frames=count, return_tensors="np")["pixel_values"]
    assert ((pixels[0, :, 0, 0, 0] * 0.5 + 0.5) * 255).round().astype(int).tolist() == expected


def test_a_round_trip_and_a_model(tmp_path):
    LookupViTVideoProcessor(num_frames=4).save_pretrained(tmp_path)
    processor = LookupViTVideoProcessor.from_pretrained(tmp_path)
    model = tiny_lookupvit(LookupViTForVideoClassification, num_frames=4, tubelet_size=2)
    inputs = processor([frames(11, 48, 48), frames(30, 48, 48)], return_tensors="pt")
    assert model(**inputs).logits.shape == (2, 5)


def test_refuses():
    processor = LookupViTVideoProcessor()
    with pytest.raises(ValueError, match=r"videos of one number of frames, got \[4, 5\]; num_frames=16 takes"):
        processor([frames(4), frames(5)], return_tensors="pt")
    with pytest.raises(ValueError, match="got no video"):
        processor([])
    for video, count in ((frames(4), 0), ([frames(4)[:0]], None)):
        with pytest.raises(ValueError, match="num_frames must be at least 1, of a video with frames, got"):
            processor(video, num_frames=count)
