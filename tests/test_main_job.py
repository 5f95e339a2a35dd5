"""The main job on real photographs: slow, and only where the data lies beside the project."""

import pytest

from ailurus_hf import AiluRusForSemanticSegmentation, AiluRusImageProcessor, convert_checkpoint
from ailurus_hf.data import SegmentationFolder
from ailurus_hf.data.label_maps import pair_files
from ailurus_hf.data.labelled import LabelRule
from ailurus_hf.evaluation import evaluate_segmentation
from tests.paths import shared

UNLABELLED = 11


@pytest.mark.slow
def test_camvid_quality_dense_and_merged(tmp_path):
    """Dense as the original code scores (0.4760); merged with little loss, and most pixels as in the dense model."""
    frames = shared("camvid", "val")
    convert_checkpoint("segmenter", shared("segmenter-camvid"), tmp_path / "model")
    model = AiluRusForSemanticSegmentation.from_pretrained(tmp_path / "model").eval()
    processor = AiluRusImageProcessor.from_pretrained(tmp_path / "model")
    samples = SegmentationFolder(pair_files(frames / "images", frames / "labels"), LabelRule(11, UNLABELLED))
    report = evaluate_segmentation(model, processor, samples, (1, 0.5, 0.25), ignore_index=UNLABELLED)
    dense, half, quarter = report.rows()
    assert dense["mean_iou"] == pytest.approx(0.4760, abs=3e-4)
    assert half["mean_iou"] > 0.4725
    assert quarter["mean_iou"] > 0.4660
    assert half["agreement"] >= 0.938
    assert quarter["agreement"] >= 0.894
