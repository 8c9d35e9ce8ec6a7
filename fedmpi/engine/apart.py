"""What of a model does not simply step: buffers, and what each client keeps for itself.

Set before a client's training and read after it; buffers that nobody expects to change are looked at.

Shape suffixes: C clients, X numbers that all share (D parameters, then buffers), L that each client keeps for itself, O
of the parameters that a client steps (D, then its own), N of the buffers that training changes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedmpi import own
from fedmpi.errors import ConfigError, FedMPIError
from fedmpi.message import CPU
from fedmpi.plan import Plan
from fedmpi.spec import Spec


def forward(model: nn.Module, x: Tensor) -> Tensor:
    """The output in training of a user's model, which may not take every batch.

    Raises:
      ConfigError: it does not.
    """
    try:
        output: Tensor = model(x)
    except (FedMPIError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        way_out = (
            "; batch norm takes two or more a step: choose a local.batch that leaves no single one, or give clients "
            "more samples"
        )
        raise ConfigError(
            f"model: its forward fails in training on {len(x)} samples: {own.said(error)}"
            f"{way_out if len(x) == 1 else ''}"
        ) from error
    return output


class Apart:
    """Of one model under a plan.

    Attributes:
      trained: the O parameters that a client steps: the plan's, then those that it keeps for itself.
      kept_L: what a client keeps before its first round.
      empty: there is nothing but the plan's parameters.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.plan = plan
        self.kept_L = plan.kept(model).to(next((p.device for p in model.parameters()), CPU))
        parameters = dict(model.named_parameters())
        own = [(n, s) for n, s in zip(plan.local.names, plan.local.shapes, strict=True) if n in parameters]
        local = [
            (n, s) for n, s in zip(plan.local.names, plan.local.shapes, strict=True) if n not in parameters
        ]
        self._own, self._local = (Spec(tuple(n for n, _ in p), tuple(s for _, s in p)) for p in (own, local))
        self.trained = plan.trained
        if own:
            names, shapes = plan.trained.names + self._own.names, plan.trained.shapes + self._own.shapes
            self.trained = Spec(names, shapes)
        both = Spec(plan.buffers.names + self._local.names, plan.buffers.shapes + self._local.shapes)
        self._buffers = Buffers(model, both, plan.frozen)
        changing = plan.buffers.names or plan.local.names or any(n not in parameters for n in plan.frozen)
        self.empty = not changing

    def begin(self, x_X: Tensor, kept_L: Tensor | None = None) -> Tensor:
        """Set the buffers, and return the parameters ``(O,)`` that a client starts from, or a new one without
        ``kept_L``."""
        size, end = self.plan.trained.size, self.plan.trained.size + self.plan.buffers.size
        kept_L = self.kept_L if kept_L is None else kept_L
        own_L, local_L = kept_L[: self._own.size], kept_L[self._own.size :]
        self._buffers.load(torch.cat([x_X[size:end], local_L]))
        return torch.cat([x_X[:size], own_L]) if len(own_L) else x_X[:size]

    def end(self, x_X: Tensor, g_O: Tensor, theta_O: Tensor) -> tuple[Tensor, Tensor]:
        """What a client that began with ``x_X``, whose directions' sum is ``g_O`` and who came to ``theta_O``, has for
        the servers of parameters and buffers, and what it keeps ``(L,)``.

        Raises:
          ConfigError: a buffer changed that nobody expects to.
        """
        size, shared = self.plan.trained.size, self.plan.buffers.size
        now = self._buffers.read()
        g_X = torch.cat([g_O[:size], x_X[size : size + shared] - now[:shared]])
        return g_X, torch.cat([theta_O[size:], now[shared:]])

    @property
    def changing(self) -> Spec:
        """The buffers that training changes: shared, then each client's own."""
        return self._buffers.spec

    def begin_all(self, x_X: Tensor, kept_CL: Tensor | None, clients: int) -> tuple[Tensor, Tensor]:
        """As :meth:`begin`, of several clients at once: the parameters that all start from ``(O,)``, or a row of each,
        and what they hold of :attr:`changing`, a row of each. Nothing is set."""
        size, end = self.plan.trained.size, self.plan.trained.size + self.plan.buffers.size
        kept_CL = self.kept_L.expand(clients, -1) if kept_CL is None else kept_CL
        own_CL, local_CL = kept_CL[:, : self._own.size], kept_CL[:, self._own.size :]
        start_O = x_X[:size]
        if self._own.size:
            start_O = torch.cat([start_O.expand(clients, -1), own_CL], 1)
        return start_O, torch.cat([x_X[size:end].expand(clients, -1), local_CL], 1)

    def end_all(
        self, x_X: Tensor, g_CO: Tensor, theta_CO: Tensor, buffers_CN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`end`, of clients that hold ``buffers_CN`` after their steps."""
        size, shared = self.plan.trained.size, self.plan.buffers.size
        if not (shared or self._own.size):
            return g_CO, buffers_CN
        moved_CN = x_X[size : size + shared] - buffers_CN[:, :shared]
        kept_CL = torch.cat([theta_CO[:, size:], buffers_CN[:, shared:]], 1)
        return torch.cat([g_CO[:, :size], moved_CN], 1), kept_CL

    def mask(self, frozen_X: Tensor | None) -> Tensor | None:
        """Of the O parameters those that stay as they are."""
        if frozen_X is None:
            return None
        return torch.cat([frozen_X[: self.plan.trained.size], frozen_X.new_zeros(self._own.size)])


class Buffers:
    """Some buffers of a model as one vector, and the others, which must stay as they are.

    Args:
      spec: those of the vector ``(B,)``, which training changes.
      frozen: those that are as at the start before each client, whatever training does to them.
    """

    def __init__(self, model: nn.Module, spec: Spec, frozen: Iterable[str] = ()) -> None:
        self.spec, self._device = spec, next((p.device for p in model.parameters()), CPU)
        places = {
            f"{prefix}.{name}".lstrip("."): (module, name)
            for prefix, module in model.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        }
        self._places = {name: places[name] for name in spec.names}
        self._frozen = [(places[name], _at(places[name]).clone()) for name in frozen if name in places]
        others = {name: place for name, place in places.items() if name not in {*spec.names, *frozen}}
        self._others = {
            name: (place, _at(place), _at(place)._version, _at(place).clone())
            for name, place in others.items()
        }

    @torch.no_grad()
    def load(self, values_B: Tensor) -> None:
        """Set them (integers are rounded to)."""
        for (name, value), shape in zip(self.spec.views(values_B).items(), self.spec.shapes, strict=True):
            _set(self._places[name], value.view(shape))
        for place, value in self._frozen:
            _set(place, value)

    def read(self) -> Tensor:
        """What they hold ``(B,)``, float32, a copy.

        Raises:
          ConfigError: another buffer has changed.
        """
        for name, (place, buffer, version, value) in self._others.items():
            now = _at(place)
            if (now is not buffer or now._version != version) and not torch.equal(now, value):
                raise ConfigError(
                    f"model: its buffer {name} changed in training, though not in a first pass; expected a rule for "
                    f"it: parts: [{{match: {name}, travels: exact}}] averages it, local keeps each client's own"
                )
        flat = [_at(self._places[name]).detach().reshape(-1).float() for name in self.spec.names]
        return torch.cat(flat) if flat else torch.zeros(0, device=self._device)


def _at(place: tuple[nn.Module, str]) -> Tensor:
    module, name = place
    buffer = module._buffers[name]
    assert buffer is not None  # it was there
    return buffer


def _set(place: tuple[nn.Module, str], value: Tensor) -> None:
    buffer = _at(place)
    if buffer.grad_fn is not None or buffer.requires_grad:  # a module that assigns what it computed
        place[0]._buffers[place[1]] = value.to(buffer.dtype).clone()
    else:
        buffer.copy_(value)
