"""Clients that step by an optimizer of torch's kind, named by its import path: ``torch.optim:RMSprop``.

It is tried once before the run, on parameters of the same shapes: what it remembers, whether it draws random numbers,
and what it cannot do here show in two steps. Each client gets one made anew, so that nothing of one client's comes to
another's.

Shape suffix: D parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedmpi import own
from fedmpi.errors import ConfigError
from fedmpi.local import Local, OwnOptimizer
from fedmpi.method import State

USAGE = "optimizer(parameters, lr, **options) -> torch.optim.Optimizer"
_BEGUN = "begun"  # whether a client has stepped before


class TorchOptimizer:
    """Of the parameters that a trainer's clients step, one after the other.

    Attributes:
      draws: its steps draw torch's random numbers.
      fresh: what a client keeps of it before its first step; {} where it remembers nothing.
    """

    def __init__(self, of: OwnOptimizer, parameters: dict[str, nn.Parameter], lr: float, keep: bool) -> None:
        """Args:
        parameters: by name; their values and gradients are set by others.
        lr: local.lr.
        keep: clients keep its memory from round to round.

        Raises:
          ConfigError: there is none of this name, it does not take these options, or does not work here (says why).
        """
        self._of, self._parameters, self._lr = of, parameters, lr
        self._title = f"local.optimizer: {of.name}"
        self.fresh: State = {}
        self._kinds: dict[str, type] = {}
        self.draws = self._tried(keep)
        self._made = self._make(parameters)

    @classmethod
    def of(cls, local: Local, model: nn.Module, names: Sequence[str], keep: bool) -> TorchOptimizer | None:
        """The one that ``local`` names, of these parameters; None where it names none."""
        if not isinstance(local.optimizer, OwnOptimizer):
            return None
        named = dict(model.named_parameters())
        made = cls(local.optimizer, {name: named[name] for name in names}, local.lr, keep)
        if local.keep and not made.fresh:
            raise ConfigError(
                f"local.keep: expected an optimizer with a memory, got {local.optimizer.name} without one"
            )
        return made

    def begin(self, memory: State | None) -> None:
        """A client begins, with what it kept."""
        self._made = self._make(self._parameters)
        if not memory or not int(memory[_BEGUN]):
            return
        for place, value in memory.items():
            if place != _BEGUN:
                name, key = place.rsplit(".", 1)
                kind = self._kinds[place]
                self._made.state[self._parameters[name]][key] = (
                    value.clone() if kind is Tensor else kind(value.item())
                )

    def step(self, lr: float) -> None:
        """One step of the gradients that there are."""
        for group in self._made.param_groups:
            group["lr"] = lr
        try:
            self._made.step()
        except Exception as error:  # whatever a user's class does
            raise ConfigError(f"{self._title}: its step fails: {own.said(error)}") from error

    def end(self, memory: State | None) -> None:
        """The client keeps what it remembers, in place."""
        if memory:
            for place, value in self._remembered(self._made, self._parameters).items():
                memory[place].copy_(torch.as_tensor(value))
            memory[_BEGUN].fill_(1)

    def _make(self, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        given = {"lr": self._lr, **self._of.options}
        made = own.call("local.optimizer", self._of.name, [*parameters.values()], options=given, usage=USAGE)
        if not isinstance(made, torch.optim.Optimizer):
            raise ConfigError(f"{self._title} is a {type(made).__name__}, expected {USAGE}")
        return made

    def _tried(self, keep: bool) -> bool:
        """Two steps on others' values; whether it draws. Sets what it remembers."""
        others = {name: nn.Parameter(torch.ones_like(p)) for name, p in self._parameters.items()}
        made = self._make(others)
        closure = inspect.signature(made.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ConfigError(
                f"{self._title}: its step asks for a closure that computes losses anew; expected one that steps by the "
                "gradients that there are"
            )
        places = [p.data_ptr() for p in others.values()]
        drawn, before, states = False, self._apart(made), []
        for _ in range(2):
            for p in others.values():
                p.grad = torch.full_like(p, 0.1)
            generator = torch.get_rng_state()
            try:
                made.step()
            except Exception as error:  # whatever a user's class does
                raise ConfigError(f"{self._title}: its step fails: {own.said(error)}") from error
            drawn = drawn or not torch.equal(generator, torch.get_rng_state())
            torch.set_rng_state(generator)
            states.append(self._remembered(made, others))
        if places != [p.data_ptr() for p in others.values()]:
            raise ConfigError(f"{self._title}: it puts parameters elsewhere, expected steps in place")
        if keep:
            self._check_kept(before, self._apart(made), states)
        if states[-1]:
            self._kinds = {
                place: Tensor if isinstance(v, Tensor) else type(v) for place, v in states[-1].items()
            }
            zeros = {place: torch.zeros_like(torch.as_tensor(value)) for place, value in states[-1].items()}
            self.fresh = {**zeros, _BEGUN: torch.zeros((), dtype=torch.int64)}
        return drawn

    def _check_kept(
        self, before: dict[str, str], after: dict[str, str], states: list[dict[str, Any]]
    ) -> None:
        """Raises:
        ConfigError: clients could not keep what it remembers.
        """
        way_out = "leave keep out: each round then begins anew"
        for place, value in states[-1].items():
            alike = states[0].get(place)
            if not isinstance(value, Tensor | int | float) or isinstance(value, bool):
                raise ConfigError(
                    f"local.keep: {self._of.name} remembers {place}, a {type(value).__name__}, expected tensors and "
                    f"numbers; {way_out}"
                )
            if type(alike) is not type(value) or torch.as_tensor(alike).shape != torch.as_tensor(value).shape:
                raise ConfigError(
                    f"local.keep: what {self._of.name} remembers, {place}, changes its shape; {way_out}"
                )
        if changed := next((name for name in after if before.get(name) != after[name]), None):
            raise ConfigError(
                f"local.keep: {self._of.name} remembers {changed} outside its state, expected it there; {way_out}"
            )

    @staticmethod
    def _remembered(made: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Any]:
        return {
            f"{name}.{key}": value
            for name, p in parameters.items()
            for key, value in made.state.get(p, {}).items()
        }

    @staticmethod
    def _apart(made: torch.optim.Optimizer) -> dict[str, str]:
        """What it holds besides its state, as text."""
        groups = {
            f"param_groups.{key}": repr(value)
            for group in made.param_groups
            for key, value in group.items()
            if key != "params"
        }
        held = {
            name: repr(value) for name, value in vars(made).items() if isinstance(value, int | float | Tensor)
        }
        return groups | {name: text for name, text in held.items() if not name.startswith("_")}
