"""Readers of data set layouts, and what they say of broken ones."""

import json
import struct
import zlib

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ailurus_hf.data import HubSegmentation, LabelRule, SegmentationFolder, open_layout
from ailurus_hf.data.images import ImageFileError, read_image
from ailurus_hf.data.label_maps import label_array, pair_files, read_labels
from ailurus_hf.data.layouts import CITYSCAPES_CLASSES
from ailurus_hf.evaluation import ConfusionMatrix
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


def test_camvid_classes_with_holes_and_of_one_name(tmp_path):
    write_camvid(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps({"id2label": {"0": "a", "3": "a"}, "ignore_index": IGNORE}))
    source = SegmentationFolder.camvid(tmp_path)
    assert source.id2label == {0: "a (0)", 1: "LABEL_1", 2: "LABEL_2", 3: "a (3)"}
    assert source.rule.num_labels == NUM_LABELS
    assert source[0].labels.shape == (40, 56)


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


def png(values, bits):
    """A grey PNG of 1, 2, 4, 8 or 16 bits, as annotation tools write them and Pillow does not."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = values.shape
    shifts = np.arange(bits - 1, -1, -1)
    rows = np.packbits(((values[..., None] >> shifts) & 1).reshape(height, -1).astype(np.uint8), axis=1)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_labels_are_the_numbers_that_are_stored(tmp_path, bits):
    values = np.random.default_rng(bits).integers(2**bits, size=(8, 13))
    (tmp_path / "map.png").write_bytes(png(values, bits))
    np.testing.assert_array_equal(read_labels(tmp_path / "map.png"), values)
    with Image.open(tmp_path / "map.png") as image:  # one that is not decoded yet
        np.testing.assert_array_equal(label_array(image, "map"), values)
    Image.new("RGB", (13, 8)).save(tmp_path / "image.png")
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "image.png")], "label": [str(tmp_path / "map.png")]})
    for column in ("image", "label"):
        rows = rows.cast_column(column, datasets.Image())
    np.testing.assert_array_equal(HubSegmentation(rows)[0].labels, values)
    assert isinstance(rows[0]["label"], Image.Image)  # the user's data set stays as it was


@pytest.mark.parametrize(("magic", "largest"), [(b"P5", 15), (b"P5", 100), (b"P2", 3), (b"P5", 1000)])
def test_numbers_of_portable_grey_maps(tmp_path, magic, largest):
    values = np.random.default_rng(largest).integers(largest + 1, size=(5, 7))
    stored = values.astype(">u2" if largest > 255 else "u1").tobytes()
    text = " ".join(map(str, values.ravel())).encode()
    (tmp_path / "map.pgm").write_bytes(magic + b" 7 5 %d\n" % largest + (text if magic == b"P2" else stored))
    np.testing.assert_array_equal(read_labels(tmp_path / "map.pgm"), values)


def test_binary_labels_score_as_what_they_are(tmp_path):
    """One bit or eight: the same mean IoU."""
    truth = np.random.default_rng(0).integers(2, size=(40, 56))
    scores = []
    for bits in (1, 8):
        (tmp_path / "map.png").write_bytes(png(truth, bits))
        matrix = ConfusionMatrix(2)
        matrix.update(
            torch.tensor(np.ones_like(truth)), torch.tensor(LabelRule(2)(read_labels(tmp_path / "map.png"), ""))
        )
        scores.append(matrix.mean_iou())
    assert scores[0] == scores[1]


def test_arrays_and_numbers_of_32_bits(tmp_path):
    values = np.array([[-100, 0, 70000], [2**31 - 1, -(2**31), 1]])
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "map.tif")
    np.testing.assert_array_equal(read_labels(tmp_path / "map.tif"), values)
    np.testing.assert_array_equal(label_array(values > 0, "mask"), values > 0)


def test_hub_pictures_are_read_like_files(tmp_path):
    """16 bits are scaled; embedded bytes and paths give the same."""
    grey = (np.arange(20, dtype=np.uint16) * 3000).reshape(4, 5)
    Image.fromarray(grey).save(tmp_path / "image.png")
    write_labels(tmp_path / "label.png", np.zeros((4, 5)))
    path, label = str(tmp_path / "image.png"), str(tmp_path / "label.png")
    for picture in (path, {"bytes": (tmp_path / "image.png").read_bytes(), "path": None}):
        rows = datasets.Dataset.from_dict(
            {"image": [picture], "label": [label]},
            features=datasets.Features({"image": datasets.Image(), "label": datasets.Image()}),
        )
        found = np.asarray(HubSegmentation(rows)[0].image)
        np.testing.assert_array_equal(found, np.asarray(read_image(tmp_path / "image.png")))
        assert 0 < found.mean() < 200
    formatted = rows.with_transform(
        lambda batch: {"image": [Image.new("RGB", (5, 4))], "label": [np.ones((4, 5), int)]}
    )
    assert HubSegmentation(formatted)[0].labels.all()


def turned_picture(folder, orientation, size=(40, 56)):
    """A JPEG with an orientation, and the labels' file beside it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, labels = labelled_picture(0, *size)
    save(folder / "images" / "a.jpg", image)
    image.save(folder / "images" / "a.jpg", exif=exif, quality=95)
    write_labels(folder / "labels" / "a.png", labels)
    return SegmentationFolder(pair_files(folder / "images", folder / "labels")), labels


def test_labels_of_pictures_that_exif_turns(tmp_path, caplog):
    source, labels = turned_picture(tmp_path, 6)
    with pytest.raises(ValueError, match=r"a\.png is 56 x 40 .* is 40 x 56, turned upright by its EXIF orientation 6"):
        source[0]
    write_labels(tmp_path / "labels" / "a.png", np.rot90(labels, -1))
    assert source[0].labels.shape == (56, 40)
    assert not caplog.text
    for orientation, size in ((3, (40, 56)), (6, (48, 48))):
        source, _ = turned_picture(tmp_path / str(orientation), orientation, size)
        caplog.clear()
        assert source[0].labels.shape == size
        assert f"turned upright by its EXIF orientation {orientation}; its labels" in caplog.text
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "labels" / "a.png", exif=exif)
    np.testing.assert_array_equal(read_labels(tmp_path / "labels" / "a.png"), np.rot90(labels, -1))


def test_label_files_of_every_name(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.JPG", "d.png", "._a.jpg", "Thumbs.db"):
        save(tmp_path / "images" / name, Image.new("RGB", (4, 4))) if name != "Thumbs.db" else None
    (tmp_path / "images" / "Thumbs.db").write_text("")
    labels = tmp_path / "labels"
    for name in ("a.PNG", "b.tif", "c.TIFF", "d.png", "d.tif", "._d.png"):
        save(labels / name, Image.new("L", (4, 4)))
    pairs = pair_files(tmp_path / "images", labels)
    assert [label.name for _, label in pairs] == ["a.PNG", "b.tif", "c.TIFF", "d.png"]
    save(tmp_path / "images" / "a.png", Image.new("RGB", (4, 4)))
    with pytest.raises(ValueError, match=r"2 pictures would all have the label map a\.png: .*a\.jpg, .*a\.png"):
        pair_files(tmp_path / "images", labels)


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
