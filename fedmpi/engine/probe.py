"""One look at a model before it trains: on what its training depends besides its parameters and the batch, and whether
its output fits the loss.

Buffers that change travel with the parameters, and a model that draws random numbers gets those of its client and
step; such models, and those whose rows depend on one another (batch norm), train a client at a time. Which they are
(dropout that is no module, running statistics under any name, statistics of a batch, a draw of Python's or NumPy's)
shows in what a model does with a few samples, whatever its layers are called. State that is no buffer is refused:
nobody could carry it from client to client.

Shape suffix: B samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedmpi import own
from fedmpi.engine.draws import held, seed_held, standing
from fedmpi.errors import ConfigError, FedMPIError
from fedmpi.tasks import objectives
from fedmpi.tasks.data import Data
from fedmpi.tasks.metrics import METRICS, Measures
from fedmpi.tasks.models import SEEDING

_SAMPLES, _FEW, _LARGE = 4, 2, 1 << 20  # of a model with so many parameters, few
_ALIKE = 1e-3  # of the largest entry: a sample alone and among others, by other kernels in another order
_ALONE = (
    "expected the same row for a sample in any batch, alone too, in evaluation: name dimensions rather than squeeze "
    "all, and let batch norm keep running statistics"
)


class Traits(NamedTuple):
    """What a model's training depends on besides its parameters and the batch.

    Attributes:
      changes: buffers that a pass in training changes.
      draws: it computes with random numbers.
      alone: a sample's row is the same whatever else is in the batch.
      maps: its loss can be mapped over batches.
    """

    changes: tuple[str, ...] = ()
    draws: bool = False
    alone: bool = True
    maps: bool = True

    @property
    def plain(self) -> bool:
        """On nothing."""
        return self.alone and not self.draws and not self.changes


def look(name: str, model: nn.Module, measured: Measures, data: Data) -> Traits:
    """The model, its buffers and all generators are as before.

    Args:
      name: the model's, for errors.
      model: as built, on the CPU.
      measured: what it is trained for, and what is measured.
      data: what it is to train on.

    Raises:
      ConfigError: the model fails on samples, its output does not fit the loss, or it keeps state that is no buffer.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(
            f"model {name}: expected a module of Python's, whose buffers and random numbers can be set, got one that "
            "torch.jit has compiled; return the module that it was made of"
        )
    few = sum(p.numel() for p in model.parameters()) > _LARGE
    # Some that stand far from each other: the first ones may be alike.
    index = torch.linspace(0, len(data.train.y) - 1, _FEW if few else _SAMPLES).long()
    x_B, y_B = data.train.x[index], data.train.y[index]
    with SEEDING, torch.no_grad(), _unchanged(model):
        _shake(model)
        return _Probe(f"model {name}", model, x_B).look(
            lambda output: "" if measured.free else objectives.misfit(measured.objective, output, y_B, data),
            measured,
            y_B,
        )


