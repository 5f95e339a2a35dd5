import os

import numpy as np
import pytest
from PIL import Image

from ailurus_hf.data.images import ImageFileError, list_images, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_folders_are_listed_in_order_and_files_kept_as_given(tmp_path):
    for name in ("b.PNG", "a.jpg", "notes.txt", "c.tif"):
        (tmp_path / name).write_bytes(b"")
    single = tmp_path / "notes.txt"
    assert [path.name for path in list_images([tmp_path, single])] == ["a.jpg", "b.PNG", "c.tif", "notes.txt"]


def test_missing_paths_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing does not exist; expected a picture or a folder"):
        list_images([tmp_path / "nothing"])
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        list_images([tmp_path])


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    picture = Image.fromarray(PIXELS).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture.save(path)
    read = read_image(path)
    assert read.mode == "RGB"
    assert read.size == (30, 20)
    expected = picture.convert("RGB")
    np.testing.assert_array_equal(np.asarray(read), np.asarray(expected))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (20, 30)


def test_refuses_what_is_no_single_picture(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    with pytest.raises(ImageFileError, match=r"a\.png is empty; expected a picture"):
        read_image(path)
    path.write_text("no picture")
    with pytest.raises(ImageFileError, match=r"a\.png is not a picture that Pillow can read"):
        read_image(path)
    Image.fromarray(PIXELS).save(path)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ImageFileError, match=r"a\.png is damaged or cut short"):
        read_image(path)
    frames = [Image.fromarray(np.full((8, 8), value, dtype=np.uint8)) for value in (0, 100, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageFileError, match=r"a\.gif is animated \(3 frames\); expected a single picture"):
        read_image(tmp_path / "a.gif")
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageFileError, match=r"a\.tif has floating-point pixels; expected 8 or 16 bits"):
        read_image(tmp_path / "a.tif")
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "missing.png")


def test_litter_is_passed_over_and_folders_are_searched(tmp_path):
    for name in ("b.jpg", "._b.jpg", "Thumbs.db", ".DS_Store", "below/a.jpg", "below/._a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def names(paths, **settings):
        return [str(path.relative_to(tmp_path)) for path in list_images(paths, **settings)]

    assert names([tmp_path]) == ["b.jpg"]
    assert names([tmp_path], recursive=True) == ["b.jpg", "below/a.jpg"]
    assert names([file for file in sorted(tmp_path.iterdir()) if file.is_file()]) == ["b.jpg"]
    with pytest.raises(FileNotFoundError, match="no pictures among the files"):
        list_images([tmp_path / "Thumbs.db"])


def test_first_of_what_phones_drones_and_scanners_write(tmp_path):
    first, other = Image.fromarray(PIXELS), Image.new("RGB", (30, 20))
    Image.new("RGB", (30, 20), (200, 100, 0)).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[other])
    assert np.asarray(read_image(tmp_path / "a.jpg")).mean() == pytest.approx(100, abs=2)
    first.save(tmp_path / "a.tif", save_all=True, append_images=[first.resize((15, 10)), first.resize((7, 5))])
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.tif")), PIXELS)
    first.resize((15, 10)).save(tmp_path / "a.tif", save_all=True, append_images=[first])  # the preview first
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.tif")), PIXELS)
    mask = Image.new("RGB", (30, 20))
    mask.encoderinfo = {"tiffinfo": {254: 4}}  # of the picture's size
    first.save(tmp_path / "a.tif", save_all=True, append_images=[mask])
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.tif")), PIXELS)
    first.save(tmp_path / "a.tif", save_all=True, append_images=[first])
    with pytest.raises(ImageFileError, match=r"a\.tif is animated \(2 frames\)"):
        read_image(tmp_path / "a.tif")


def test_pictures_above_the_limit_of_pillow(tmp_path, monkeypatch):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    for limit in (200, 500):  # Pillow refuses what is above twice the limit, and warns of what is above once
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ImageFileError, match=r"a\.png has more pixels than Pillow's limit .*MAX_IMAGE_PIXELS"):
            read_image(tmp_path / "a.png")


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, said in (("folder", "is a folder, not a picture"), ("link", "is a link to"), ("pipe", "no regular file")):
        with pytest.raises(ImageFileError, match=rf"{name}\.png {said}" if name != "pipe" else rf"pipe\.png is {said}"):
            read_image(tmp_path / f"{name}.png")
    assert len(list_images([tmp_path])) == 3
