"""LoRA adapters of PEFT on a small GPT-2, trained in DistributedDataParallel: lora.py.

Prints "ok" for each rank.
"""

import sys
import warnings

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import GPT2Config, GPT2LMHeadModel

import fedmpi  # fedmpi

SIGNS = {"name": "signsgd", "feedback": True}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=16, n_embd=192, n_layer=2, n_head=4))
    before = base.transformer.wte.weight.clone()
    model = DDP(
        get_peft_model(base, LoraConfig(r=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that nothing would be compressed
        state = fedmpi.ddp.attach(model, SIGNS)  # fedmpi
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    torch.manual_seed(1 + dist.get_rank())
    losses = []
    for _ in range(12):
        ids = torch.randint(2, 40, (8, 1)) + torch.arange(12)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(mine, first), "replicas are apart"
    assert torch.equal(base.transformer.wte.weight, before), "frozen"
    assert losses[-1] < losses[0], losses
    stats = state.stats()
    assert stats["steps"] == 12
    assert stats["ratio"] > 15, stats
    assert stats["uncompressed_bytes"] == 12 * 4 * sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    print("ok", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
