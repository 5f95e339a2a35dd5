"""The recipe for checkpoints of the original DINO: released backbones and training checkpoints.

DINO (Caron et al., ICCV 2021, arXiv 2104.14294, https://github.com/facebookresearch/dino) trains a plain ViT without
labels. Facts of the original code kept here:

- LayerNorm eps is 1e-6, the GELU is exact, tokens have heads of 64 channels;
- positions are resized bicubically, without antialiasing, by the scale (side + 0.1) / trained side: the scale, not the
  size, sets where the table is sampled;
- a training checkpoint holds a student and a teacher; the teacher is the one to use.
"""

from functools import partial

from ..reading.sources import find_weights
from ..recipe import Plan, Recipe, Sign, SourceCheckpoint
from ..rules import Drop
from .timm_style import BARE, BLOCK, TimmParts, encoder_plan, encoder_settings, position_settings, read_bare

__all__ = ["RECIPE", "plan_dino"]

POSITION_OFFSET = 0.1

CITATION = """@inproceedings{caron2021emerging,
  title     = {Emerging Properties in Self-Supervised Vision Transformers},
  author    = {Caron, Mathilde and Touvron, Hugo and Misra, Ishan and J\\'egou, Herv\\'e and Mairal, Julien and
               Bojanowski, Piotr and Joulin, Armand},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year      = {2021}
}"""


def plan_dino(checkpoint: SourceCheckpoint) -> Plan:
    """Make the plan from the tensors; a training checkpoint's projection head has no place in the model.

    Raises:
        CheckpointError: the tensors are not those of a ViT, or do not tell the number of heads or the grid.
    """
    training = any(key.startswith("backbone.") for key in checkpoint.tensors)
    parts = TimmParts(checkpoint.tensors, "backbone." if training else "")
    config = encoder_settings(checkpoint, parts) | position_settings(POSITION_OFFSET)
    unused = (Drop("head.{rest:*}", "DINO's projection head, used only in training", optional=True),)
    recorded = {"cls": "pooler_output"}
    return encoder_plan(checkpoint, parts, config, unused=unused if training else (), recorded=recorded)


RECIPE = Recipe(
    title="DINO",
    url="https://github.com/facebookresearch/dino",
    citation=CITATION,
    signs=(
        Sign(
            "an entry 'teacher' with tensors named backbone.blocks.0.attn.qkv.weight and head.last_layer.*",
            lambda e: "teacher" in e.container and e.has(BLOCK) and e.has(r"head\.last_layer\."),
        ),
        BARE,
    ),
    read=partial(read_bare, entries=("teacher",)),
    plan=plan_dino,
    find=partial(find_weights, hub=False),
)
