"""Compressed gradients in jobs that train with Horovod (0.28), whose files stay as they are.

For every method whose server only averages, Horovod's optimizer wrapper is replaced by ours:

    optimizer = fedmpi.horovod.DistributedOptimizer(optimizer, model.named_parameters(), {"name": "signsgd"})

For those of which an all-reduce can average the messages themselves, Horovod's own wrapper does, with its
overlap of backward pass and sending:

    compression = fedmpi.horovod.Compression({"name": "intrinsic", "dim": 4096}, model.parameters())
    optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), compression=compression)
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedmpi import methods
from fedmpi.errors import CommError, ConfigError
from fedmpi.integrations.job import AnyMethod, Job
from fedmpi.integrations.modules import DTYPES, device_of
from fedmpi.integrations.settings import Settings
from fedmpi.message import Message
from fedmpi.method import Context, Method, Round
from fedmpi.methods.base import Options, Setup
from fedmpi.methods.intrinsic import IntrinsicOptions
from fedmpi.spec import Spec

try:
    import horovod.torch as hvd

    from fedmpi.comm.horovod import HorovodComm
except ImportError as error:
    raise CommError(
        f"fedmpi.horovod: expected Horovod with torch, got: {error}; "
        f"launch/install-horovod.sh of the repository builds it"
    ) from None


class _Sent(NamedTuple):
    """What :meth:`Compression.decompress` must know of a tensor."""

    like: Tensor  # empty, with its dtype and device
    shape: torch.Size
    codec: Method | None
    name: str
    ctx: Context


class Compression:
    """For ``hvd.DistributedOptimizer(compression=…)`` and ``hvd.allreduce(compression=…)``: what ranks send of a
    tensor is averaged by Horovod's all-reduce, in float32.

    Only methods whose messages may be added up number by number, in one pass and with nothing kept between
    steps, can sit there: ``dense``, ``intrinsic`` with one subspace, and ``randomk`` without feedback, here with
    the same coordinates on all ranks. Not fp16 and bf16: the all-reduce would round after each term.

    Horovod hands over one tensor at a time, without its name. So each is compressed by itself, those of one
    size in the same way; ``dim`` is shared out by size, at least 1 a tensor; and a step ends where Horovod
    begins to decompress, which it does on all ranks after the last tensor of the step and before the next one's
    first. With ``op=hvd.Sum`` the result is the sum; ``hvd.Adasum`` is not linear and does not fit.

    Attributes:
      step: steps so far. What a job that resumes has to restore.
    """

    def __init__(
        self,
        method: Options | dict[str, Any] | str,
        parameters: Iterable[Tensor | tuple[str, Tensor]] | None = None,
        *,
        seed: int = 0,
        exact_below: int = 1024,
        steps_per_epoch: int = 1,
    ) -> None:
        """Args:
          method: as in a configuration: ``{"name": "randomk", "ratio": 0.01}``.
          parameters: the model's, with or without names; needed by methods of a fixed size (``dim``).
          seed: of all that is drawn.
          exact_below: tensors of one dimension, and those of fewer numbers, are averaged exactly.
          steps_per_epoch: what a method takes for an epoch.

        Raises:
          ConfigError: wrong options or settings, no ``parameters`` where they are needed, or a method that
            does not fit; :func:`DistributedOptimizer` is there for those.
        """
        self._settings = Settings.of(seed=seed, exact_below=exact_below, steps_per_epoch=steps_per_epoch)
        self._options = _fitting(methods.parse(method))
        tensors = [p[1] if isinstance(p, tuple) else p for p in parameters or ()]
        self._total = sum(p.numel() for p in tensors if p.requires_grad and not self._exact(p))
        if isinstance(self._options, IntrinsicOptions) and not self._total:
            raise ConfigError(
                f"parameters: expected the model's, with some of two dimensions and {exact_below} numbers or more, "
                "to share out method.dim among them, got none"
            )
        self._codecs: dict[int, Method] = {}
        self.step = 0
        self._over = False

    @staticmethod
    def _alone() -> bool:
        """One rank has nothing to average, and what it keeps is its own gradient."""
        return bool(hvd.is_initialized() and hvd.size() == 1)

    def compress(self, tensor: Tensor) -> tuple[Tensor, _Sent | None]:
        """What Horovod is to average, and what :meth:`decompress` needs. Called by Horovod."""
        if self._over:
            self.step, self._over = self.step + 1, False
        if not tensor.is_floating_point() or self._alone():
            return tensor, None
        now = Round(self._settings.seed, self.step, 1.0, self._settings.steps_per_epoch)
        # Client 0 on every rank: what is drawn from a client's key is drawn alike.
        ctx = Context(now, torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
        like = tensor.new_empty(0)
        if self._exact(tensor):
            wire = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
            return wire, _Sent(like, tensor.shape, None, "", ctx)
        codec = self._codec(tensor.numel())
        message, _ = codec.up.compress(tensor.detach().to(torch.float32).reshape(1, -1), {}, ctx)
        [(name, array_1N)] = message.arrays.items()
        return array_1N[0], _Sent(like, tensor.shape, codec, name, ctx)

    def decompress(self, tensor: Tensor, ctx: _Sent | None) -> Tensor:
        """The gradient that the averaged tensor stands for. Called by Horovod."""
        self._over = True
        if ctx is None:
            return tensor
        if ctx.codec is not None:
            mean_1S, _ = ctx.codec.up.decompress(Message({ctx.name: tensor[None]}), {}, ctx.ctx)
            tensor, _ = ctx.codec.directions().direction({}, mean_1S[0], ctx.ctx.round)
        return tensor.to(ctx.like).view(ctx.shape)

    def _exact(self, tensor: Tensor) -> bool:
        return self._settings.exact(tuple(tensor.shape))

    def _codec(self, size: int) -> Method:
        """The method for tensors of ``size`` numbers."""
        if size not in self._codecs:
            options = self._options
            if isinstance(options, IntrinsicOptions):
                share = round(options.dim * size / self._total)
                options = options.model_copy(update={"dim": min(size, max(1, share))})
            self._codecs[size] = methods.build(
                options, Spec(("tensor",), ((size,),)), Setup(self._settings.seed)
            )
        return self._codecs[size]


def _fitting(options: Options) -> Options:
    """``options``, if Horovod's all-reduce can average what the method sends."""
    fits = (
        options.name in ("dense", "intrinsic", "randomk")
        and getattr(options, "values", "float32") == "float32"
    )
    if not fits or getattr(options, "feedback", False) or getattr(options, "schedule", None) == "k_varying":
        raise ConfigError(
            f"method: {options.name} with these options cannot be averaged by Horovod's all-reduce, which adds up "
            "numbers once a step and keeps nothing between steps; expected dense, intrinsic with one subspace, or "
            "randomk without feedback and with values: float32. fedmpi.horovod.DistributedOptimizer takes the others"
        )
    if getattr(options, "k", None) is not None:
        raise ConfigError("method.k: expected ratio here, where each tensor is compressed by itself")
    return options


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None,
    method: AnyMethod,
    *,
    backward_passes_per_step: int = 1,
    scaler: Any = None,
    **settings: Any,
) -> Any:
    """``optimizer`` with gradients averaged over Horovod's ranks, compressed by ``method``, in each ``step()``.

    Used as Horovod's: ``synchronize()`` and ``skip_synchronize()`` for what has to see the averaged gradients
    (clipping, a GradScaler's ``unscale_``), ``hvd.broadcast_optimizer_state``, ``isinstance`` of the given
    optimizer's class, whose state and parameter groups it shares. ``state_dict()`` is that optimizer's alone.
    Otherwise than Horovod's: gradients are sent in ``step()``, not during the backward pass; a ``step()`` after
    ``synchronize()`` never sends again; a closure's gradients are averaged, too. A step whose gradients are not
    finite on any rank leaves them NaN on all, and what the method keeps as it was.

    Args:
      optimizer: any of torch's.
      named_parameters: ``model.named_parameters()``; None names the optimizer's by their place in it.
      method: as in a configuration: ``{"name": "topk", "ratio": 0.01, "feedback": True}``; or ``"auto"``, which
        tries some in the first steps and keeps the fastest.
      backward_passes_per_step: backward passes of a parameter before a ``step()``, at most.
      scaler: the job's GradScaler, if it has one: what is kept from step to step must not change with its scale.
      settings: fields of :class:`fedmpi.integrations.settings.Settings`.

    Returns:
      The wrapped optimizer, with the attribute ``compression``, whose ``stats()`` are the bytes and seconds so
      far, and ``state_dict()`` / ``load_state_dict()`` what the method keeps: every rank saves and loads its own.

    Raises:
      ConfigError: wrong arguments, or a method that changes parameters itself.
      CommError: no ``hvd.init()`` before, or the ranks disagree on parameters, method or settings.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if hasattr(optimizer, "skip_synchronize"):
        raise ConfigError("optimizer: expected a plain one, got one that averages gradients already")
    _at_least_one(backward_passes_per_step)
    parameters = _parameters(optimizer, named_parameters)
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    job = Job(shapes, method, HorovodComm(), settings, device_of(parameters))
    cls = _distributed(type(optimizer))
    wrapped = cls.__new__(cls)
    # A scheduler made before has put its count of steps over the given optimizer's step().
    wrapped.__dict__.update({k: v for k, v in vars(optimizer).items() if k != "step"})
    wrapped._wrap(job, parameters, backward_passes_per_step, scaler)
    return wrapped


def _at_least_one(passes: int) -> int:
    if not isinstance(passes, int) or passes < 1:
        raise ConfigError(f"backward_passes_per_step: expected a whole number from 1, got {passes!r}")
    return passes


def _parameters(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Tensor]] | None
) -> dict[str, Tensor]:
    """The optimizer's trainable parameters by name, in the order of ``named``."""
    groups = [group["params"] for group in optimizer.param_groups]
    if named is None:
        named = [(f"{i}.{j}", p) for i, group in enumerate(groups) for j, p in enumerate(group)]
    pairs = list(named)
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise ConfigError(
            "named_parameters: expected pairs of name and parameter, as model.named_parameters()"
        )
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ConfigError(f"named_parameters: expected each name once, got {', '.join(twice)} more than once")
    own = {p for group in groups for p in group}
    unnamed = own - {p for _, p in pairs}
    if unnamed:
        raise ConfigError(
            f"named_parameters: expected all of the optimizer's {len(own)} parameters, {len(unnamed)} are missing"
        )
    parameters = {name: p for name, p in pairs if p in own and p.requires_grad}
    for name, p in parameters.items():
        if p.dtype not in DTYPES:
            raise ConfigError(
                f"named_parameters: {name} is {p.dtype}, expected float32, bfloat16 or float16, for gradients are "
                "averaged in float32; take model.float(), or freeze it (requires_grad_(False))"
            )
    if not parameters:
        raise ConfigError("named_parameters: expected some that require a gradient, got none")
    return parameters


