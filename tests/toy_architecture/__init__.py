"""An architecture as small as can be, to show what adding one takes: a configuration, a model, and this row."""

from typing import Any

from ailurus_hf.architectures.row import SEGMENTATION, Architecture, TokenStage, num_kept

__all__ = ["TOY"]


def _stages(config: Any, height: int, width: int) -> list[TokenStage]:
    rows, columns = height // config.patch_size, width // config.patch_size
    kept = num_kept(rows * columns, config.keep_ratio, config.num_clusters)
    return [TokenStage("", (rows, columns), config.patch_size, config.hidden_size, kept)]


TOY = Architecture(
    model_type="toy",
    classes={
        "AutoConfig": "tests.toy_architecture.configuration_toy:ToyConfig",
        "AutoImageProcessor": "ailurus_hf.modeling.image_processing_ailurus:AiluRusImageProcessor",
        "AutoModel": "tests.toy_architecture.modeling_toy:ToyModel",
        SEGMENTATION: "tests.toy_architecture.modeling_toy:ToyForSemanticSegmentation",
    },
    stages=_stages,
    facts=lambda config, auto_class: {"hidden size": config.hidden_size},
    card=lambda config: [f"A toy, {config.hidden_size} wide."],
    settings=lambda config: {"keep_ratio": config.keep_ratio},
    extra_flops=lambda config, stages: 0,
)
