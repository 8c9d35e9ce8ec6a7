"""The gap of each method in the job of plain_ddp.py, nothing else changed: ddp_table.py [SEEDS] [STEPS] → Markdown."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

METHODS: tuple[str | None, ...] = (
    None,
    "bf16",
    "{name: qsgd, bits: 4}",
    "signsgd",
    "{name: signsgd, feedback: true}",
    "{name: topk, ratio: 0.01, feedback: true}",
    "{name: rtopk, ratio: 0.01, feedback: true}",
    "{name: randomk, ratio: 0.05, feedback: true}",
    "{name: powersgd, rank: 2, feedback: true}",
    "{name: atomo, rank: 2}",
    "{name: intrinsic, dim: 4000}",
    "{name: intrinsic, dim: 4000, schedule: time_varying, matrix: hashed}",
    "{name: intrinsic, dim: 4000, schedule: k_varying, subspaces: 4, matrix: hashed}",
    "{name: lookback, threshold: 0.2, scope: tensor}",
    "{name: lookback, threshold: 0.2, inner: {name: signsgd, vote: mean}}",
)


def one(method: str | None, seed: int, steps: int) -> dict[str, Any]:
    script = str(Path(__file__).with_name("plain_ddp.py"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", script]
    arguments = ["--seed", str(seed), "--steps", str(steps), *(["--fedmpi", method] if method else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 150
    plain: list[float] = []
    print("| method | test loss | against plain DDP | accuracy | payload |\n|:--|--:|--:|--:|--:|")
    for method in METHODS:
        runs = [one(method, seed, steps) for seed in range(seeds)]
        losses = [run["test_loss"] for run in runs]
        plain = plain or losses
        gaps = [100 * (loss / base - 1) for loss, base in zip(losses, plain, strict=True)]
        accuracies = [100 * run["accuracy"] for run in runs]
        ratio = f"{runs[0]['stats']['ratio']:.1f}x smaller" if method else "1x"
        gap = f"{statistics.mean(gaps):+.1f} % ({min(gaps):+.1f} … {max(gaps):+.1f})" if method else "–"
        print(
            f"| {method or 'plain DDP'} | {statistics.mean(losses):.3f} | {gap} | {statistics.mean(accuracies):.1f} % "
            f"({min(accuracies):.1f} … {max(accuracies):.1f}) | {ratio} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
