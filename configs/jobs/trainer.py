"""A transformers.Trainer job on random tokens; the callback that is marked compresses its gradients.

pip install 'fedmpi[hf]'
torchrun --nproc-per-node 2 configs/jobs/trainer.py
"""

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fedmpi


class Counting(Dataset[dict[str, torch.Tensor]]):
    """Sequences that count up from a random number: put your own data here."""

    def __init__(self, samples: int = 64) -> None:
        self.first = torch.randint(2, 40, (samples, 1), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = self.first[i] + torch.arange(12)
        return {"input_ids": ids, "labels": ids}


def main() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=16, n_embd=48, n_layer=2, n_head=4))
    arguments = TrainingArguments(
        "runs/trainer", max_steps=30, per_device_train_batch_size=8, learning_rate=2e-3, logging_steps=10,
        save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
    )  # fmt: skip
    callback = fedmpi.transformers.CompressionCallback("bf16")  # this
    Trainer(model, arguments, train_dataset=Counting(), callbacks=[callback]).train()


if __name__ == "__main__":
    main()
