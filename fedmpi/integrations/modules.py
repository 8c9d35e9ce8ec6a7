"""What a job's module must be before its gradients can be averaged: which parameters, of which types and layouts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from fedmpi import methods
from fedmpi.errors import ConfigError
from fedmpi.integrations.settings import Settings, Shapes
from fedmpi.integrations.shards import is_sharded, local
from fedmpi.methods.base import Options

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def uncompiled(module: object) -> object:
    """The module that ``torch.compile`` was given: both train the same parameters, under its names."""
    while any(base.__name__ == "OptimizedModule" for base in type(module).__mro__):
        module = module._orig_mod  # type: ignore[attr-defined]
    return module


def hookable(module: object) -> DistributedDataParallel:
    """The DDP module that a hook can be attached to.

    Raises:
      ConfigError: it is another kind of module, or one whose gradients DDP averages beside its hooks.
    """
    module = uncompiled(module)
    kind = type(module)
    if not isinstance(module, DistributedDataParallel):
        expected = f"ddp: expected a DistributedDataParallel, got {kind.__module__}.{kind.__qualname__}"
        if owner := _averages_itself(module):
            raise ConfigError(
                f"{expected}; {owner} shards and averages gradients by itself, in no hook of DDP's: "
                "wrap the model in DistributedDataParallel instead, or train without fedmpi"
            )
        if isinstance(module, nn.DataParallel):
            raise ConfigError(
                f"{expected}; it is of one process and sends nothing: start one process a device with torchrun "
                "and wrap the model in DistributedDataParallel"
            )
        raise ConfigError(
            f"{expected}; wrap the model first (DistributedDataParallel(model)), or average it after backward() "
            "with fedmpi.sync(model, method); a job of one process has nothing to average"
        )
    if getattr(module, "_delay_all_reduce_params", None):
        raise ConfigError(
            "ddp: expected one made without delay_all_reduce_named_params, whose all-reduce torch does not wait for "
            "(ranks drift apart, with any hook or none); leave that argument out"
        )
    return module


def _averages_itself(module: object) -> str:
    """The library whose wrapper this is, by name: none of them is imported for it."""
    bases = type(module).__mro__
    if any(base.__name__ == "FSDPModule" for base in bases):
        return "FSDP2"
    for base in bases:
        if base.__module__.startswith("torch.distributed.fsdp"):
            return "FSDP"
        if base.__module__.split(".")[0] == "deepspeed" or base.__name__ == "DeepSpeedEngine":
            return "DeepSpeed"
    return ""


def trained(module: nn.Module, ignored: Collection[str] = (), *, shards: bool = False) -> dict[str, Tensor]:
    """The parameters whose gradients are averaged.

    Args: shards: those that FSDP2 or tensor parallelism has sharded can be.

    Raises:
      ConfigError: there is none, or one cannot be averaged in float32 as a whole: the sentence names it.
    """
    found: dict[str, Tensor] = {
        n: p for n, p in module.named_parameters() if p.requires_grad and n not in ignored
    }
    if not found:
        raise ConfigError("model: expected a parameter with requires_grad, got none")
    sparse = {
        id(part.weight)
        for part in module.modules()
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse
    }
    owners: dict[int, str] = {}
    for part in module.modules():
        if owner := _averages_itself(part):
            owners |= {id(p): owner for p in part.parameters(recurse=True)}
    for name, p in found.items():
        if p.dtype not in DTYPES:
            raise ConfigError(
                f"model: parameter {name} is {p.dtype}, expected float32, bfloat16 or float16, for gradients are "
                "averaged in float32; take model.float(), or freeze it (requires_grad_(False))"
            )
        owner = owners.get(id(p), "a DTensor's" if is_sharded(p) else "")
        if owner == "FSDP2" and shards and not is_sharded(p):
            raise ConfigError(
                f"model: parameter {name} is in a module of FSDP2 and not sharded, and so would be averaged over the "
                "replicas alone; shard it (no ignored_params), and call fedmpi.sync before the first forward or after "
                "model.reshard()"
            )
        if owner and not (shards and is_sharded(p)):
            raise ConfigError(
                f"model: parameter {name} is sharded over ranks ({owner}), expected one that every rank holds whole: "
                "who shards it averages its gradient, too; to compress between replicas alone, shard with FSDP2 over "
                'the inner dimension of a mesh, fully_shard(module, mesh=mesh["shard"]), and call '
                'fedmpi.sync(model, method, group=mesh["replicate"].get_group()) instead'
            )
        if id(p) in sparse:
            raise ConfigError(sparse_gradient(name))
        if getattr(p, "_in_backward_optimizers", None):
            raise ConfigError(
                f"model: parameter {name} steps during backward (_apply_optimizer_in_backward), before its gradient is "
                "averaged; expected an optimizer whose step() is called after backward"
            )
    return found


def still(
    module: nn.Module, before: Mapping[str, Tensor], ignored: Collection[str] = ()
) -> dict[str, Tensor]:
    """The parameters by the names of ``before``: other objects, where a job replaced them
    (``load_state_dict(assign=True)``).

    Raises:
      ConfigError: one is no longer there or has another shape or type, or another one is trained.
    """
    now, found = dict(module.named_parameters()), dict[str, Tensor]()
    for name, old in before.items():
        p = now.get(name)
        if p is old or (is_sharded(old) and p is not None and not is_sharded(p)):  # FSDP2 shows the whole one
            found[name] = old
            continue
        has, had = (f"{tuple(x.shape)} of {x.dtype}" if x is not None else "none" for x in (p, old))
        if has != had or p is None or local(p).shape != local(old).shape:
            raise ConfigError(
                f"model: expected parameter {name} to stay {had}, got {has}; {_ANEW.format('fedmpi.sync')}"
            )
        found[name] = p
    for name, p in now.items():
        if p.requires_grad and name not in before and name not in ignored:
            raise ConfigError(
                f"model: parameter {name} was frozen, tied to another or not there when fedmpi.sync was called, and is "
                f"trained now, averaged by nobody; {_ANEW.format('fedmpi.sync')}"
            )
    return found


_ANEW = "call {} after all parameters are as they will be trained"


def watch(module: nn.Module, same: Same) -> RemovableHandle:
    """``same`` looks before each forward pass, instead of one that another call of the same function left."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, Same) and hook.who == same.who:
            del module._forward_pre_hooks[key]
    return module.register_forward_pre_hook(same)