class _Probe:
    """Of one model on ``x_B``."""

    def __init__(self, title: str, model: nn.Module, x_B: Tensor) -> None:
        self.title, self.model, self.x_B = title, model, x_B

    def look(self, fits: Callable[[Tensor], str], measured: Measures, y_B: Tensor) -> Traits:
        """All of it; ``fits`` says what of an output does not fit."""
        buffers = dict(self.model.named_buffers())
        self._start = {name: (buffer, buffer.clone()) for name, buffer in buffers.items()}
        self._own = held(self.model)
        parameters = [(name, p, p.detach().clone()) for name, p in self.model.named_parameters()]
        evaluated = self._run(self.x_B, train=False)
        for output in (evaluated, self._run(self.x_B)):
            if wrong := fits(output):
                raise ConfigError(f"{self.title}: {wrong}")
        if changed := next((name for name, p, value in parameters if not torch.equal(p, value)), None):
            raise ConfigError(
                f"{self.title}: its forward changes the parameter {changed}; expected that steps alone do: leave out "
                "max_norm of an embedding and changes in place, or compute with a changed copy"
            )
        now = dict(self.model.named_buffers())
        changes = tuple(
            name
            for name, (_, value) in self._start.items()
            if _differ(value, now[name], 0) or now[name] is not self._start[name][0]
        )
        self._evaluates_alike()
        draws = self._draws()
        self._restore()
        before = _numbers(self.model)
        self._run(self.x_B)
        self._keeps_nothing_else(before, _numbers(self.model))
        self._restore()
        if _differ(self._run(self.x_B, train=False), evaluated):
            raise ConfigError(
                f"{self.title}: its output in evaluation is another after passes in training, without a step between; "
                "expected no state but parameters and buffers: keep running statistics in buffers (register_buffer)"
            )
        alone, maps = self._takes_each_sample_alone(), True
        self._restore()
        if measured.own:
            found = _look_at_own(measured, evaluated, y_B)
            draws, alone, maps = draws or found.draws, alone and found.alone, found.alone
        self._has_gradients(lambda output: measured.objective.loss(output, y_B))
        return Traits(changes, draws, alone, maps)

    def _restore(self) -> None:
        """Buffers as they were."""
        now = dict(self.model.named_buffers())
        for name, (_, value) in self._start.items():
            if now[name].grad_fn is None:
                now[name].detach().copy_(value)

    def _keeps_nothing_else(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        changed = [name for name, value in before.items() if name in now and _differ(value, now[name])]
        if changed:
            raise ConfigError(
                f"{self.title}: a pass in training changes its attribute {changed[0]}; expected no state but "
                "parameters and buffers, which clients can take along: register it as a buffer (register_buffer), or "
                "leave it out"
            )

    def _evaluates_alike(self) -> None:
        """In evaluation it draws nothing: what is measured would be another value each time."""
        outputs = []
        for seed in (1, 2):
            self._restore()
            _states(seed, self._own)
            outputs.append(self._run(self.x_B, train=False))
        if _differ(outputs[0], outputs[1]):
            raise ConfigError(
                f"{self.title}: its output in evaluation is random; expected random numbers in training alone: ask "
                "for self.training first"
            )
        self._restore()

    def _draws(self) -> bool:
        """It computes with random numbers of torch, NumPy or Python."""
        outputs, moved = [], ""
        for seed in (1, 2):
            self._restore()
            before = _states(seed, self._own)
            outputs.append(self._run(self.x_B))
            after = _states(own=self._own)
            moved = moved or next((who for who, state in after.items() if state != before[who]), "")
        changes = _differ(outputs[0], outputs[1])
        if changes and not moved:
            raise ConfigError(
                f"{self.title}: two passes in training over the same samples give different outputs, and no generator "
                "of torch's, NumPy's or Python's was asked; expected that parameters, buffers, samples and these "
                "decide alone: leave out the time, and state that it keeps"
            )
        if moved == "torch" and not changes:  # rarely drawn, or drawn for nothing: what do extremes do?
            for value in (0.0, 1 - 2.0**-24):
                self._restore()
                changes = changes or _differ(self._extreme(value), outputs[0])
        return changes or moved not in ("", "torch")

    def _takes_each_sample_alone(self) -> bool:
        """In training; in evaluation it must."""
        together = self._run(self.x_B, train=False)
        for x, expected in ((self.x_B[:1], together[:1]), (self.x_B[1:], together[1:])):
            try:
                got = self._run(x, train=False)
            except ConfigError as error:
                raise ConfigError(f"{error} (with {len(x)} of {len(self.x_B)} samples); {_ALONE}") from error
            if got.dim() == expected.dim() > 2 and got.shape[1] < expected.shape[1]:
                expected = expected[:, : got.shape[1]]  # tokens, cut to the longest of the batch
            if got.shape != expected.shape:
                raise ConfigError(
                    f"{self.title}: expected an output of shape {tuple(expected.shape)} for {len(x)} of its samples, "
                    f"got {tuple(got.shape)}; squeeze, view and mean must leave the first dimension, the samples"
                )
            if _differ(got, expected, _ALIKE):
                raise ConfigError(
                    f"{self.title}: its output for a sample depends on the other samples of the batch; {_ALONE}"
                )
        return self._trains_alone()

    def _trains_alone(self) -> bool:
        self._restore()
        together = self._run(self.x_B)
        for x, expected in ((self.x_B[:1], together[:1]), (self.x_B[1:], together[1:])):
            self._restore()
            try:
                got = self._run(x)
            except ConfigError:  # batch norm of one sample
                return False
            if got.dim() == expected.dim() > 2 and got.shape[1] < expected.shape[1]:
                expected = expected[:, : got.shape[1]]
            if _differ(got, expected, _ALIKE):
                return False
        return True

    def _has_gradients(self, loss: Callable[[Tensor], Tensor]) -> None:
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        with torch.enable_grad():
            output = self._run(self.x_B)
            if not output.requires_grad:
                raise ConfigError(
                    f"{self.title}: no gradient reaches its parameters; leave out torch.no_grad and detach"
                )
            try:
                grads = torch.autograd.grad(loss(output), list(named.values()), allow_unused=True)
            except Exception as error:
                raise ConfigError(f"{self.title}: its backward pass fails: {own.said(error)}") from error
        for name, grad in zip(named, grads, strict=True):
            if grad is not None and grad.layout != torch.strided:
                raise ConfigError(
                    f"{self.title}: the gradient of parameter {name} is sparse, expected a dense one; set sparse=False"
                )

    def _run(
        self, x: Tensor, train: bool = True, within: AbstractContextManager[object] | None = None
    ) -> Tensor:
        """The output, once it is a float32 tensor with a row a sample."""
        self.model.train(train)
        try:
            with within or nullcontext():
                output: Any = self.model(x.clone())  # a layer in place must not reach the data
        except FedMPIError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{self.title}: its forward fails on training samples of shape {tuple(x.shape)} and {x.dtype}: "
                f"{own.said(error)}"
            ) from error
        if not isinstance(output, Tensor):
            keys = f" of {', '.join(map(str, output))}" if isinstance(output, dict) else ""
            raise ConfigError(
                f"{self.title}: its forward returned a {type(output).__name__}{keys}, expected a tensor of float32: "
                "return the one that the loss is of"
            )
        if output.dtype != torch.float32 or output.layout != torch.strided or output.device.type != "cpu":
            raise ConfigError(
                f"{self.title}: its forward returned a tensor of {output.dtype} ({output.layout}, {output.device}), "
                "expected torch.float32, dense, on the CPU: end with .float()"
            )
        if not output.dim() or len(output) != len(x):
            raise ConfigError(
                f"{self.title}: expected an output with a row a sample, ({len(x)}, …), got {tuple(output.shape)}"
            )
        return output

    def _extreme(self, value: float) -> Tensor:
        """The output when each draw of torch's gives ``value``; what fails then is no number."""
        try:
            return self._run(self.x_B, within=_Draws(value))
        except ConfigError:
            return torch.tensor(torch.nan)


