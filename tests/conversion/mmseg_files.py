"""Tiny checkpoints in mmsegmentation's layouts, and the models they come from, made of torch's own layers."""

import re
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import interpolate, normalize, pad

WIDTH, PATCH, GRID, CLASSES = 24, 8, (4, 6), ("a", "b", "c", "d")
PALETTE = [[128, 64, 128], [1, 2, 3], [4, 5, 6], [7, 8, 9]]
CONFIG = """
backbone_norm_cfg = dict(type='LN', eps=1e-6, requires_grad=True)
norm_cfg = dict(type='SyncBN', requires_grad=True)
data = dict(type='SegDataPreProcessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=data,
    backbone=dict(
        type='VisionTransformer', img_size=(32, 48), patch_size=8, embed_dims=24, num_layers=3, num_heads=3,
        out_indices=(0, 1, 2), drop_rate=0.1, norm_cfg=backbone_norm_cfg, with_cls_token=True,
        interpolate_mode='MODE'),
    decode_head=HEAD,
    auxiliary_head=[dict(type='SETRUPHead', in_channels=24, channels=10, in_index=0, num_classes=4)],
    test_cfg=TEST)
"""
SETR = """dict(
        type='SETRUPHead', in_channels=24, channels=10, in_index=2, num_classes=4, dropout_ratio=0, norm_cfg=norm_cfg,
        num_convs=NUM, up_scale=SCALE, kernel_size=KERNEL, align_corners=False)"""
HEADS = {
    "mask": "dict(type='SegmenterMaskTransformerHead', in_channels=24, channels=24, num_classes=4, num_layers=2, "
    "num_heads=2, embed_dims=24, in_index=2)",
    "linear": "dict(type='FCNHead', in_channels=24, channels=24, num_convs=0, concat_input=False, num_classes=4)",
    "naive": SETR.replace("NUM", "1").replace("SCALE", "4").replace("KERNEL", "1"),
    "pup": SETR.replace("NUM", "4").replace("SCALE", "2").replace("KERNEL", "3"),
}


