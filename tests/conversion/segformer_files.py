"""Tiny SegFormer checkpoints of three origins, and what the originals compute, from transformers' own class."""

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import interpolate
from transformers import SegformerConfig, SegformerForSemanticSegmentation

HEADS = (1, 2, 3, 4)
DEPTHS = (1, 2, 2, 1)
ORIGINS = ("transformers", "transformers 4", "nvlabs", "mmseg")
Forward = Callable[[torch.Tensor], torch.Tensor]


def native(**settings: Any) -> SegformerForSemanticSegmentation:
    """transformers' model with random weights, norms and batch statistics included."""
    torch.manual_seed(0)
    sizes = {"depths": DEPTHS, "hidden_sizes": (16, 32, 48, 64), "num_attention_heads": HEADS}
    config = SegformerConfig(**{**sizes, "decoder_hidden_size": 24, "num_labels": 5, **settings})
    model = SegformerForSemanticSegmentation(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.decode_head.batch_norm.running_mean.normal_()
    return model


class MmsegHead(nn.Module):
    """The head as mmsegmentation has it, with its names: batch norms at each level, and the first stage first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.convs = nn.ModuleList(_conv(width) for width in (16, 32, 48, 64))
        self.fusion_conv = _conv(4 * 24)
        self.conv_seg = nn.Conv2d(24, 5, 1)
        for tensor in self.state_dict().values():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.5)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        levels = [conv(level) for conv, level in zip(self.convs, maps, strict=True)]
        levels = [interpolate(level, size=levels[0].shape[-2:], mode="bilinear") for level in levels]
        return self.conv_seg(self.fusion_conv(torch.cat(levels, dim=1)))


def _conv(width: int) -> nn.Sequential:
    conv = nn.Conv2d(width, 24, 1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(24), activate=nn.ReLU()))


IMAGENET = "mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]"
# what configs say of pictures, by origin
PICTURES = {
    "nvlabs": f"img_norm_cfg = dict({IMAGENET}, to_rgb=True)",
    "mmseg": f"data_preprocessor = dict({IMAGENET}, bgr_to_rgb=True)",
}


def write_segformer(folder: Path, origin: str, settings: str | None = None) -> Forward:
    """Write a checkpoint; return what the original computes: quarter-size logits (batch_size, num_labels, h, w).

    Args:
        origin: one of `ORIGINS`.
        settings: more lines of the config of NVlabs' or mmsegmentation's; by default what `PICTURES` has.
    """
    folder.mkdir(parents=True)
    model = native()
    if origin in ("transformers", "transformers 4"):
        model.save_pretrained(folder)  # under the old names, as transformers 5 still does
        if origin == "transformers":
            save_file(model.state_dict(), folder / "model.safetensors")
        return lambda pixel_values: model(pixel_values).logits
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            special = "patch_embeddings" in name or "sequence_reduction" in name
            module.eps = 1e-5 if origin == "nvlabs" and special else 1e-6
    config = PICTURES[origin] if settings is None else settings
    config = f"unread = dict(num_heads={list(HEADS)}, f=f())\n{config}"
    meta: dict[str, Any] = {"config" if origin == "nvlabs" else "cfg": config}
    if origin == "nvlabs":
        tensors = _nvlabs_tensors(model.state_dict())
        torch.save({"state_dict": tensors, "meta": meta | {"CLASSES": tuple("abcde")}}, folder / "iter_1.pth")
        return lambda pixel_values: model(pixel_values).logits
    meta["dataset_meta"] = {"classes": tuple("abcde"), "reduce_zero_label": True}
    head = MmsegHead().eval()
    tensors = _mmseg_backbone(model.state_dict())
    tensors |= {f"decode_head.{name}": tensor for name, tensor in head.state_dict().items()}
    content = {"state_dict": tensors, "meta": meta, "message_hub": Namespace(log=1)}
    torch.save(content, folder / "iter_1.pth")
    return lambda pixel_values: head(model(pixel_values, output_hidden_states=True).hidden_states)


def _nvlabs_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {}
    for stage, depth in enumerate(DEPTHS):
        native_stage, number = f"segformer.stages.{stage}.", stage + 1
        names = {f"backbone.patch_embed{number}.proj": "patch_embeddings.proj"}
        names |= {f"backbone.patch_embed{number}.norm": "patch_embeddings.layer_norm"}
        names |= {f"backbone.norm{number}": "layer_norm"}
        for block in range(depth):
            old, new = f"blocks.{block}.", f"backbone.block{number}.{block}."
            names |= {f"{new}norm1": f"{old}layernorm_before", f"{new}norm2": f"{old}layernorm_after"}
            names |= {f"{new}attn.q": f"{old}attention.q_proj", f"{new}attn.proj": f"{old}attention.o_proj"}
            names |= {f"{new}mlp.{name}": f"{old}mlp.{name}" for name in ("fc1", "fc2", "dwconv.dwconv")}
            names |= _reduction(f"{new}attn.", f"{old}attention.sequence_reduction.", state, native_stage)
            for part in ("weight", "bias"):
                key, value = (state[f"{native_stage}{old}attention.{name}_proj.{part}"] for name in "kv")
                tensors[f"{new}attn.kv.{part}"] = torch.cat([key, value])
        tensors |= _affine(names, state, native_stage)
        level = {f"decode_head.linear_c{number}.proj": f"decode_head.linear_projections.{stage}.proj"}
        tensors |= _affine(level, state)
    tensors |= _affine({"decode_head.linear_pred": "decode_head.classifier"}, state)
    tensors |= {
        f"decode_head.linear_fuse.bn.{name}": state[f"decode_head.batch_norm.{name}"]
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    unused = {"decode_head.conv_seg.weight": torch.ones(5, 24, 1, 1), "decode_head.conv_seg.bias": torch.ones(5)}
    return tensors | unused | {"decode_head.linear_fuse.conv.weight": state["decode_head.linear_fuse.weight"]}


def _mmseg_backbone(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {}
    for stage, depth in enumerate(DEPTHS):
        native_stage, layer = f"segformer.stages.{stage}.", f"backbone.layers.{stage}."
        names = {f"{layer}0.projection": "patch_embeddings.proj", f"{layer}0.norm": "patch_embeddings.layer_norm"}
        names |= {f"{layer}2": "layer_norm"}
        for block in range(depth):
            old, new = f"blocks.{block}.", f"{layer}1.{block}."
            names |= {f"{new}norm1": f"{old}layernorm_before", f"{new}norm2": f"{old}layernorm_after"}
            names |= {f"{new}attn.attn.out_proj": f"{old}attention.o_proj"}
            names |= {f"{new}ffn.layers.{number}": f"{old}mlp.{name}" for number, name in MLP.items()}
            names |= _reduction(f"{new}attn.", f"{old}attention.sequence_reduction.", state, native_stage)
            for part in ("weight", "bias"):
                qkv = [state[f"{native_stage}{old}attention.{name}_proj.{part}"] for name in "qkv"]
                tensors[f"{new}attn.attn.in_proj_{part}"] = torch.cat(qkv)
        tensors |= _affine(names, state, native_stage)
    return {
        name: tensor[..., None, None] if ".ffn.layers." in name and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }


MLP = {0: "fc1", 1: "dwconv.dwconv", 4: "fc2"}


def _reduction(new: str, old: str, state: dict[str, torch.Tensor], stage: str) -> dict[str, str]:
    if f"{stage}{old}layer_norm.weight" not in state:  # the last stage reduces nothing
        return {}
    return {f"{new}sr": f"{old}sequence_reduction", f"{new}norm": f"{old}layer_norm"}


def _affine(names: dict[str, str], state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    return {
        f"{new}.{part}": state[f"{prefix}{old}.{part}"] for new, old in names.items() for part in ("weight", "bias")
    }
