"""Fine-tune a segmentation model with a plain accelerate loop, on one process or several.

accelerate launch --num_processes 2 examples/finetune_accelerate.py --model MODEL --data DIR --output-dir RUN

What `finetune_segmentation.py` leaves to Trainer is spelled out here. Run it again to go on after an interruption.
"""

import json
import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.utils import set_seed
from huggingface_hub import HfApi
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, HfArgumentParser, get_scheduler

from ailurus_hf.budget import set_keep_ratio, with_budget
from ailurus_hf.data import SegmentationAugmentation, SegmentationCollator, SegmentationDataset, open_layout
from ailurus_hf.evaluation import ConfusionMatrix
from ailurus_hf.hub.model_card import CardResult, build_model_card
from ailurus_hf.modeling.label_maps import labels_of_logits, num_classes
from ailurus_hf.training import KeepRatioSchedule, SegmentationLoss, check_resume, layerwise_parameter_groups


@dataclass
class Options:
    model: str
    data: Path
    output_dir: Path
    layout: str = "camvid"
    keep_ratio_schedule: str = "0:0.25"  # START:RATIO,... over training
    eval_keep_ratio: float = 0.25
    crop: list[int] = field(default_factory=lambda: [360, 480])
    steps: int = 300
    save_every: int = 100  # evaluates, too
    batch_size: int = 4  # of one process
    accumulation: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    mixed_precision: str = "no"  # or bf16, fp16
    activation_checkpointing: bool = False
    seed: int = 0
    push_to: str | None = None  # repository on the Hub


def step_batches(loader, views, first_step, accumulation):
    """The micro-batches of every step from `first_step` on, epoch after epoch."""
    steps_per_epoch = len(loader) // accumulation
    epoch, done = divmod(first_step, steps_per_epoch)
    while True:
        views.set_epoch(epoch)
        loader.set_epoch(epoch)
        batches = iter(skip_first_batches(loader, done * accumulation) if done else loader)
        for _ in range(done, steps_per_epoch):
            yield [next(batches) for _ in range(accumulation)]
        epoch, done = epoch + 1, 0


def train_step(accelerator, model, optimizer, loss, batches):
    """One optimizer step. Its loss is the mean over all pixels of all micro-batches and processes."""
    total = accelerator.reduce(sum(loss.total_weight(batch["labels"]) for batch in batches).float())
    step_loss = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches, start=1):
        with nullcontext() if number == len(batches) else accelerator.no_sync(model):
            value = loss(model(batch["pixel_values"]), batch["labels"], total)
            accelerator.backward(value * accelerator.num_processes)  # gradients are averaged over the processes
        step_loss += value.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": accelerator.reduce(step_loss).item(), "grad_norm": norm.item()}


def evaluate(accelerator, network, pictures, keep_ratio):
    """Every process takes its share of the pictures, each picture once; the counts are summed."""
    matrix = ConfusionMatrix(num_classes(network.config), pictures.ignore_index)
    with with_budget(network.eval(), keep_ratio=keep_ratio), torch.inference_mode():
        for index in range(accelerator.process_index, len(pictures), accelerator.num_processes):
            picture = pictures[index]
            logits = network(picture["pixel_values"][None].to(accelerator.device)).logits
            matrix.update(labels_of_logits(logits[0], network.config.binary_threshold).cpu(), picture["labels"])
    network.train()
    matrix.add_processes()
    return matrix


def load_model(o, source):
    """The checkpoint for the classes of this data set, with a fresh head where their number differs."""
    network = AutoModelForSemanticSegmentation.from_pretrained(
        o.model, semantic_loss_ignore_index=source.rule.ignore_index, ignore_mismatched_sizes=True,
        **({"id2label": source.id2label, "palette": source.palette} if source.id2label else {}),
    )  # fmt: skip
    if o.activation_checkpointing:
        network.activation_checkpointing_enable()
    return network, AutoImageProcessor.from_pretrained(o.model)