class Mmseg(nn.Module):
    """Segmenter or SETR with mmsegmentation's names, but for those inside a transformer layer.

    Args:
        head: one of `HEADS`.
        mode: how positions are resized.
        plain: without the bias of the patches and without the last norm, which some versions do not have.
        head_width: width of the mask head's tokens.
    """

    NAMES: ClassVar = {
        "self_attn.": "attn.attn.", "linear1.": "ffn.layers.0.0.", "linear2.": "ffn.layers.1.", "norm1.": "ln1.",
        "norm2.": "ln2.",
    }  # fmt: skip

    def __init__(self, head: str, mode: str, plain: bool = False, head_width: int = WIDTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.mode = head, mode
        self.backbone, self.decode_head = nn.Module(), nn.Module()
        self.backbone.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.backbone.pos_embed = nn.Parameter(torch.randn(1, 1 + GRID[0] * GRID[1], WIDTH))
        projection = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=not plain)
        self.backbone.patch_embed = nn.ModuleDict({"projection": projection})
        self.backbone.layers = _layers(3, heads=3, eps=1e-6)
        if head in ("mask", "linear") and not plain:
            self.backbone.ln1 = nn.LayerNorm(WIDTH, eps=1e-6)
        if head == "mask":
            self._add_mask_head(head_width)
        elif head == "linear":
            self.decode_head.conv_seg = nn.Conv2d(WIDTH, len(CLASSES), 1)
        else:
            self._add_setr_head(*((1, 4, 1) if head == "naive" else (4, 2, 3)))
        _shake(self)

    def _add_mask_head(self, width: int) -> None:
        head = self.decode_head
        head.cls_emb = nn.Parameter(torch.randn(1, len(CLASSES), width))
        head.layers = _layers(2, heads=2, eps=1e-5, width=width)
        head.dec_proj = nn.Linear(WIDTH, width)
        head.patch_proj = nn.Linear(width, width, bias=False)
        head.classes_proj = nn.Linear(width, width, bias=False)
        head.decoder_norm, head.mask_norm = nn.LayerNorm(width), nn.LayerNorm(len(CLASSES))

    def _add_setr_head(self, num_convs: int, up_scale: int, kernel_size: int) -> None:
        self.decode_head.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.decode_head.up_convs = nn.ModuleList()
        for width in [WIDTH] + [10] * (num_convs - 1):
            conv = nn.Conv2d(width, 10, kernel_size, padding="same", bias=False)
            block = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(10), activate=nn.ReLU()))
            upsample = nn.Upsample(scale_factor=up_scale, mode="bilinear")
            self.decode_head.up_convs.append(nn.Sequential(block, upsample))
        self.decode_head.conv_seg = nn.Conv2d(10, len(CLASSES), 1)

    def names(self) -> dict[str, torch.Tensor]:
        """The tensors under mmsegmentation's names, with an auxiliary head used only in training."""
        tensors = {}
        for key, tensor in self.state_dict().items():
            for old, new in self.NAMES.items():
                key = key.replace(old, new) if ".layers." in key else key
            tensors[key] = tensor
        return tensors | {"auxiliary_head.0.conv_seg.weight": torch.zeros(4, 10, 1, 1)}

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (batch_size, num_labels, height, width)."""
        height, width = images.shape[-2:]
        maps = self.backbone.patch_embed["projection"](pad(images, (0, -width % PATCH, 0, -height % PATCH)))
        grid, positions = maps.shape[-2:], self.backbone.pos_embed
        if grid.numel() != GRID[0] * GRID[1]:
            old = positions[:, 1:].mT.unflatten(2, GRID)
            new = interpolate(old, size=grid, mode=self.mode).flatten(2).mT
            positions = torch.cat([positions[:, :1], new], dim=1)
        tokens = torch.cat([self.backbone.cls_token.expand(len(images), -1, -1), maps.flatten(2).mT], dim=1) + positions
        for layer in self.backbone.layers:
            tokens = layer(tokens)
        tokens = self.backbone.ln1(tokens) if hasattr(self.backbone, "ln1") else tokens
        return interpolate(self._head(tokens[:, 1:], grid), size=(height, width), mode="bilinear")

    def _head(self, patches: torch.Tensor, grid: torch.Size) -> torch.Tensor:
        head = self.decode_head
        if self.kind == "linear":
            return head.conv_seg(patches.mT.unflatten(2, grid))
        if self.kind == "mask":
            tokens = torch.cat([head.dec_proj(patches), head.cls_emb.expand(len(patches), -1, -1)], dim=1)
            for layer in head.layers:
                tokens = layer(tokens)
            tokens = head.decoder_norm(tokens)
            patches = normalize(head.patch_proj(tokens[:, : -len(CLASSES)]), dim=2)
            classes = normalize(head.classes_proj(tokens[:, -len(CLASSES) :]), dim=2)
            return head.mask_norm(patches @ classes.mT).mT.unflatten(2, grid)
        maps = head.norm(patches).mT.unflatten(2, grid)
        for step in head.up_convs:
            maps = step(maps)
        return head.conv_seg(maps)


def _layers(count: int, heads: int, eps: float, width: int = WIDTH) -> nn.ModuleList:
    return nn.ModuleList(
        nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", eps, batch_first=True, norm_first=True)
        for _ in range(count)
    )


@torch.no_grad()
def _shake(model: nn.Module) -> None:
    """Norms, biases and statistics become random too, so that every tensor matters; counters become 1234."""
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(1234)
        elif tensor.ndim == 1:
            tensor.add_(torch.rand_like(tensor) * 0.5)


def write_mmseg(
    folder: Path,
    head: str,
    layout: str = "1.x",
    replaced: Mapping[str, str] | None = None,
    plain: bool = False,
    tensors: Mapping[str, torch.Tensor] | None = None,
    head_width: int = WIDTH,
    **changes: str,
) -> Mmseg:
    """Write a checkpoint; return the model it is of, in evaluation mode.

    Args:
        head: one of `HEADS`.
        layout: "0.x" (plain values) or "1.x" (with objects beside the weights, as mmengine writes them).
        replaced: texts of the config -> other texts.
        plain: see `Mmseg`.
        tensors: more tensors, or others of the same names.
        head_width: width of the mask head's tokens.
        changes: settings of the config, by name, the first of that name -> other values.
    """
    mode = "bicubic" if head in ("mask", "linear") else "bilinear"
    test = "dict(mode='slide', crop_size=(32, 32), stride=(24, 24))" if head == "mask" else "dict(mode='whole')"
    text = CONFIG.replace("HEAD", HEADS[head]).replace("TEST", test)
    for old, new in (replaced or {}).items():
        assert old in text
        text = text.replace(old, new)
    text = text.replace("MODE", mode).replace("num_heads=2, embed_dims=24", f"num_heads=2, embed_dims={head_width}")
    for key, value in changes.items():
        text, count = re.subn(rf"\b{key}=(\([^)]*\)|[^,()]+)", f"{key}={value}", text, count=1)
        assert count == 1
    model = Mmseg(head, "bilinear" if "bilinear" in text else mode, plain, head_width).eval()
    content = {"state_dict": model.names() | dict(tensors or {})}
    if layout == "0.x":
        content["meta"] = {"config": text, "CLASSES": CLASSES, "PALETTE": PALETTE}
    else:
        content["meta"] = {"cfg": text, "dataset_meta": {"classes": CLASSES, "palette": PALETTE}}
        content["message_hub"] = {"log": Namespace(loss=1.0)}
    folder.mkdir()
    torch.save(content, folder / "iter_2.pth")
    return model
