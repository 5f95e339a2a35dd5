"""What one process measures and several must measure alike: run by `test_processes.py` in both ways.

python -m tests.training.on_processes DATA MODEL RESULT
"""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from transformers import TrainingArguments

from ailurus_hf import AiluRusForSemanticSegmentation, AiluRusImageProcessor
from ailurus_hf.data import SegmentationDataset, open_layout
from ailurus_hf.evaluation import evaluate_segmentation
from ailurus_hf.training import SegmentationTrainer

PROCESSOR = AiluRusImageProcessor()
SCORES = ("mean_iou", "pixel_accuracy", "mean_accuracy", "boundary_f", "agreement", "gflops")


def evaluated(data, model):
    """Scores and counts of the loop over budgets."""
    report = evaluate_segmentation(model, PROCESSOR, open_layout(data)[1], (1, 0.25), boundary=True)
    return {
        "pictures": report.num_pictures,
        "times": [len(result.seconds) for result in report.budgets],
        "scores": [[row[name] for name in SCORES] for row in report.rows()],
        "counts": report.budgets[1].confusion.counts.tolist(),
    }


def trained(data, model, output, batch_size):
    """Evaluation at two budgets by Trainer, then the loss of one step, of which the weights do not change."""
    train, val = (
        SegmentationDataset(source, PROCESSOR, ignore_index=source.rule.ignore_index) for source in open_layout(data)
    )
    args = TrainingArguments(
        output, max_steps=1, logging_steps=1, save_strategy="no", use_cpu=True, optim="sgd", learning_rate=0,
        per_device_train_batch_size=batch_size, per_device_eval_batch_size=1, report_to="none", disable_tqdm=True,
        ddp_backend="gloo" if PartialState().num_processes > 1 else None,
    )  # fmt: skip
    trainer = SegmentationTrainer(model, args, train_dataset=train, eval_dataset=val)
    found = {}
    for ratio in (1.0, 0.25):
        trainer.eval_keep_ratio = ratio
        metrics = trainer.evaluate()
        found[str(ratio)] = [metrics[f"eval_{name}"] for name in ("mean_iou", "pixel_accuracy", "keep_ratio")]
    return {"evaluation": found, "loss": trainer.train().training_loss}


def measured(data, folder, output, batch_size):
    model = AiluRusForSemanticSegmentation.from_pretrained(folder)
    return {"evaluated": evaluated(data, model), "trained": trained(data, model, output, batch_size)}


if __name__ == "__main__":
    data, folder, result = sys.argv[1:]
    found = measured(data, folder, f"{result}.run", batch_size=2)
    state = PartialState()
    Path(f"{result}.{state.process_index}").write_text(json.dumps({"processes": state.num_processes, **found}))
    state.destroy_process_group()
