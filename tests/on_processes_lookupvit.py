"""Two steps of a LookupViT with accelerate: run by `test_ecosystem_lookupvit.py` on two processes.

python -m tests.on_processes_lookupvit RESULT
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from ailurus_hf import LookupViTForImageClassification, LookupViTForSemanticSegmentation
from tests.factories import random_images, tiny_lookupvit


def train(accelerator: Accelerator, model_class: type, labels: torch.Tensor) -> float:
    """Each process draws compressed sizes of its own and takes its own images; weights must stay the same on all."""
    model = tiny_lookupvit(model_class).train()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    torch.manual_seed(accelerator.process_index)
    for step in range(4):
        images = random_images(2, seed=10 * step + accelerator.process_index)
        accelerator.backward(model(images, labels=labels).loss)
        optimizer.step()
        optimizer.zero_grad()
    return sum(parameter.detach().double().abs().sum().item() for parameter in model.parameters())


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    sums = [
        train(accelerator, LookupViTForImageClassification, torch.tensor([1, 2])),
        train(accelerator, LookupViTForSemanticSegmentation, torch.zeros(2, 48, 48, dtype=torch.int64)),
    ]
    found = {"processes": accelerator.num_processes, "sums": sums}
    Path(f"{sys.argv[1]}.{accelerator.process_index}").write_text(json.dumps(found))
    accelerator.end_training()
