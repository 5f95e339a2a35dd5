"""Commands load checkpoints strictly: each fault is an error that names it, where `from_pretrained` only warns."""

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from ailurus_hf import AiluRusForSemanticSegmentation
from ailurus_hf.cli.loading import load_model
from ailurus_hf.conversion import CheckpointError
from tests.factories import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(AiluRusForSemanticSegmentation).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of the saved weights; `None` removes one."""
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_loads_with_settings(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model(folder, keep_ratio=0.25, cluster_layer=None, dtype=torch.float16)
    assert (model.config.keep_ratio, model.config.cluster_layer, model.dtype) == (0.25, None, torch.float16)
    assert not model.training
    assert capfd.readouterr().err == ""


def test_dtype_of_the_file_by_default(folder: Path) -> None:
    assert load_model(folder).dtype == torch.float32


def test_missing_extra_and_misshapen_tensors(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rewrite(folder, **{"ailurus.layernorm.bias": None})
    with pytest.raises(CheckpointError, match=r"missing from the checkpoint .*: ailurus\.layernorm\.bias"):
        load_model(folder)
    rewrite(folder, **{"ailurus.layernorm.bias": torch.zeros(32), "surplus": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"unexpected in the checkpoint .*: surplus"):
        load_model(folder)
    rewrite(folder, **{"surplus": None, "ailurus.layernorm.bias": torch.zeros(31)})
    with pytest.raises(CheckpointError, match=r"wrong shape in the checkpoint .*: ailurus\.layernorm\.bias"):
        load_model(folder)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_weights(length: int, folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_model(folder)


def test_incomplete_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="is a file"):
        load_model(folder / "config.json")
    (folder / "model.safetensors").rename(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="no weights"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(folder)


def test_broken_config(folder: Path) -> None:
    for text, said in (
        ("{", "JSON"),
        ("[]", "model_type"),
        ('{"model_type": "vit"}', "'ailurus_segformer' or 'lookupvit', got 'vit'"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"config\.json .*{said}"):
            load_model(folder)


def test_settings_that_are_not_allowed(folder: Path) -> None:
    with pytest.raises(ValueError, match="keep_ratio") as caught:
        load_model(folder, keep_ratio=7)
    assert "\n" not in str(caught.value)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"keep_ratio": 0.5', '"keep_ratio": 0'))
    with pytest.raises(ValueError, match="keep_ratio"):
        load_model(folder)


def test_missing_shard(folder: Path) -> None:
    AiluRusForSemanticSegmentation.from_pretrained(folder).save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink()
    assert load_model(folder).config.num_labels == 5
    next(folder.glob("model-00002-*")).unlink()
    with pytest.raises((CheckpointError, OSError), match="model-00002"):
        load_model(folder)


# peft 0.21 reads a name that transformers 5.23 renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_peft_are_merged(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = AiluRusForSemanticSegmentation.from_pretrained(folder)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = load_model(tmp_path / "adapter", keep_ratio=1.0)
    assert type(loaded) is AiluRusForSemanticSegmentation
    pixel_values = torch.rand(1, 3, 48, 48)
    base.config.keep_ratio = 1.0
    torch.testing.assert_close(loaded(pixel_values).logits, adapted(pixel_values).logits)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"need peft: pip install '.\[peft\]'"):
        load_model(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        load_model(tmp_path / "adapter")
