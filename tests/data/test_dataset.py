"""From labelled pictures to batches."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ailurus_hf import AiluRusImageProcessor
from ailurus_hf.data import SegmentationAugmentation, SegmentationCollator, SegmentationDataset, SegmentationFolder
from ailurus_hf.data.images import ImageFileError
from tests.data.files import IGNORE, write_camvid

PROCESSOR = AiluRusImageProcessor()
VIEWS = SegmentationAugmentation((24, 32))


def dataset(root, **settings):
    return SegmentationDataset(SegmentationFolder.camvid(root), PROCESSOR, ignore_index=IGNORE, **settings)


def test_whole_pictures_pass_the_image_processor(tmp_path):
    data = dataset(write_camvid(tmp_path))
    sample = data.source[1]
    expected = PROCESSOR(sample.image, sample.labels, return_tensors="pt")
    assert torch.equal(data[1]["pixel_values"], expected["pixel_values"][0])
    assert torch.equal(data[1]["labels"], torch.tensor(sample.labels))


def test_a_data_set_ends(tmp_path):
    data = dataset(write_camvid(tmp_path))
    assert len(list(data)) == len(data) == 6
    with pytest.raises(IndexError, match="from 0 to 5, got 6"):
        data[6]


def test_labels_are_not_reduced_twice(tmp_path):
    processor = AiluRusImageProcessor(do_reduce_labels=True)
    source = SegmentationFolder.camvid(write_camvid(tmp_path))
    data = SegmentationDataset(source, processor, ignore_index=IGNORE)
    assert torch.equal(data[0]["labels"], torch.tensor(source[0].labels))


def test_views_follow_from_seed_epoch_and_index(tmp_path):
    write_camvid(tmp_path)
    data, again = dataset(tmp_path, augmentation=VIEWS), dataset(tmp_path, augmentation=VIEWS)
    first = [data[index]["pixel_values"] for index in range(6)]
    backwards = [again[index]["pixel_values"] for index in reversed(range(6))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, backwards, strict=True))
    data.set_epoch(1)
    assert not torch.equal(data[0]["pixel_values"], first[0])
    data.set_epoch(0)
    assert torch.equal(data[0]["pixel_values"], first[0])
    assert not torch.equal(dataset(tmp_path, augmentation=VIEWS, seed=1)[0]["pixel_values"], first[0])


def test_workers_draw_the_same_views(tmp_path):
    data = dataset(write_camvid(tmp_path), augmentation=VIEWS)
    data.set_epoch(3)
    alone, workers = (list(DataLoader(data, 2, num_workers=number)) for number in (0, 2))
    for a, b in zip(alone, workers, strict=True):
        assert torch.equal(a["pixel_values"], b["pixel_values"])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_that_persist_follow_the_epochs(tmp_path, start):
    """And those of a copy follow the copy's."""
    original = dataset(write_camvid(tmp_path), augmentation=VIEWS)
    data = copy.deepcopy(original)
    original.set_epoch(7)
    loader = DataLoader(data, 3, num_workers=1, persistent_workers=True, multiprocessing_context=start)
    for epoch in (0, 2, 1):
        data.set_epoch(epoch)
        drawn = torch.cat([batch["pixel_values"] for batch in loader])
        assert torch.equal(drawn, torch.stack([data[index]["pixel_values"] for index in range(6)])), epoch
    assert (data.epoch, original.epoch) == (1, 7)


def test_damaged_pictures_are_named_and_skipped_only_when_asked(tmp_path, caplog):
    file = write_camvid(tmp_path) / "train" / "images" / "002.png"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ImageFileError, match=r"002\.png"):
        list(DataLoader(dataset(tmp_path), 2))
    data = dataset(tmp_path, skip_unreadable=True)
    assert torch.equal(data[2]["labels"], data[3]["labels"])
    assert "002.png" in caplog.text
    for picture in (tmp_path / "train" / "images").iterdir():
        picture.write_bytes(b"")
    with pytest.raises(ImageFileError, match="none of the 6 samples"):
        data[0]


def test_batches_are_filled_to_the_largest():
    samples = [
        {"pixel_values": torch.ones(3, *size), "labels": torch.ones(size, dtype=torch.int64)}
        for size in ((4, 9), (6, 5))
    ]
    batch = SegmentationCollator(IGNORE)(samples)
    assert batch["pixel_values"].shape == (2, 3, 6, 9)
    assert batch["labels"].shape == (2, 6, 9)
    assert (batch["labels"][0, 4:] == IGNORE).all()
    assert (batch["labels"][1, :, 5:] == IGNORE).all()
    assert batch["pixel_values"].sum() == 3 * (36 + 30)
    assert batch["labels"].dtype == torch.int64


def test_one_size_needs_no_filling(tmp_path):
    data = dataset(write_camvid(tmp_path), augmentation=VIEWS)
    batch = SegmentationCollator(IGNORE)([data[0], data[1]])
    np.testing.assert_array_equal(batch["pixel_values"][1], data[1]["pixel_values"])
