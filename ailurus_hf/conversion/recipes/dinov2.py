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

from ..reading.sources import find_weights
from ..recipe import Plan, Recipe, Sign, SourceCheckpoint
from ..rules import Drop
from .timm_style import BLOCK, TimmParts, encoder_plan, encoder_settings, position_settings, read_bare

__all__ = ["RECIPE", "plan_dinov2"]

POSITION_OFFSET = 0.1  # without registers

CITATION = """@article{oquab2024dinov2,
  title   = {DINOv2: Learning Robust Visual Features without Supervision},
  author  = {Oquab, Maxime and Darcet, Timoth\\'ee and Moutakanni, Th\\'eo and others},
  journal = {Transactions on Machine Learning Research},
  year    = {2024}
}"""


def plan_dinov2(checkpoint: SourceCheckpoint) -> Plan:
    """Make the plan from the tensors; `position_offset` and `position_antialias` may be set otherwise.

    Raises:
        CheckpointError: the tensors are not those of a ViT, or do not tell the number of heads or the grid.
    """
    prefix = "backbone." if any(key.startswith("backbone.") for key in checkpoint.tensors) else ""
    parts = TimmParts(checkpoint.tensors, prefix, register_name="register_tokens")
    config = encoder_settings(checkpoint, parts, prefix_positions=1)
    registers = config["num_register_tokens"] > 0
    offset = float(checkpoint.overrides.get("position_offset", 0.0 if registers else POSITION_OFFSET))
    antialias = bool(checkpoint.overrides.get("position_antialias", registers))
    config |= position_settings(offset, antialias)
    assumed = f"positions are resized with position_offset={offset:g}, position_antialias={antialias}"
    if not {"position_offset", "position_antialias"} <= checkpoint.overrides.keys():
        other, antialiased = (POSITION_OFFSET, "false") if registers else (0, "true")
        assumed += (
            f", as in the released models {'with' if registers else 'without'} registers, since the file does not "
            f"tell; the other way in use is --set position_offset={other:g} --set position_antialias={antialiased}"
        )
    unused = (
        Drop(f"{prefix}mask_token", "stands for masked patches, used only in training", optional=True),
        Drop("{head:dino_head|ibot_head}.{rest:*}", "a projection head, used only in training", optional=True),
    )
    recorded = {"x_norm_clstoken": "pooler_output"}
    return encoder_plan(checkpoint, parts, config, unused=unused, recorded=recorded, assumptions=(assumed,))


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
    read=partial(read_bare, entries=("teacher",)),
    plan=plan_dinov2,
    find=partial(find_weights, hub=False),
)
