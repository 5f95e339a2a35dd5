"""`transformers.Trainer` for semantic segmentation: exact loss, streamed metrics, another budget for evaluation."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..budget import has_keep_ratio, keep_ratio_of, with_budget
from ..data.dataset import SegmentationCollator
from ..evaluation import ConfusionMatrix, SegmentationMetrics, predictions_from_logits
from ..hub.model_card import CardResult, build_model_card
from ..registry import has_architecture
from .loss import SegmentationLoss
from .optimization import layerwise_parameter_groups

__all__ = ["SegmentationTrainer", "check_resume"]

SHOWN = 3


class SegmentationTrainer(Trainer):
    """`transformers.Trainer` with what semantic segmentation needs.

    - The loss of a step is the mean over all its counted pixels, however they are spread over gradient accumulation and
      processes. Trainer alone takes the mean of the micro-batches' means, or divides twice.
    - Evaluation turns every picture into counts at once, so that pictures of any sizes can be evaluated by any number
      of processes, exactly, and no logits or label maps are kept. Metrics: `mean_iou`, `pixel_accuracy`, and the
      `keep_ratio` they were measured at.
    - Training views follow the epoch, see `SegmentationDataset.set_epoch`, and a run is resumed only from a checkpoint
      of the same architecture.
    - `create_model_card` and `push_to_hub` write the results.

    Args:
        model: a semantic-segmentation model of this package, or one changed by `apply_ailurus`.
        args: `TrainingArguments`.
        loss: by default cross entropy with the model's `semantic_loss_ignore_index`.
        eval_keep_ratio: share of tokens kept in evaluation; None evaluates as the model stands. Assign to it to
            evaluate at another one. Not on several GPUs in one process.
        layer_decay: see `layerwise_parameter_groups`; 1 leaves the optimizer to Trainer.
        kwargs: for `Trainer`, such as `train_dataset`, `eval_dataset`, `processing_class`, `callbacks`.

    Raises:
        ValueError: `eval_keep_ratio` is given, and `args` leads to `torch.nn.DataParallel`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: Any,
        *,
        loss: SegmentationLoss | None = None,
        eval_keep_ratio: float | None = None,
        layer_decay: float = 1.0,
        **kwargs: Any,
    ) -> None:
        loss = loss or SegmentationLoss(getattr(model.config, "semantic_loss_ignore_index", 255))
        self.segmentation_loss = loss
        args.batch_eval_metrics = True  # counts are added up batch by batch
        if layer_decay != 1:
            optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
            groups = layerwise_parameter_groups(model, args.learning_rate, args.weight_decay, layer_decay)
            kwargs["optimizer_cls_and_kwargs"] = (optimizer, {**settings, "params": groups})
        kwargs.setdefault("data_collator", SegmentationCollator(loss.ignore_index))
        kwargs.setdefault("compute_metrics", _RunningCounts(self, model.config.num_labels))
        super().__init__(model, args, compute_loss_func=loss, **kwargs)
        self.eval_keep_ratio = eval_keep_ratio
        self.add_callback(_EpochOfViews())

    @property
    def eval_keep_ratio(self) -> float | None:
        """Share of tokens kept in evaluation, above 0 and at most 1; None evaluates as the model stands."""
        return self._eval_keep_ratio

    @eval_keep_ratio.setter
    def eval_keep_ratio(self, ratio: float | None) -> None:
        if ratio is not None and self.args.n_gpu > 1:  # replicas run in threads of their own: no `with_budget` there
            raise ValueError(
                f"eval_keep_ratio={ratio} does not work on {self.args.n_gpu} GPUs in one process "
                "(torch.nn.DataParallel): start with `accelerate launch` or `torchrun`, or show one GPU with "
                "CUDA_VISIBLE_DEVICES=0"
            )
        self._eval_keep_ratio = ratio

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Trainer itself would warn about tensors that are not the model's, and train on.
        check_resume(resume_from_checkpoint, self.accelerator.unwrap_model(self.model))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def get_train_dataloader(self) -> Any:
        """As in `Trainer`; workers that persist change nothing that is random in training."""
        return _seeded_apart(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in `Trainer`; workers that persist change nothing that is random in training."""
        return _seeded_apart(super().get_eval_dataloader(eval_dataset))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The step's micro-batches, and what their losses are divided by: see `SegmentationLoss`."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:  # the epoch has ended
            return samples, None
        total = sum(self.segmentation_loss.total_weight(sample["labels"]) for sample in samples)
        total = torch.as_tensor(total, dtype=torch.float32, device=self.args.device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.reduce(total)
        return samples, total

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, and for each picture its (num_labels, num_labels) counts and how many pixels count."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        # Trainer gathers what stands for predictions and labels, and drops the pictures that fill up the last batch:
        # both must have one row for each picture, of the same shape in all processes.
        counts = self._counts(outputs.logits, labels)
        return loss.detach(), counts, counts.sum((1, 2))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, at `eval_keep_ratio`."""
        ratio = self.eval_keep_ratio
        with nullcontext() if ratio is None else with_budget(self.model, keep_ratio=ratio):
            return super().evaluation_loop(*args, **kwargs)

    def create_model_card(
        self, license: str | None = None, model_name: str | None = None, dataset: Any = None, **kwargs: Any
    ) -> None:
        """Write `README.md` with the latest evaluation at every budget.

        Args:
            license: of the weights, an identifier that the Hub knows.
            model_name: title and repository name.
            dataset: name of the data set.
            kwargs: further arguments of `Trainer.create_model_card`, which writes the card of a model of transformers.
        """
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        if not has_architecture(base.config):
            super().create_model_card(license=license, model_name=model_name, dataset=dataset, **kwargs)
            return
        self._card(Path(self.args.output_dir), license, model_name, dataset)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        # peft writes a card of empty headings beside its adapter.
        if self.args.should_save and hasattr(model, "peft_config") and has_architecture(model.get_base_model().config):
            self._card(Path(output_dir or self.args.output_dir))

    def _card(
        self, folder: Path, license: str | None = None, model_name: str | None = None, dataset: Any = None
    ) -> None:
        model = self.accelerator.unwrap_model(self.model)
        adapted = hasattr(model, "peft_config")
        base = model.get_base_model() if adapted else model
        card = build_model_card(
            base.config,
            license=license or "unknown",
            model_class=type(base).__name__,
            repo=model_name or Path(self.args.output_dir).name,
            dataset=str(dataset or "unknown"),
            results=_latest_results(self.state.log_history),
            training=self._training_summary(),
            adapter_of=(getattr(base, "name_or_path", None) or "path/to/the/base/model") if adapted else None,
        )
        card.save(folder / "README.md")

    def _counts(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B, num_labels, h, w) logits and (B, H, W) labels -> (B, num_labels, num_labels) counts, of two classes with
        one channel."""
        counts = []
        threshold = getattr(self.model.config, "binary_threshold", 0.5)
        for prediction, truth in zip(predictions_from_logits(logits, labels, threshold), labels, strict=True):
            matrix = ConfusionMatrix(max(logits.shape[1], 2), self.segmentation_loss.ignore_index)
            matrix.update(prediction, truth)
            counts.append(matrix.counts.to(labels.device))
        return torch.stack(counts)

    def _training_summary(self) -> dict[str, Any]:
        args = self.args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return {
            "steps": self.state.global_step,
            "pictures per step": batch,
            "learning rate": args.learning_rate,
            "weight decay": args.weight_decay,
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
            "seed": args.seed,
        }


class _RunningCounts(SegmentationMetrics):
    """`compute_metrics` of a trainer whose predictions are the pictures' counts, see `prediction_step`."""

    def __init__(self, trainer: SegmentationTrainer, num_labels: int) -> None:
        super().__init__(num_labels, trainer.segmentation_loss.ignore_index)
        self.trainer = trainer

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        scores = super().__call__(prediction, compute_result)
        if compute_result:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            scores |= {"keep_ratio": keep_ratio_of(model)} if has_keep_ratio(model) else {}
        return scores

    def add(self, predictions: Tensor, labels: Tensor) -> None:
        """Add counts (B, num_labels, num_labels)."""
        self.matrix.counts += predictions.sum(0).cpu()


class _EpochOfViews(TrainerCallback):
    """Tells the training data which epoch begins.

    accelerate does so for one process only: with several it stops at the sampler (accelerate 1.15,
    `DataLoaderShard.set_epoch`).
    """

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        for dataset in _with_epochs(getattr(train_dataloader, "dataset", None)):
            dataset.set_epoch(int(state.epoch or 0))


def _seeded_apart(loader: Any) -> Any:
    """A loader whose workers take their seed from a generator of its own, if they persist.

    They are seeded where they start, which a resumed run does once more than one that went straight on: drawn from
    torch's generator, as usual, that would shift everything random after it, such as dropout.
    """
    if loader.persistent_workers:
        own = getattr(loader, "base_dataloader", loader)  # the one that accelerate iterates over
        own.generator = torch.Generator().manual_seed(torch.initial_seed())
    return loader


def _with_epochs(dataset: Any) -> Iterator[Any]:
    """Every data set that has epochs: this one, or those that torch's `Subset` or `ConcatDataset` hold."""
    if hasattr(dataset, "set_epoch"):
        yield dataset
        return
    for held in getattr(dataset, "datasets", [getattr(dataset, "dataset", None)]):
        if held is not None:
            yield from _with_epochs(held)


def _latest_results(history: list[dict[str, Any]]) -> list[CardResult]:
    """The last evaluation at every budget, dense first."""
    found: dict[float | None, CardResult] = {}
    for entry in history:
        prefixes = [key.removesuffix("_mean_iou") for key in entry if key.endswith("_mean_iou")]
        for prefix in prefixes:
            ratio = entry.get(f"{prefix}_keep_ratio")
            found[ratio] = CardResult(ratio, entry[f"{prefix}_mean_iou"], entry[f"{prefix}_pixel_accuracy"])
    return [found[ratio] for ratio in sorted(found, key=lambda ratio: ratio or 0, reverse=True)]


def check_resume(checkpoint: str | Path, model: Any) -> None:
    """Check that a checkpoint of a training run was made by a model of this architecture.

    Only names and shapes are read. Adapters of peft, which peft checks itself, and sharded states pass.

    Args:
        checkpoint: folder with `model.safetensors`, or shards of it.
        model: the model that is to go on.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: tensors are missing, unexpected or of another shape; the message names some.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected a checkpoint of a training run")
    stored: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            stored |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if not stored or stored == expected:
        return
    names = [name for name in sorted(stored | expected) if stored.get(name) != expected.get(name)]
    shown = "; ".join(
        f"{name} is {stored.get(name, 'absent')}, here {expected.get(name, 'absent')}" for name in names[:SHOWN]
    )
    raise ValueError(
        f"{folder} was made by another architecture: {len(names)} tensors differ ({shown}). Resume with the model and "
        "the settings that it was made with, or start a new run in another folder"
    )
