"""The main job on real photographs: slow, and only where the data lies beside the project."""

import numpy as np
import pytest
import torch
from PIL import Image

from ailurus_hf import AiluRusForSemanticSegmentation, AiluRusImageProcessor, convert_checkpoint
from ailurus_hf.evaluation import ConfusionMatrix, segment_image
from ailurus_hf.images import list_images, read_image
from tests.paths import shared

UNLABELLED = 11


@pytest.mark.slow
def test_camvid_quality_dense_and_merged(tmp_path):
    """Dense as the original code scores (0.4760); merged with little loss, and most pixels as in the dense model."""
    frames = shared("camvid", "val")
    convert_checkpoint("segmenter", shared("segmenter-camvid"), tmp_path / "model")
    model = AiluRusForSemanticSegmentation.from_pretrained(tmp_path / "model").eval()
    processor = AiluRusImageProcessor.from_pretrained(tmp_path / "model")
    quality = {ratio: ConfusionMatrix(11, UNLABELLED) for ratio in (1.0, 0.5, 0.25)}
    dense = np.zeros(0)
    agreement: dict[float, list[float]] = {ratio: [] for ratio in quality}
    for file in list_images([frames / "images"]):
        picture = read_image(file)
        with Image.open(frames / "labels" / f"{file.stem}.png") as labels:
            truth = torch.tensor(np.asarray(labels))
        for ratio, matrix in quality.items():
            model.config.keep_ratio = ratio
            found = segment_image(model, processor, picture).labels
            dense = found if ratio == 1 else dense
            matrix.update(torch.tensor(found), truth)
            agreement[ratio].append((found == dense).mean())
    assert quality[1.0].mean_iou() == pytest.approx(0.4760, abs=3e-4)
    assert quality[0.5].mean_iou() > 0.4725
    assert quality[0.25].mean_iou() > 0.4660
    assert np.mean(agreement[0.5]) >= 0.938
    assert np.mean(agreement[0.25]) >= 0.894