def save_best(o, network, processor, quality):
    """The checkpoint to use, with its card."""
    network.config.keep_ratio = o.eval_keep_ratio  # what the checkpoint will run at
    network.save_pretrained(o.output_dir / "best")
    processor.save_pretrained(o.output_dir / "best")
    repo, result = o.push_to or o.output_dir.name, CardResult(o.eval_keep_ratio, **quality)
    card = build_model_card(network.config, repo=repo, dataset=o.data.name, results=[result])
    card.save(o.output_dir / "best" / "README.md")


def resume(o, accelerator, network):
    """Where an earlier run stopped, with everything of it loaded; or the start."""
    if not (o.output_dir / "progress.json").is_file():
        return {"step": 0, "best": -1.0, "state": None, "log": []}
    progress = json.loads((o.output_dir / "progress.json").read_text())
    check_resume(o.output_dir / progress["state"], network)
    accelerator.load_state(o.output_dir / progress["state"])
    return progress


def save_state(accelerator, folder, progress):
    """The new state is complete before `progress.json` names it, and the old one goes after that."""
    old, progress["state"] = progress["state"], f"state-{progress['step']}"
    accelerator.save_state(folder / progress["state"])
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / "progress.new").write_text(json.dumps(progress, indent=1))
        os.replace(folder / "progress.new", folder / "progress.json")
        if old and old != progress["state"]:
            shutil.rmtree(folder / old)


def main(o: Options) -> None:
    accelerator = Accelerator(
        mixed_precision=o.mixed_precision, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
    )
    accelerator.print(f"training on {accelerator.num_processes} processes, {accelerator.device}")
    set_seed(o.seed)
    source, held_out = open_layout(o.data, o.layout)
    ignore = source.rule.ignore_index
    (network, processor), loss = load_model(o, source), SegmentationLoss(ignore)
    views = SegmentationDataset(source, processor, SegmentationAugmentation(tuple(o.crop)), ignore, seed=o.seed)
    pictures = SegmentationDataset(held_out, processor, ignore_index=ignore)
    loader = DataLoader(views, o.batch_size, shuffle=True, drop_last=True, collate_fn=SegmentationCollator(ignore))
    optimizer = torch.optim.AdamW(layerwise_parameter_groups(network, o.learning_rate, o.weight_decay, o.layer_decay))
    model, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    # Not prepared, or accelerate would step it once per process.
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=o.steps // 15, num_training_steps=o.steps)
    accelerator.register_for_checkpointing(scheduler)

    progress, schedule = resume(o, accelerator, network), KeepRatioSchedule.parse(o.keep_ratio_schedule)
    steps = step_batches(loader, views, progress["step"], o.accumulation)
    while progress["step"] < o.steps:
        batches = next(steps)
        set_seed(o.seed + progress["step"], device_specific=True)  # dropout follows from the step: see `save_state`
        set_keep_ratio(network, schedule.ratio_at(progress["step"] / o.steps))
        entry = train_step(accelerator, model, optimizer, loss, batches)
        scheduler.step()
        progress["step"] += 1
        progress["log"].append({"step": progress["step"], **entry})
        accelerator.print(progress["log"][-1])
        if progress["step"] % o.save_every and progress["step"] < o.steps:
            continue
        matrix = evaluate(accelerator, network, pictures, o.eval_keep_ratio)
        quality = {"mean_iou": matrix.mean_iou(), "pixel_accuracy": matrix.pixel_accuracy()}
        entry = {"step": progress["step"], "keep_ratio": o.eval_keep_ratio, "pixels": int(matrix.counts.sum())}
        progress["log"].append({**entry, **quality})
        accelerator.print(progress["log"][-1])
        if quality["mean_iou"] > progress["best"] and accelerator.is_main_process:
            save_best(o, network, processor, quality)
        progress["best"] = max(progress["best"], quality["mean_iou"])
        save_state(accelerator, o.output_dir, progress)
    if o.push_to and accelerator.is_main_process:
        HfApi().create_repo(o.push_to, exist_ok=True)
        HfApi().upload_folder(repo_id=o.push_to, folder_path=o.output_dir / "best")
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses()[0])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
