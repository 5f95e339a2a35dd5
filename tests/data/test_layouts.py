"""Readers of data set layouts, and what they say of broken ones."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from ailurus_hf.data import HubSegmentation, LabelRule, SegmentationFolder, open_layout
from ailurus_hf.data.images import ImageFileError
from ailurus_hf.data.label_maps import label_array, pair_files, read_labels
from ailurus_hf.data.layouts import CITYSCAPES_CLASSES
from tests.data.files import IGNORE, NUM_LABELS, labelled_picture, write_camvid, write_labels


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def test_camvid_layout(tmp_path):
    train, val = open_layout(write_camvid(tmp_path), "camvid")
    assert (len(train), len(val)) == (6, 3)
    assert train.id2label == {0: "class 0", 1: "class 1", 2: "class 2", 3: "class 3"}
    assert len(train.palette) == NUM_LABELS
    assert train.rule.ignore_index == IGNORE
    image, labels = labelled_picture(2)
    np.testing.assert_array_equal(np.asarray(train[2].image), np.asarray(image))
    np.testing.assert_array_equal(train[2].labels, labels)
    assert train[2].name.endswith("002.png")


def test_camvid_without_classes_leaves_labels_unchecked(tmp_path):
    (write_camvid(tmp_path) / "classes.json").unlink()
    source = SegmentationFolder.camvid(tmp_path)
    assert source.id2label is None
    assert source[0].labels.max() == IGNORE


def test_ade20k_layout(tmp_path):
    for split in ("training", "validation"):
        save(tmp_path / "images" / split / "a.jpg", Image.new("RGB", (5, 4)))
        write_labels(tmp_path / "annotations" / split / "a.png", np.array([[0, 1, 2, 149, 150]] * 4))
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.15\t11664\t1172\twall\n2\t0.1\t6046\t612\tbuilding, edifice\n"
    )
    train, val = open_layout(tmp_path, "ade20k")
    np.testing.assert_array_equal(val[0].labels[0], [255, 0, 1, 148, 149])
    assert train.id2label == {0: "wall", 1: "building"}
    assert train.rule.num_labels == 150


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes_layout(tmp_path, kind):
    values = [7, 33, 0, 10] if kind == "labelIds" else [0, 18, 255, 255]
    for split in ("train", "val"):
        for city in ("aachen", "bochum"):
            name = f"{city}_000000_000019"
            save(tmp_path / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", Image.new("RGB", (4, 3)))
            write_labels(tmp_path / "gtFine" / split / city / f"{name}_gtFine_{kind}.png", np.array([values] * 3))
    train, val = open_layout(tmp_path, "cityscapes")
    assert (len(train), len(val)) == (2, 2)
    np.testing.assert_array_equal(train[1].labels[0], [0, 18, 255, 255])
    assert train.id2label[18] == "bicycle"
    assert len(train.palette) == len(CITYSCAPES_CLASSES) == 19


def test_missing_cityscapes_labels_are_named(tmp_path):
    save(tmp_path / "leftImg8bit" / "train" / "ulm" / "x_leftImg8bit.png", Image.new("RGB", (4, 3)))
    (tmp_path / "gtFine" / "train" / "ulm").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"1 of \d label files are missing: .*x_gtFine_label"):
        SegmentationFolder.cityscapes(tmp_path)


def test_hugging_face_datasets(tmp_path):
    root = write_camvid(tmp_path) / "train"
    rows = {
        "image": sorted(map(str, (root / "images").iterdir())),
        "annotation": sorted(map(str, (root / "labels").iterdir())),
    }
    dataset = datasets.Dataset.from_dict(rows)
    for column in rows:
        dataset = dataset.cast_column(column, datasets.Image())
    source = HubSegmentation(dataset, LabelRule(NUM_LABELS, IGNORE))
    folder = SegmentationFolder.camvid(tmp_path)
    assert len(source) == len(folder)
    for index in range(len(folder)):
        np.testing.assert_array_equal(source[index].labels, folder[index].labels)
        np.testing.assert_array_equal(np.asarray(source[index].image), np.asarray(folder[index].image))
    with pytest.raises(ValueError, match="row 0 has labels outside the classes"):
        HubSegmentation(dataset, LabelRule(2, IGNORE))[0]
    with pytest.raises(ValueError, match=r"label_column must be one of .*'image', 'annotation'.*, got 'truth'"):
        HubSegmentation(dataset, label_column="truth")
    with pytest.raises(ValueError, match="empty"):
        HubSegmentation(dataset.select([]))


def test_broken_data_sets_are_explained(tmp_path):
    root = write_camvid(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder; check the data set's root"):
        open_layout(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"layout must be one of camvid, ade20k, cityscapes, got 'coco'"):
        open_layout(root, "coco")
    (root / "train" / "labels" / "001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 6 label files are missing: .*001\.png"):
        open_layout(root)
    (root / "classes.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable JSON file"):
        SegmentationFolder.camvid(root, "val")
    (root / "classes.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="must hold a JSON object"):
        SegmentationFolder.camvid(root, "val")
    for file in (root / "val" / "images").iterdir():
        file.unlink()
    (root / "classes.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        SegmentationFolder.camvid(root, "val")
    with pytest.raises(FileNotFoundError, match="no pictures with labels"):
        SegmentationFolder([])


def test_sizes_that_differ_are_refused(tmp_path):
    root = write_camvid(tmp_path)
    write_labels(root / "train" / "labels" / "000.png", np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"000\.png is 5 x 3 pixels, but its picture .*000\.png is 56 x 40"):
        SegmentationFolder.camvid(root)[0]


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)),
        Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4) * 300),
        Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).convert("P"),
    ],
    ids=["8 bits", "16 bits", "palette"],
)
def test_label_maps_of_every_kind_keep_their_numbers(tmp_path, image):
    image.save(tmp_path / "map.png")
    labels = read_labels(tmp_path / "map.png")
    np.testing.assert_array_equal(labels, np.asarray(image))
    assert labels.dtype == np.int64


def test_unreadable_label_maps_are_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    with pytest.raises(ImageFileError, match=r"colour\.png is no label map: .* turn colours into class ids"):
        read_labels(tmp_path / "colour.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageFileError, match=r"empty\.png is empty"):
        read_labels(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ImageFileError, match="not a picture"):
        read_labels(tmp_path / "text.png")
    whole = (tmp_path / "colour.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageFileError, match=r"cut\.png is"):
        read_labels(tmp_path / "cut.png")
    with pytest.raises(ImageFileError, match="got shape"):
        label_array(np.zeros((2, 2)), "fractions")


def test_pairs_need_every_label_file(tmp_path):
    root = write_camvid(tmp_path) / "train"
    assert len(pair_files(root / "images", root / "labels")) == 6
    for number in range(5):
        (root / "labels" / f"00{number}.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"5 of 6 label files are missing: .* and 2 more"):
        pair_files(root / "images", root / "labels")