class _Draws(TorchDispatchMode):
    """While it is entered, each draw of floats gives ``value``."""

    def __init__(self, value: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._value = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if drawn and isinstance(result, Tensor) and result.is_floating_point():
            result.fill_(round(self._value) if "bernoulli" in str(func) else self._value)
        return result


def _look_at_own(measured: Measures, output: Tensor, y_B: Tensor) -> Traits:
    """Whether an own loss draws random numbers, and whether it can be mapped over batches.

    Raises:
      ConfigError: it, or an own metric, fails, is no mean, or has no gradient.
    """
    for name, metric in measured.metrics.items():
        if name not in METRICS:
            metric.of(measured.task, output, y_B)
    if not (objective := measured.objective).own:
        return Traits()
    with torch.enable_grad():
        leaf = output.clone().requires_grad_()
        value = objectives.scalar("loss", objective.name, objective.loss, leaf, y_B, objectives.USAGE)
    if not value.requires_grad:
        raise ConfigError(
            f"loss: no gradient comes out of {objective.name}; leave out detach, item and torch.no_grad, and return a "
            "tensor"
        )
    values, moved = [], False
    for seed in (1, 2):
        before = _states(seed)
        values.append(objective.loss(output, y_B))
        moved = moved or _states() != before
    try:
        mapped = objective.losses(torch.stack([output, output]), torch.stack([y_B, y_B]))
    except Exception:  # whatever a user's loss does that cannot be mapped: clients go one after the other
        return Traits(draws=moved, alone=False)
    return Traits(draws=moved, alone=not (moved or _differ(mapped, torch.stack(values), _ALIKE)))


def _differ(a: Any, b: Any, alike: float = 1e-6) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is not type(b) or bool(a != b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return True
    if not a.is_floating_point() or not a.numel():
        return not torch.equal(a, b)
    scale = float(a.nan_to_num(0, 0, 0).abs().max())
    return not torch.allclose(a, b, rtol=0, atol=alike * scale, equal_nan=True)


def _numbers(model: nn.Module) -> dict[str, Any]:
    """Numbers and tensors that modules keep as plain attributes."""
    return {
        f"{prefix}.{name}".lstrip("."): value.clone() if isinstance(value, Tensor) else value
        for prefix, module in model.named_modules()
        for name, value in vars(module).items()
        if name != "training" and isinstance(value, int | float | Tensor)
    }


def _states(seed: int | None = None, own: tuple[Any, ...] = ()) -> dict[str, bytes]:
    """What the three generators and a model's ``own`` stand at, after ``seed`` if there is one."""
    if seed is not None:
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        np.random.seed(seed)  # noqa: NPY002 - the one that a model's forward may draw from
        random.seed(seed)
        seed_held(own, seed)
    kind, words, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "NumPy": np.asarray(words).tobytes() + repr((kind, rest)).encode(),
        "Python": repr(random.getstate()).encode(),
        "own": "".join(map(standing, own)).encode(),
    }


def _shake(model: nn.Module) -> None:
    """Other parameters, as a step would make them: all that are zero (a last layer, an adapter) hide what comes before
    them, and an iteration that has converged for these goes on for others."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.is_floating_point() and p.numel():
            noise = torch.empty_like(p).uniform_(0.05, 0.15, generator=generator)
            p.copy_(p.addcmul(p, noise) if p.count_nonzero() else noise)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """What a model and the generators hold when it ends is what they held when it began."""
    tensors = [*model.parameters(), *model.buffers()]
    values = [t.detach().clone() for t in tensors]
    held = [(module, vars(module).copy(), module._buffers.copy()) for module in model.modules()]
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        for module, attributes, buffers in held:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        for tensor, value in zip(tensors, values, strict=True):
            tensor.detach().copy_(value)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
