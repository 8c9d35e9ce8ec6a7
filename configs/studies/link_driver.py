"""Runs the job of :mod:`configs.studies.link_job` on two ranks across a link of a set bandwidth."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from configs.studies.netns import ADDRESSES, DEVICE, Pair
from fedmpi.errors import ConfigError

_PORT = 29500  # nobody else is in these namespaces


class Job:
    """Two ranks that wait for requests; a context manager that ends them.

    Raises:
      ConfigError: there can be no such link here, or the job cannot run; says why.
    """

    def __init__(self, model: str = "cnn", **data: Any) -> None:
        """Args: model: one of :data:`configs.studies.link_job.MODELS`. data: of :func:`fedmpi.tasks.data.load`."""
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": str(_PORT)}
        common |= {"GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        environments = [{**os.environ, **common, "RANK": str(rank)} for rank in range(2)]
        self.model = model
        self.pair = Pair([[sys.executable, str(Path(__file__).with_name("link_job.py"))]] * 2, environments)
        try:
            self.parameters: int = self.ask("load", model=model, **data)["parameters"]
        except BaseException:
            self.pair.close()
            raise

    def ask(self, what: str, trial: str = "", **request: Any) -> dict[str, Any]:
        """Rank 0's answer to a request of all ranks.

        Raises:
          ConfigError: a rank refused it, or ended.
        """
        line = json.dumps({"do": what, "trial": trial, **request})
        self.pair.tell(line)
        answers = [json.loads(text or '{"error": "a rank ended; see above"}') for text in self.pair.heard()]
        for answer in answers:
            if "error" in answer:
                raise ConfigError(f"link study: {answer['error']}")
        first: dict[str, Any] = answers[0]
        return first

    def start(self, trial: str, case: dict[str, Any], lr: float, seed: int = 0, batch: int = 32) -> None:
        """A new model in training, under the name ``trial``."""
        self.ask("start", trial, case=case, lr=lr, seed=seed, batch=batch)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        self.pair.close()
