"""The model card says what a checkpoint is, how to load it, its licence and whom to cite."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ailurus_hf.hub.model_card import CardSource, build_model_card
from tests.factories import tiny_config

SOURCE = CardSource("official Segmenter", "checkpoint.pth", "ab" * 32, "https://example.org", "@misc{x}")


def test_round_trip(tmp_path: Path) -> None:
    card = build_model_card(tiny_config(), source=SOURCE, license="mit")
    card.save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "image-segmentation")
    assert "ailurus" in data.tags


def test_source_is_named() -> None:
    text = build_model_card(tiny_config(keep_ratio=0.25), source=SOURCE).content
    for part in (
        "checkpoint.pth",
        "ab" * 32,
        "https://example.org",
        "@misc{x}",
        "2311.01197",
        "25% of the tokens",
        "6 x 6",
    ):
        assert part in text
    assert "license: unknown" in text


def test_without_source() -> None:
    text = build_model_card(tiny_config(num_clusters=9)).content
    assert "9 tokens" in text
    assert "Converted" not in text
    assert "2311.01197" in text


@pytest.mark.parametrize(
    ("model_class", "task"),
    [
        ("AiluRusForSemanticSegmentation", "image-segmentation"),
        ("AiluRusForImageClassification", "image-classification"),
        ("AiluRusModel", "image-feature-extraction"),
        ("AiluRusBackbone", "image-feature-extraction"),
    ],
)
@pytest.mark.parametrize("remote_code", [False, True])
def test_loading_example_is_valid_python(model_class: str, task: str, remote_code: bool) -> None:
    card = build_model_card(tiny_config(), model_class=model_class, remote_code=remote_code, repo="me/model")
    assert card.data.pipeline_tag == task
    code = card.content.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert ("trust_remote_code=True" in code) == remote_code
    assert ("ailurus_hf" in code) == (not remote_code)
