"""A transformers.Trainer job on random tokens: trainer.py MODEL OUT STEPS [METHOD] [RESUME].

One that resumes, from its fourth step, also does what makes a Trainer wrap its model again, and saves and loads with
accelerate alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

import fedmpi
from fedmpi.errors import ConfigError


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
    from transformers import Trainer

    arguments = arguments_for(out, max_steps=steps)
    callback = fedmpi.transformers.CompressionCallback(method, exact_below=500) if method else None
    trainer = Trainer(
        model(kind), arguments, train_dataset=Tokens(kind), callbacks=[callback] if callback else None
    )
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-4") if resume else None)
    more = again(kind, out, method) if resume else {}
    if trainer.is_world_process_zero():
        weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        name = "resumed" if resume else "final"
        torch.save(weights, out / f"{name}.pt")
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        stats = callback.state.stats() if callback and callback.state else None
        logged = [entry for entry in trainer.state.log_history if "fedmpi_ratio" in entry]
        report = {"losses": losses, "stats": stats, "logged": logged, "ranks": arguments.world_size, **more}
        (out / f"{name}.json").write_text(json.dumps(report))


def arguments_for(out: Path, **more: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(out),
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
        **more,
    )


def again(kind: str, out: Path, method: Any) -> dict[str, Any]:
    """What the hook has done by the end of each way to train once more."""
    from transformers import Trainer, TrainerCallback

    class Full(TrainerCallback):  # type: ignore[misc]
        """The first attempt runs out of memory in its second step."""

        def __init__(self) -> None:
            self.steps = 0

        def on_step_end(self, *arguments: Any, **_: Any) -> None:
            self.steps += 1
            if self.steps == 2:
                raise RuntimeError("CUDA out of memory.")

    def trainer(steps: int, to: str, model_init: Any = None, **more: Any) -> Any:
        callback = fedmpi.transformers.CompressionCallback(method, exact_below=500)
        made = Trainer(
            None if model_init else model(kind),
            arguments_for(out / to, max_steps=steps, **more),
            train_dataset=Tokens(kind),
            model_init=model_init,
            callbacks=[callback],
        )
        made.compression = callback
        return made

    def told(made: Any) -> list[Any]:
        """Steps of the hook that reports, and whether it is the one of the wrapper that trained."""
        state = made.compression.state
        return [state.stats()["step"], made.model_wrapped._fedmpi is state]

    found: dict[str, Any] = {}
    moved = trainer(8, "elsewhere")
    moved.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    found["moved"] = told(moved)
    if moved.is_world_process_zero():
        torch.save(moved.model.state_dict(), out / "moved.pt")
    retried = trainer(3, "retried", auto_find_batch_size=True)
    retried.add_callback(Full())
    retried.train()
    found["retried"] = told(retried)
    anew = trainer(2, "anew", model_init=lambda: model(kind))
    anew.train()
    anew.train()
    found["anew"] = told(anew)
    found["accelerate"] = alone(out / "alone")
    return found


def alone(out: Path) -> dict[str, Any]:
    """A job on accelerate without a Trainer: what it saved, and how far it is from itself after it loaded."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net, generator = torch.nn.Linear(40, 40), torch.Generator().manual_seed(accelerator.process_index)
    ddp, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1))
    state = fedmpi.ddp.attach(ddp, {"name": "topk", "ratio": 0.1, "feedback": True})
    fedmpi.accelerate.register(accelerator, state)

    def steps(n: int) -> torch.Tensor:
        for _ in range(n):
            optimizer.zero_grad()
            accelerator.backward(ddp(torch.randn(4, 40, generator=generator)).square().mean())
            optimizer.step()
        return net.weight.detach().clone()

    steps(3)
    accelerator.save_state(str(out))
    before = generator.get_state()
    expected = steps(3)
    accelerator.wait_for_everyone()
    accelerator.load_state(str(out))
    generator.set_state(before)
    apart = float((steps(3) - expected).abs().max())
    try:  # what register_for_checkpointing would do with rank 0's
        state.load_state_dict(torch.load(out / "fedmpi-rank0.pt", weights_only=True))
        refused = ""
    except ConfigError as error:
        refused = str(error)
    return {"files": sorted(path.name for path in out.glob("fedmpi*")), "apart": apart, "refused": refused}


if __name__ == "__main__":
    main()
