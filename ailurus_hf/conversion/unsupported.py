"""Families of vision transformers that are no plain ViT, recognised so that they can be refused by name."""

import re
from collections.abc import Iterable, Mapping

from ..utils.errors import CheckpointError

__all__ = ["OWN_RECIPES", "UNSUPPORTED_KEYS", "UNSUPPORTED_MODEL_TYPES", "refuse_unsupported", "unsupported_family"]

# family -> a pattern found in its tensor names; the first that matches names the family
UNSUPPORTED_KEYS: Mapping[str, str] = {
    "SAM": r"(^|\.)(image_encoder|vision_encoder)\..*rel_pos_[hw]$|(^|\.)mask_decoder\.",
    "ViTDet (relative positions)": r"rel_pos_[hw]$",
    "Swin": r"(^|\.)(layers|stages)\.\d+\.blocks\.\d+\..*(relative_position_|logit_scale|cpb_mlp)|"
    r"(^|\.)(layers|stages)\.\d+\.downsample\.|w_msa\.relative_position",
    "BEiT with relative position bias": r"relative_position_bias",
    "SegFormer": r"(^|\.)(patch_embed[1-4]|attn\.sr|attention\.self\.sr)\.|^backbone\.layers\.\d+\.1\.\d+\.attn\.",
    "Hiera": r"(^|\.)blocks\.\d+\.(attn\.pool|proj\.)|pos_embed_spatial",
    "DINOv3 or another ViT with rotary positions": r"(^|\.)rope(_embed|_embeddings)?\.|inv_freq$",
    "ConvNeXt": r"\.(dwconv|conv_dw)\.",
}
# model_type of transformers -> family
UNSUPPORTED_MODEL_TYPES: Mapping[str, str] = {
    "swin": "Swin",
    "swinv2": "Swin V2",
    "beit": "BEiT with relative position bias",
    "data2vec-vision": "Data2Vec with relative position bias",
    "sam": "SAM",
    "sam2": "SAM 2",
    "sam3": "SAM 3",
    "sam_hq": "SAM-HQ",
    "vitdet": "ViTDet (relative positions)",
    "segformer": "SegFormer",
    "hiera": "Hiera",
    "pvt": "PVT",
    "pvt_v2": "PVT v2",
    "dinov3_vit": "DINOv3 (rotary positions)",
    "clip": "CLIP",
    "siglip": "SigLIP",
    "dpt": "DPT",
    "depth_anything": "Depth Anything",
    "yolos": "YOLOS",
    "eomt": "EoMT",
    "convnext": "ConvNeXt",
}
# family -> the one recipe that converts it, into another model than the plain ViT
OWN_RECIPES: Mapping[str, str] = {"SegFormer": "segformer"}


def unsupported_family(keys: Iterable[str] = (), model_type: object = None) -> str | None:
    """The family that `model_type` or these tensor names tell, when it is no plain ViT; else `None`."""
    if family := UNSUPPORTED_MODEL_TYPES.get(str(model_type)):
        return family
    names = "\n".join(keys)
    return next(
        (family for family, pattern in UNSUPPORTED_KEYS.items() if re.search(pattern, names, re.MULTILINE)), None
    )


def refuse_unsupported(source: object, keys: Iterable[str] = (), model_type: object = None) -> None:
    """Refuse a source of an unsupported family, told from its tensor names or transformers' `model_type`.

    Raises:
        CheckpointError: names the family, and the recipe or the adapter to use instead.
    """
    family = unsupported_family(keys, model_type)
    if family is not None and family in OWN_RECIPES:
        raise CheckpointError(f"{source} is a {family} model: convert it with the recipe {OWN_RECIPES[family]!r}")
    if family is not None:
        raise CheckpointError(
            f"{source} is a {family} model: only plain ViTs with learned absolute positions are converted; "
            "see ailurus_hf.supported_families() for models that apply_ailurus changes in place"
        )
