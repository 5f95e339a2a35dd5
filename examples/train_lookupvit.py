"""Train a LookupViT, or the plain ViT of its depth and width, and score it at every compressed size.

python examples/train_lookupvit.py --data scenes --model vit --out vit                    # the dense model
python examples/train_lookupvit.py --data scenes --out lookupvit                          # all sizes, one model
python examples/train_lookupvit.py --data scenes --from-vit vit --distill vit --out better

--data is a folder in the layout of CamVid, or "scenes": street scenes that are drawn on the spot. Distillation adds the
divergence from the teacher's logits to the loss, and, with --feature-weight, the distance from its last tokens.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from ailurus_hf import (
    AiluRusConfig,
    AiluRusForImageClassification,
    AiluRusForSemanticSegmentation,
    AiluRusImageProcessor,
    LookupViTConfig,
    LookupViTForImageClassification,
    LookupViTForSemanticSegmentation,
    with_budget,
)
from ailurus_hf.benchmark import count_flops
from ailurus_hf.data import (
    LabelledImage,
    SegmentationAugmentation,
    SegmentationCollator,
    SegmentationDataset,
    open_layout,
)
from ailurus_hf.demo.scenes import CLASS_NAMES, draw_scene
from ailurus_hf.evaluation import ConfusionMatrix

VIEWS = 1.5  # pictures are held larger than the model's input, for views of two thirds of their sides and more
VALIDATION_SEEDS = 1_000_000  # the scenes of no training run
CLASSES = {
    ("vit", "segmentation"): AiluRusForSemanticSegmentation,
    ("vit", "classification"): AiluRusForImageClassification,
    ("lookupvit", "segmentation"): LookupViTForSemanticSegmentation,
    ("lookupvit", "classification"): LookupViTForImageClassification,
}
ANSWERS = ("sky", "building", "road")  # classification asks which of them covers the most of a scene
SIZES = [3, 5, 7, 10]
NOT_OF_THE_VIT = ("compressed_sizes", "compressed_size", "attention_reuse", "semantic_loss_ignore_index")

Samples = list[LabelledImage]


def resized(sample: LabelledImage, size: tuple[int, int]) -> LabelledImage:
    """A sample of (height, width) pixels: the picture filtered, the labels those of the nearest pixels."""
    height, width = size
    labels = Image.fromarray(sample.labels.astype(np.uint8)).resize((width, height), Image.Resampling.NEAREST)
    image = sample.image.resize((width, height), Image.Resampling.BILINEAR)
    return LabelledImage(image, np.asarray(labels, np.int64), sample.name)


def read(data: str, size: tuple[int, int], counts: tuple[int, int]) -> tuple[Samples, Samples, dict[int, str], int]:
    """Training samples somewhat larger than `size`, validation samples of `size`, class names, ignore index."""
    large = (round(size[0] * VIEWS), round(size[1] * VIEWS))
    if data != "scenes":
        train, validation = open_layout(data)
        samples = [resized(s, large) for s in train], [resized(s, size) for s in validation]
        return *samples, train.id2label or {}, train.rule.ignore_index
    with ProcessPoolExecutor() as pool:
        seeds = [*range(counts[0]), *range(VALIDATION_SEEDS, VALIDATION_SEEDS + counts[1])]
        found = pool.map(partial(draw_scene, height=large[0], width=large[1]), seeds, chunksize=8)
        drawn = [LabelledImage(Image.fromarray(s.image), s.labels.astype(np.int64), "a scene") for s in found]
    return drawn[: counts[0]], [resized(s, size) for s in drawn[counts[0] :]], dict(enumerate(CLASS_NAMES)), 255


class Collator(SegmentationCollator):
    """Batches of label maps; for classification, of which of `ANSWERS` covers the most pixels."""

    def __init__(self, task: str, names: dict[int, str], ignore_index: int) -> None:
        super().__init__(ignore_index)
        ids = {name: index for index, name in names.items()}
        self.asked = [ids[name] for name in ANSWERS] if task == "classification" else []

    def __call__(self, samples: Any) -> dict[str, torch.Tensor]:
        batch = super().__call__(samples)
        if self.asked:
            batch["labels"] = torch.stack([(batch["labels"] == one).sum((1, 2)) for one in self.asked], 1).argmax(1)
        return batch


class DistillationTrainer(Trainer):
    """`Trainer` whose loss is `(1 - weight) loss + weight KL(teacher || student) + feature_weight |features|^2`.

    The divergence is that of the classes of each pixel or picture. Features are the tokens after the last block, each
    normalised to mean 0 and deviation 1; teacher and student must have the same width.
    """

    def __init__(
        self, *args: Any, teacher: PreTrainedModel, weight: float, feature_weight: float, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teacher, self.weight, self.feature_weight = teacher.eval().to(self.args.device), weight, feature_weight

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        states = self.feature_weight > 0
        outputs = model(**inputs, output_hidden_states=states)
        with torch.no_grad():
            taught = self.teacher(inputs["pixel_values"], output_hidden_states=states)
        told = taught.logits.log_softmax(1)
        divergence = (told.exp() * (told - outputs.logits.log_softmax(1))).sum(1).mean()
        loss = (1 - self.weight) * outputs.loss + self.weight * divergence
        if states:
            last = [output.hidden_states[-1] for output in (outputs, taught)]
            ours, theirs = (F.layer_norm(tokens, tokens.shape[-1:]) for tokens in last)
            loss = loss + self.feature_weight * F.mse_loss(ours, theirs[:, -ours.shape[1] :])  # without a class token
        return (loss, outputs) if return_outputs else loss


def build(name: str, task: str, from_vit: str | None, **settings: Any) -> PreTrainedModel:
    """The model that the options describe; settings are fields of `LookupViTConfig`."""
    model_class: Any = CLASSES[name, task]
    if from_vit:
        return model_class.from_vit(from_vit, **{key: settings[key] for key in NOT_OF_THE_VIT})
    if name == "lookupvit":
        return model_class(LookupViTConfig(**settings))
    del settings["compressed_sizes"], settings["compressed_size"], settings["attention_reuse"]
    width = settings["hidden_size"]
    return model_class(AiluRusConfig(**settings, intermediate_size=4 * width, use_cls_token=False, keep_ratio=1.0))


@torch.inference_mode()
def score(model: PreTrainedModel, data: Any, collator: Collator) -> dict[str, float]:
    """Scores over all samples; of classification `pixel_accuracy` is the share of right pictures."""
    matrix = ConfusionMatrix(model.config.num_labels, collator.ignore_index)
    for start in range(0, len(data), 16):
        batch = collator([data[index] for index in range(start, min(start + 16, len(data)))])
        matrix.update(model(batch["pixel_values"].to(model.device)).logits.argmax(1).cpu(), batch["labels"])
    return matrix.compute()


def main(
    data: Annotated[str, typer.Option(help="Folder in the layout of CamVid, or scenes.")] = "scenes",
    task: Annotated[Literal["segmentation", "classification"], typer.Option()] = "segmentation",
    model: Annotated[Literal["lookupvit", "vit"], typer.Option()] = "lookupvit",
    from_vit: Annotated[str | None, typer.Option(help="Start from the weights of this plain ViT.")] = None,
    distill: Annotated[str | None, typer.Option(help="Checkpoint of the dense teacher.")] = None,
    distill_weight: Annotated[float, typer.Option(help="Weight of the teacher's logits, 0 to 1.")] = 0.5,
    feature_weight: Annotated[float, typer.Option(help="Weight of the teacher's last tokens.")] = 0.0,
    compressed_size: Annotated[list[int], typer.Option(help="Drawn from in training; repeat for several.")] = SIZES,
    eval_size: Annotated[list[int], typer.Option(help="Evaluated at the end; repeat for several.")] = SIZES,
    attention_reuse: Annotated[
        Literal["weights", "logits"], typer.Option(help="What infusing takes from gathering.")
    ] = "weights",
    size: Annotated[tuple[int, int], typer.Option(help="Height and width of the input in pixels.")] = (96, 128),
    patch_size: int = 8,
    hidden_size: int = 96,
    layers: int = 6,
    heads: int = 3,
    steps: int = 400,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    initializer_range: Annotated[float, typer.Option(help="0.02 suits widths of 768, and is too small here.")] = 0.06,
    scenes: Annotated[tuple[int, int], typer.Option(help="How many, for training and validation.")] = (800, 200),
    seed: int = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the model and its scores.")] = None,
) -> None:
    if from_vit and model == "vit":
        raise typer.BadParameter("--from-vit starts a LookupViT; leave out --model vit")
    set_seed(seed)
    train, validation, names, ignore_index = read(data, size, scenes)
    if task == "classification" and not {*ANSWERS} <= {*names.values()}:
        raise typer.BadParameter(f"classification needs the classes {', '.join(ANSWERS)}, as --data scenes has them")
    answers = names if task == "segmentation" else dict(enumerate(ANSWERS))
    net = build(
        model, task, from_vit, hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads,
        patch_size=patch_size, image_size=size, compressed_sizes=compressed_size, compressed_size=max(compressed_size),
        attention_reuse=attention_reuse,
        id2label=answers, label2id={name: index for index, name in answers.items()},
        semantic_loss_ignore_index=ignore_index, initializer_range=initializer_range,
    )  # fmt: skip
    processor = AiluRusImageProcessor(do_resize=False)
    views = SegmentationAugmentation(size, (1 / VIEWS, 1.0), max_class_share=1.0)
    dataset = SegmentationDataset(train, processor, views, ignore_index, seed=seed)
    schedule = {"max_steps": steps, "learning_rate": learning_rate, "lr_scheduler_type": "cosine"}
    schedule |= {"warmup_steps": steps // 12, "weight_decay": 0.05, "per_device_train_batch_size": batch_size}
    quiet = {"logging_steps": 50, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    quiet |= {"dataloader_pin_memory": False}
    keywords: dict[str, Any] = {"train_dataset": dataset, "data_collator": Collator(task, names, ignore_index)}
    trainer_class: Any = Trainer
    if distill:
        teacher = CLASSES["vit", task].from_pretrained(distill, keep_ratio=1.0)
        keywords |= {"teacher": teacher, "weight": distill_weight, "feature_weight": feature_weight}
        trainer_class = DistillationTrainer
    with TemporaryDirectory() as log:
        trainer_class(net, TrainingArguments(log, seed=seed, **schedule, **quiet), **keywords).train()

    net.eval()
    held = SegmentationDataset(validation, processor, ignore_index=ignore_index)
    budgets = [{"compressed_size": one} for one in eval_size] if model == "lookupvit" else [{"keep_ratio": 1.0}]
    rows = []
    for budget in budgets:
        with with_budget(net, **budget):
            scores = score(net, held, keywords["data_collator"])
        rows.append({**budget, "gflops": count_flops(net, *size, **budget) / 1e9, **scores})
    table = Table("compressed size", "GFLOPs", "mean IoU", "accuracy", title=f"{model}, {task}, seed {seed}")
    for row in rows:
        quality = [f"{row['mean_iou']:.4f}", f"{row['pixel_accuracy']:.4f}"]
        table.add_row(str(row.get("compressed_size", "dense")), f"{row['gflops']:.3f}", *quality)
    Console().print(table)
    if out:
        net.save_pretrained(out)
        processor.save_pretrained(out)
        (out / "scores.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    typer.run(main)