class Same:
    """A forward pre-hook that raises where a job has replaced parameters by others, which nobody averages: those of
    DDP's hooks and of an optimizer stay the old ones."""

    def __init__(
        self, module: nn.Module, names: Collection[str], who: str, fail: Callable[[Exception], object]
    ) -> None:
        """Args:
        names: of the parameters that must stay.
        who: what has to be called anew.
        fail: told of the error before it is raised.
        """
        self.who, self._fail = who, fail
        self._held: list[tuple[str, dict[str, Any], str, Tensor]] = []
        for prefix, part in module.named_modules():
            for name, p in part._parameters.items():
                full = f"{prefix}.{name}" if prefix else name
                if p is not None and full in names:
                    self._held.append((full, part._parameters, name, p))

    def check(self) -> None:
        """
        Raises:
          ConfigError: a parameter is another object.
        """
        for full, parameters, name, p in self._held:
            now = parameters.get(name)
            # Tensors made from parameters (torch.func.functional_call) pass their gradients on to these.
            if now is not p and isinstance(now, nn.Parameter):
                raise ConfigError(
                    f"model: parameter {full} is another object than when {self.who} was called, and averaged by "
                    "nobody; expected load_state_dict without assign=True, or "
                    f"{_ANEW.format(self.who)}"
                )

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        try:
            self.check()
        except ConfigError as error:
            self._fail(error)
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the module, in memory or in a file, is averaged by nobody, and may have any parameters."""
        return _unwatched, ()


def _unwatched() -> Callable[..., None]:
    return _pass


def _pass(module: nn.Module, inputs: Any) -> None:
    """No look at all."""


def sparse_gradient(name: str) -> str:
    return (
        f"model: parameter {name} has sparse gradients, expected dense ones: make it with sparse=False "
        "(nn.Embedding(…, sparse=False)), or freeze it (requires_grad_(False))"
    )


_ELSEWHERE = ("meta", "mps")  # without memory, or without the float64 that sums are made in


def device_of(parameters: Mapping[str, Tensor]) -> torch.device:
    """Where gradients are compressed: where all of the parameters lie; the CPU for those of several devices."""
    devices = {p.device for p in parameters.values()}
    device = devices.pop()
    return torch.device("cpu") if devices or device.type in _ELSEWHERE else device


def shapes_of(parameters: Mapping[str, Tensor]) -> Shapes:
    """Of what this rank holds of them."""
    return {name: tuple(local(p).shape) for name, p in parameters.items()}


def warn_of_nothing(shapes: Shapes, options: Options, settings: Settings) -> None:
    """Say so where a method was asked for, and every tensor is one of those that are averaged exactly."""
    exact, compressed = settings.split(shapes)
    if compressed or options == methods.parse("dense"):
        return
    sizes = {name: (len(shape) > 1, math.prod(shape)) for name, shape in exact.items()}
    name = max(sizes, key=lambda n: sizes[n])
    matrix, size = sizes[name]
    warnings.warn(
        f"fedmpi: {options.name} compresses nothing: every tensor has fewer than {settings.exact_below} numbers or "
        f"less than two dimensions, and goes as it is; the largest is {name}, {tuple(exact[name])}; exact_below="
        f"{size if matrix else 0} compresses it",
        stacklevel=4,
    )
