"""Fine-tune a segmentation model on a folder of pictures with labels, with `transformers.Trainer`.

python examples/finetune_segmentation.py --model MODEL --data DIR --output-dir RUN --keep-ratio 0.25 --max-steps 300

MODEL is an AiluRus checkpoint, with any head or none; its head is kept if it has as many classes as the data set, and
begun anew otherwise. Every option of `TrainingArguments` works: --bf16, --activation-checkpointing,
--gradient-accumulation-steps, --learning-rate, --push-to-hub ... Run it again to go on after an interruption.
"""

import os
import sys
from dataclasses import dataclass, field

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import ailurus_hf  # noqa: F401  registers the models
from ailurus_hf.data import SegmentationAugmentation, SegmentationDataset, open_layout
from ailurus_hf.training import (
    KeepRatioSchedule,
    SegmentationLoss,
    SegmentationTrainer,
    class_weights,
    count_labels,
    freeze_layers,
)


@dataclass
class Options:
    model: str = field(metadata={"help": "Checkpoint folder or name on the Hub."})
    data: str = field(metadata={"help": "Folder of the data set."})
    layout: str = field(default="camvid", metadata={"help": "camvid, ade20k or cityscapes."})
    keep_ratio: float = field(default=0.25, metadata={"help": "Share of tokens kept in training; 1 is dense."})
    keep_ratio_schedule: str | None = field(
        default=None, metadata={"help": "In its place: START:RATIO,... over training, such as 0:1,0.5:0.25."}
    )
    eval_keep_ratio: list[float] = field(
        default_factory=lambda: [1.0, 0.5, 0.25], metadata={"help": "Evaluated at the end; the last chooses the best."}
    )
    crop: list[int] = field(default_factory=lambda: [360, 480], metadata={"help": "Height and width of the views."})
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0], metadata={"help": "Range of the random scale."})
    layer_decay: float = field(default=1.0, metadata={"help": "Learning rate of a layer over that of the next."})
    freeze_layers: int = field(default=0, metadata={"help": "Embeddings and first layers that do not train."})
    class_weight_power: float = field(default=0.0, metadata={"help": "Weight of rare classes, 0 (none) to 1."})
    skip_unreadable: bool = field(default=False, metadata={"help": "Go on past damaged files, with a warning."})
    dataset_name: str = field(default="the data set", metadata={"help": "For the model card."})
    license: str = field(default="unknown", metadata={"help": "Licence of the weights, for the model card."})


DEFAULTS = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 100, "save_steps": 100}
DEFAULTS |= {"load_best_model_at_end": True, "metric_for_best_model": "mean_iou", "save_total_limit": 2}
DEFAULTS |= {"lr_scheduler_type": "cosine", "warmup_steps": 20, "per_device_eval_batch_size": 1, "report_to": "none"}


def build_trainer(options: Options, args: TrainingArguments) -> SegmentationTrainer:
    train_source, eval_source = open_layout(options.data, options.layout)
    ignore_index, names = train_source.rule.ignore_index, train_source.id2label
    # A fresh head where the number of classes differs; `ignore_index` may be any number that is no class.
    known = AutoConfig.from_pretrained(options.model).id2label
    names = names or known
    model = AutoModelForSemanticSegmentation.from_pretrained(
        options.model, id2label=names, label2id={name: index for index, name in names.items()},
        palette=train_source.palette, ignore_mismatched_sizes=len(names) != len(known),
        semantic_loss_ignore_index=ignore_index, keep_ratio=options.keep_ratio,
    )  # fmt: skip
    freeze_layers(model, options.freeze_layers)
    processor = AutoImageProcessor.from_pretrained(options.model)
    views = SegmentationAugmentation(tuple(options.crop), tuple(options.scale))
    common = {"ignore_index": ignore_index, "skip_unreadable": options.skip_unreadable}
    weight = None
    if options.class_weight_power:
        weight = class_weights(count_labels(train_source, len(names), ignore_index), options.class_weight_power)
    schedule = options.keep_ratio_schedule
    return SegmentationTrainer(
        model, args, loss=SegmentationLoss(ignore_index, weight),
        train_dataset=SegmentationDataset(train_source, processor, views, seed=args.seed, **common),
        eval_dataset=SegmentationDataset(eval_source, processor, **common),
        eval_keep_ratio=options.eval_keep_ratio[-1], layer_decay=options.layer_decay, processing_class=processor,
        callbacks=[KeepRatioSchedule.parse(schedule)] if schedule else None,
    )  # fmt: skip


def main() -> None:
    parser = HfArgumentParser((Options, TrainingArguments), description=__doc__)
    parser.set_defaults(**DEFAULTS)
    options, args = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    trainer = build_trainer(options, args)
    last = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    result = trainer.train(args.resume_from_checkpoint or last)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    for ratio in options.eval_keep_ratio:
        trainer.eval_keep_ratio = ratio
        metrics = trainer.evaluate()
        trainer.log_metrics(f"keep_ratio {ratio:g}", metrics)
        trainer.save_metrics(f"eval_{ratio:g}", metrics)
    trainer.model.config.keep_ratio = options.eval_keep_ratio[-1]  # what the checkpoint will run at
    trainer.save_model()
    trainer.create_model_card(license=options.license, dataset=options.dataset_name)
    if args.push_to_hub:
        trainer.push_to_hub(license=options.license, dataset=options.dataset_name)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
