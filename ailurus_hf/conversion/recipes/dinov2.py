"""The recipe for checkpoints of the original DINOv2, with and without registers.

DINOv2 (Oquab et al., 2023, arXiv 2304.07193; registers: Darcet et al., ICLR 2024; code:
https://github.com/facebookresearch/dinov2). Facts of the original code kept here:

- LayerNorm eps is 1e-6; MLP with exact GELU, or (ViT-g) SwiGLU with the gate's rows first; LayerScale;
- register tokens sit between the class token and the patches and have no positions;
- released models without registers resize positions bicubically by the scale (side + 0.1) / trained side; those with
  registers to the exact size and with antialiasing;
- `mask_token` is only used in training; FSDP checkpoints number their blocks `blocks.<chunk>.<block>`.
"""

from functools import partial

from ...modeling.modeling_ailurus import AiluRusModel
from ..reading.sources import find_weights
from ..recipe import Plan, Recipe, Sign, SourceCheckpoint
from ..references.vit import ViTForward
from ..rules import Drop, Rename, Rule, match
from .timm_style import BLOCK, IMAGENET, TimmParts, encoder_rules, encoder_settings, position_settings, read_bare

__all__ = ["RECIPE", "dinov2_parts", "dinov2_rules", "plan_dinov2"]

POSITION_OFFSET = 0.1  # without registers

CITATION = """@article{oquab2024dinov2,
  title   = {DINOv2: Learning Robust Visual Features without Supervision},
  author  = {Oquab, Maxime and Darcet, Timoth\\'ee and Moutakanni, Th\\'eo and others},
  journal = {Transactions on Machine Learning Research},
  year    = {2024}
}"""


def dinov2_parts(keys: frozenset[str]) -> TimmParts:
    """Which parts the checkpoint has: a `backbone.` prefix, registers, doubly numbered blocks."""
    prefix = "backbone." if any(key.startswith("backbone.") for key in keys) else ""
    chunked = Rename(f"{prefix}blocks.{{chunk}}.{{layer}}.{{rest:*}}", "")
    return TimmParts(
        keys, prefix, register_name="register_tokens", chunked=any(match(chunked, key) is not None for key in keys)
    )


def dinov2_rules(parts: TimmParts) -> tuple[Rule, ...]:
    """The whole table."""
    mask = Drop(f"{parts.prefix}mask_token", "stands for masked patches, used only in training", optional=True)
    heads = Drop("{head:dino_head|ibot_head}.{rest:*}", "a projection head, used only in training", optional=True)
    return (*encoder_rules(parts, target=""), mask, heads)


def plan_dinov2(checkpoint: SourceCheckpoint) -> Plan:
    """Make the plan from the tensors; `position_offset` and `position_antialias` may be set otherwise.

    Raises:
        CheckpointError: the tensors are not those of a ViT, or do not tell the number of heads or the grid.
    """
    parts = dinov2_parts(frozenset(checkpoint.tensors))
    config = encoder_settings(checkpoint, parts, prefix_positions=1)
    registers = config["num_register_tokens"] > 0
    offset = float(checkpoint.overrides.get("position_offset", 0.0 if registers else POSITION_OFFSET))
    antialias = bool(checkpoint.overrides.get("position_antialias", registers))
    config |= position_settings(offset, antialias)
    return Plan(
        config=config,
        rules=dinov2_rules(parts),
        processor=dict(IMAGENET),
        model_class=AiluRusModel,
        reference=ViTForward(config, parts.prefix, "register_tokens", antialias, offset),
        output="last_hidden_state",
        recorded={"x_norm_clstoken": "pooler_output"},
    )


RECIPE = Recipe(
    title="DINOv2",
    url="https://github.com/facebookresearch/dinov2",
    citation=CITATION,
    signs=(
        Sign(
            "tensors named mask_token, blocks.0.ls1.gamma and blocks.0.attn.qkv.weight",
            lambda e: (
                e.has(BLOCK) and e.has(r"(backbone\.)?mask_token$") and e.has(r"(backbone\.)?blocks\..*ls1\.gamma")
            ),
        ),
    ),
    read=partial(read_bare, entry="teacher"),
    plan=plan_dinov2,
    find=partial(find_weights, hub=False),
)
