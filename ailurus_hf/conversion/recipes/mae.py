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
from ..references.vit import ViTForward
from ..rules import Drop, Rule
from .timm_style import (
    BLOCK,
    IMAGENET,
    IN_MODEL,
    TimmParts,
    classifier_rules,
    encoder_rules,
    encoder_settings,
    model_class,
    position_settings,
    read_bare,
    rows_of,
)

__all__ = ["RECIPE", "mae_rules", "plan_mae"]

DECODER = "{part:decoder_embed|decoder_blocks|decoder_norm|decoder_pred}.{rest:*}"

CITATION = """@inproceedings{he2022masked,
  title     = {Masked Autoencoders Are Scalable Vision Learners},
  author    = {He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll\\'ar, Piotr and Girshick, Ross},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2022}
}"""


def mae_rules(parts: TimmParts) -> tuple[Rule, ...]:
    """The whole table, for a bare encoder, an encoder with the decoder of the pre-training, or a classifier."""
    if parts.has("head.weight"):
        return (*encoder_rules(parts, "ailurus."), *classifier_rules(["head"], ["classifier"]))
    reason = "the decoder that reconstructs pixels, used only in pre-training"
    return (
        *encoder_rules(parts, ""),
        Drop("mask_token", reason, optional=True),
        Drop("decoder_pos_embed", reason, optional=True),
        Drop(DECODER, reason, optional=True),
    )


def plan_mae(checkpoint: SourceCheckpoint) -> Plan:
    """Make the plan from the tensors.

    Raises:
        CheckpointError: the tensors are not those of a ViT, or do not tell the number of heads or the grid.
    """
    parts = TimmParts(frozenset(checkpoint.tensors))
    num_labels = rows_of(checkpoint, "head.weight")
    config = encoder_settings(checkpoint, parts) | position_settings()
    config["pooling"] = "mean" if config["use_pooler_norm"] else "cls"
    if num_labels is not None:
        config["num_labels"] = num_labels
    classifiers = ("head",) if num_labels is not None else ()
    return Plan(
        config=config,
        rules=mae_rules(parts),
        processor=dict(IMAGENET),
        model_class=model_class(num_labels),
        reference=ViTForward(config, classifiers=classifiers),
        output="logits" if classifiers else "last_hidden_state",
        recorded={"logits": "logits"} if classifiers else {"encoder_tokens": "last_hidden_state"},
    )


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
    read=partial(read_bare, entry="model"),
    plan=plan_mae,
    find=partial(find_weights, hub=False),
)
