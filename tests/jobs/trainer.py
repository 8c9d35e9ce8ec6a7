"""A transformers.Trainer job on random tokens: trainer.py MODEL OUT STEPS [METHOD] [RESUME]."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

import fedmpi


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Sequences whose class is the parity of their first token; for GPT-2 the tokens count up."""

    def __init__(self, kind: str) -> None:
        generator = torch.Generator().manual_seed(3)
        first = torch.randint(2, 40, (64, 1), generator=generator)
        self.ids = first + torch.arange(12)
        self.labels = first[:, 0] % 2 if kind == "bert" else self.ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def model(kind: str) -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(4)
    if kind == "bert":
        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
        return BertForSequenceClassification(BertConfig(vocab_size=60, max_position_embeddings=16, **sizes))
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=16, n_embd=48, n_layer=2, n_head=4))


def main() -> None:
    kind, out, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    method: Any = json.loads(sys.argv[4]) if len(sys.argv) > 4 else None
    resume = len(sys.argv) > 5
    torch.set_num_threads(1)
    if "RANK" not in os.environ:  # mpirun: the Trainer asks torch.distributed's variables who it is
        fedmpi.ddp.init_process_group("gloo")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
    )
    callback = fedmpi.transformers.CompressionCallback(method, exact_below=500) if method else None
    trainer = Trainer(
        model(kind), arguments, train_dataset=Tokens(kind), callbacks=[callback] if callback else None
    )
    trainer.train(resume_from_checkpoint=resume or None)
    if trainer.is_world_process_zero():
        weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        torch.save(weights, out / "final.pt")
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        stats = callback.state.stats() if callback and callback.state else None
        report = {"losses": losses, "stats": stats, "ranks": arguments.world_size}
        (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
