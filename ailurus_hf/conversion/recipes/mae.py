"""The recipe for checkpoints of the original MAE: pre-trained (with or without decoder) and fine-tuned classifiers.

MAE (He et al., CVPR 2022, arXiv 2111.06377, https://github.com/facebookresearch/mae). Facts of the original code kept
here:

- LayerNorm eps is 1e-6, the GELU is exact;
- the position table (fixed sine and cosine values before fine-tuning) is resized bicubically to the exact size, without
  antialiasing, when a checkpoint is loaded for another resolution;
- classifiers look at the class token behind `norm`, or at the mean of the patch tokens behind `fc_norm`.
"""

from functools import partial

from ..reading.sources import find_weights
from ..recipe import Plan, Recipe, Sign, SourceCheckpoint
from ..rules import Drop
from .timm_style import BLOCK, IN_MODEL, TimmParts, encoder_plan, encoder_settings, position_settings, read_bare

__all__ = ["RECIPE", "plan_mae"]

DECODER = "{part:decoder_embed|decoder_blocks|decoder_norm|decoder_pred}.{rest:*}"

CITATION = """@inproceedings{he2022masked,
  title     = {Masked Autoencoders Are Scalable Vision Learners},
  author    = {He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll\\'ar, Piotr and Girshick, Ross},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2022}
}"""


def plan_mae(checkpoint: SourceCheckpoint) -> Plan:
    """Make the plan from the tensors: of a classifier, or of an encoder with or without the pre-training's decoder.

    Raises:
        CheckpointError: the tensors are not those of a ViT, or do not tell the number of heads or the grid.
    """
    parts = TimmParts(checkpoint.tensors)
    config = encoder_settings(checkpoint, parts) | position_settings()
    config["pooling"] = "mean" if config["use_pooler_norm"] else "cls"
    if parts.has("head.weight"):
        return encoder_plan(checkpoint, parts, config, classifiers={"head": "classifier"})
    reason = "the decoder that reconstructs pixels, used only in pre-training"
    unused = tuple(Drop(name, reason, optional=True) for name in ("mask_token", "decoder_pos_embed", DECODER))
    return encoder_plan(checkpoint, parts, config, unused=unused, recorded={"encoder_tokens": "last_hidden_state"})


RECIPE = Recipe(
    title="MAE",
    url="https://github.com/facebookresearch/mae",
    citation=CITATION,
    signs=(
        Sign(
            "tensors named decoder_blocks.*, decoder_pos_embed and blocks.0.attn.qkv.weight",
            lambda e: e.has(BLOCK) and e.has(r"decoder_blocks\.") and e.has(r"decoder_pos_embed"),
        ),
        IN_MODEL,
    ),
    read=partial(read_bare, entries=("model", "model_ema")),
    plan=plan_mae,
    find=partial(find_weights, hub=False),
)
