import numpy as np
import pytest
from PIL import Image

from ailurus_hf.evaluation import ClusterMap, Segmentation
from ailurus_hf.visualization import adaptive_resolution_figure, colour_labels, indexed_image, model_palette, overlay
from ailurus_hf.visualization.figure import cluster_borders
from tests.factories import tiny_config

PALETTE = np.array([[10, 20, 30], [200, 100, 0], [0, 255, 0]], dtype=np.uint8)
LABELS = np.array([[0, 1, 2, 1], [2, 2, 0, 0]])


def test_indexed_image_keeps_class_ids(tmp_path):
    indexed_image(LABELS, PALETTE).save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture), LABELS)
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), PALETTE[LABELS])


def test_more_classes_than_a_palette_holds(tmp_path):
    labels = np.array([[0, 300], [299, 1]])
    indexed_image(labels, np.zeros((301, 3), dtype=np.uint8)).save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), labels)


def test_colours():
    np.testing.assert_array_equal(np.asarray(colour_labels(LABELS, PALETTE)), PALETTE[LABELS])
    grey = Image.new("RGB", (4, 2), (100, 100, 100))
    np.testing.assert_allclose(np.asarray(overlay(grey, LABELS, PALETTE)), PALETTE[LABELS] / 2 + 50, atol=1)


@pytest.mark.parametrize("num_labels", [2, 11, 150, 256])
def test_standard_palette_tells_classes_apart(num_labels):
    palette = model_palette(tiny_config(num_labels=num_labels))
    assert palette.shape == (num_labels, 3)
    assert palette[0].tolist() == [128, 0, 0]
    assert len({tuple(colour) for colour in palette.tolist()}) == num_labels


def test_palette_of_the_configuration_wins():
    config = tiny_config(num_labels=3, palette=PALETTE.tolist())
    np.testing.assert_array_equal(model_palette(config), PALETTE)


def test_borders_lie_between_different_clusters():
    borders = cluster_borders(np.array([[0, 0, 1], [2, 0, 1]]), (10, 20)).tolist()
    assert borders == [[[0, 10], [20, 10]], [[40, 0], [40, 10]], [[20, 10], [20, 20]], [[40, 10], [40, 20]]]
    assert cluster_borders(np.zeros((3, 3), dtype=int), (10, 20)).shape == (0, 2, 2)


@pytest.fixture
def segmentations():
    labels = np.repeat(np.repeat(LABELS, 8, 0), 8, 1)
    other = labels.copy()
    other[:4] = 0
    clusters = np.array([[0, 0, 1, 2], [3, 0, 1, 1]])
    identity = np.arange(8).reshape(2, 4)
    dense = Segmentation(labels, (ClusterMap("", identity, (8, 8)),))
    return dense, Segmentation(other, (ClusterMap("", clusters, (8, 8)),))


def test_figure_shows_the_five_panels(segmentations, tmp_path):
    dense, merged = segmentations
    image = Image.new("RGB", (32, 16), (90, 90, 90))
    figure = adaptive_resolution_figure(image, dense, merged, PALETTE, ["road", "car", "tree"])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "Image: 16 x 32 pixels", "Clusters: 4 of 8 tokens (50%)", "", "Dense: every layer on all tokens",
        "Merged: later layers on the clusters", "Different: 18.8% of the pixels, in red",
    ]  # fmt: skip
    assert {text.get_text() for text in figure.axes[2].get_legend().get_texts()} == {"road", "car", "tree"}
    figure.savefig(tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.size[0] > 400


@pytest.mark.parametrize("num_merging", [0, 1, 2, 3, 4, 5])
def test_figure_has_a_panel_for_every_stage_that_merges(segmentations, num_merging):
    dense, merged = segmentations
    clusters, identity = merged.clusters, dense.clusters
    stages = [ClusterMap(f"stage {number}", identity, (8, 8)) for number in range(1, 7)]
    for index in range(num_merging):
        stages[-1 - index] = ClusterMap(f"stage {6 - index}", clusters, (8, 8))
    dense, several = (Segmentation(found.labels[:, :30], tuple(stages)) for found in (dense, merged))
    assert (several.clusters, several.patch_size, several.num_tokens) == (None, None, None)
    figure = adaptive_resolution_figure(Image.new("RGB", (30, 16)), dense, several, PALETTE, ["a", "b", "c"])
    titles = [axes.get_title() for axes in figure.axes if axes.get_title().startswith("Stage")]
    expected = [f"Stage {number}: 4 of 8 tokens (50%)" for number in range(7 - num_merging, 7)]
    assert titles == (expected or ["Stage 6: 8 of 8 tokens (100%)"])
    assert all(axes.get_xlim() == (0, 30) for axes in figure.axes if axes.get_title())
    assert sum(axes.get_legend() is not None for axes in figure.axes) == 1


def test_figure_needs_clusters(segmentations):
    dense, merged = segmentations
    image = Image.new("RGB", (32, 16))
    with pytest.raises(ValueError, match="merged must have clusters"):
        adaptive_resolution_figure(image, dense, merged._replace(stages=()), PALETTE, ["a", "b", "c"])