def _distributed(base: type[torch.optim.Optimizer]) -> Any:
    """A subclass of ``base`` whose steps begin with the ranks' mean gradient."""

    class Distributed(base):  # type: ignore[valid-type,misc]
        compression: Job

        def _wrap(self, job: Job, parameters: dict[str, Tensor], passes: int, scaler: Any) -> None:
            self.compression, self._named, self._scaler = job, parameters, scaler
            self._passes, self._done = passes, dict.fromkeys(parameters, 0)
            self._synchronized, self._should_synchronize = False, True
            for name, p in parameters.items():
                p.register_post_accumulate_grad_hook(_counter(weakref.ref(self), name))

        def _count(self, name: str) -> None:
            self._synchronized = False
            self._done[name] += 1
            if self._done[name] > self._passes:
                raise ConfigError(
                    f"backward_passes_per_step: {name} had {self._done[name]} backward passes before step(), "
                    f"expected at most {self._passes}"
                )

        def set_backward_passes_per_step(self, passes: int) -> None:
            self._passes = _at_least_one(passes)

        def synchronize(self) -> None:
            """Average the gradients now. Called by all ranks."""
            if not self._synchronized:
                self._check()
                self.compression.average(self._named, self._scaler)
                self._synchronized = True

        def _check(self) -> None:
            """No gradient that nobody averages, none of a kind that cannot be."""
            named = set(self._named.values())
            strange = [p for group in self.param_groups for p in group["params"] if p not in named]
            if any(p.grad is not None for p in strange):
                raise ConfigError(
                    "optimizer: a parameter that was frozen, or not there, when it was wrapped now has a gradient; "
                    "wrap it after all parameters are as they will be trained"
                )
            for name, p in self._named.items():
                if p.grad is not None and p.grad.is_sparse:
                    raise ConfigError(f"named_parameters: {name} has a sparse gradient, expected a dense one")

        @contextmanager
        def skip_synchronize(self) -> Iterator[None]:
            """``step()`` inside of it does not average: :meth:`synchronize` has."""
            self._should_synchronize = False
            try:
                yield
            finally:
                self._should_synchronize = True

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            def averaged() -> Any:
                assert closure is not None
                loss = closure()
                self.synchronize()
                return loss

            if not self._should_synchronize:
                result = base.step(self, closure)
            elif closure is not None:
                result = base.step(self, averaged)
            else:
                self.synchronize()
                result = base.step(self)
            self._begin()
            return result

        def zero_grad(self, set_to_none: bool = True) -> None:
            self._begin()
            base.zero_grad(self, set_to_none)

        def _begin(self) -> None:
            self._synchronized = False
            self._done = dict.fromkeys(self._named, 0)

    Distributed.step.hooked = True  # type: ignore[attr-defined]  # its hooks are those of base.step
    Distributed.__name__ = Distributed.__qualname__ = base.__name__
    # hvd.broadcast_optimizer_state looks here, to make the first state without a step of all ranks.
    Distributed.__module__ = hvd.DistributedOptimizer.__module__
    return Distributed


def _counter(owner: weakref.ref[Any], name: str) -> Callable[[Tensor], None]:
    """Tells the wrapped optimizer of each backward pass, for as long as it lives: parameters live longer."""

    def count(p: Tensor) -> None:
        alive = owner()
        if alive is not None:
            alive._count(name)

    return count
