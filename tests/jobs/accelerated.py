"""A job on accelerate, with accumulation and a checkpoint: accelerate launch … accelerated.py FOLDER.

Saved after half of its steps and resumed by a fresh one, it ends where it goes without a stop. Prints "ok" for each
rank.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fedmpi  # fedmpi

TOPK = {"name": "topk", "ratio": 0.05, "feedback": True}


def train(folder: Path, epochs: range, save: bool = False) -> tuple[Tensor, dict[str, Any]]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(40, 80), nn.Tanh(), nn.Linear(80, 20))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = TensorDataset(torch.randn(128, 40), torch.randn(128, 20))
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=8))
    state = fedmpi.ddp.attach(model, TOPK)  # fedmpi
    fedmpi.accelerate.register(accelerator, state)  # fedmpi
    if epochs.start:
        accelerator.load_state(str(folder))
    for _ in epochs:
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.mse_loss(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
    if save:
        accelerator.save_state(str(folder))
        accelerator.wait_for_everyone()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), state.stats()


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    expected, stats = train(folder, range(4))
    half, _ = train(folder, range(2), save=True)
    got, again = train(folder, range(2, 4))
    assert not torch.equal(half, expected)
    assert torch.equal(got, expected), float((got - expected).abs().max())
    assert stats["steps"] == again["steps"] == 16, "a step of two batches of each rank"
    assert stats["ratio"] > 5
    print("ok", flush=True)


if __name__ == "__main__":
    main()
