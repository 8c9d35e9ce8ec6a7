"""Which tensor of a model travels how: rules by name, and what they come to for one model.

All that training changes for everybody is one vector of X numbers: parameters, then buffers. Rules order it into parts,
each a slice that travels by a method of its own. Without rules and buffers there is one part, and its method is the
run's.

Shape suffixes: X numbers of the whole vector, D of its parameters, L of what each client keeps for itself.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, ConfigDict, Field, SerializeAsAny
from torch import Tensor, nn

from fedmpi import methods, random
from fedmpi.errors import ConfigError
from fedmpi.method import Method
from fedmpi.methods import buffers as codecs
from fedmpi.methods.base import Options, Setup
from fedmpi.methods.joint import Part, join
from fedmpi.spec import Spec
from fedmpi.validation import Strict

_WORDS = ("norms", "biases", "buffers")
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_DENSE = methods.parse("dense")
_FATES = ("exact", "local", "frozen")


def _travels(value: Any) -> Any:
    return value if value in _FATES else methods.parse(value, "parts.travels")


class Rule(Strict):
    """One line of a plan; the first that fits a tensor counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    match: str = Field(
        description='a pattern of names ("*.norm*"), norms, biases, buffers, or "< 1024": tensors of fewer numbers'
    )
    travels: Annotated[
        Literal["exact", "local", "frozen"] | SerializeAsAny[Options], BeforeValidator(_travels)
    ] = Field(
        description="exact: averaged as float32; local: each client keeps its own; frozen: nobody changes it; "
        "or a method with its options"
    )


@dataclass(frozen=True)
class Tensors:
    """What a model has, in its own order.

    Attributes:
      parameters, buffers: name → shape: those that training changes.
      integers: the buffers of integers or booleans.
      norms: the parameters of norm layers.
    """

    parameters: dict[str, tuple[int, ...]]
    buffers: dict[str, tuple[int, ...]]
    integers: frozenset[str]
    norms: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, changing: Iterable[str] = ()) -> Tensors:
        """Of a model whose buffers ``changing`` change in training.

        Raises:
          ConfigError: one of a type that cannot travel, or no parameter to train.
        """
        spec, named = Spec.of(model), dict(model.named_buffers())
        changing = [name for name in named if name in set(changing)]
        for name in changing:
            kind = named[name].dtype
            if kind != torch.float32 and (kind.is_floating_point or kind.is_complex):
                raise ConfigError(
                    f"model: buffer {name} is {kind} and changes in training, expected float32 or integers; keep it "
                    "with each client (parts: travels: local) or freeze it"
                )
        return cls(
            dict(zip(spec.names, spec.shapes, strict=True)),
            {name: tuple(named[name].shape) for name in changing},
            frozenset(name for name in changing if not named[name].is_floating_point()),
            frozenset(
                f"{prefix}.{name}".lstrip(".")
                for prefix, module in model.named_modules()
                if isinstance(module, _NORMS)
                for name, _ in module.named_parameters(recurse=False)
            ),
        )

    def fits(self, rule: Rule, name: str) -> bool:
        """The rule is about this tensor; one that names a method is about parameters alone.

        Raises:
          ConfigError: its pattern cannot be read.
        """
        match, shape = rule.match.strip(), self.parameters.get(name)
        if shape is None and isinstance(rule.travels, Options) and match != "buffers":
            return False
        if match.startswith("<"):
            try:
                return shape is not None and math.prod(shape) < int(match[1:])
            except ValueError:
                raise ConfigError(f'parts.match: expected "< 1024" or the like, got {rule.match!r}') from None
        if match == "norms":
            return name in self.norms
        if match == "biases":
            return shape is not None and name.rpartition(".")[2] == "bias"
        if match == "buffers":
            return name in self.buffers
        return fnmatch.fnmatchcase(name, match)


@dataclass(frozen=True)
class Plan:
    """How a model's tensors travel.

    Attributes:
      spec: the whole vector's tensors: parameters, then buffers.
      trained: the parameters among them, which come first.
      buffers: the others.
      local: what each client keeps for itself: parameters, then buffers.
      frozen: what nobody changes.
      control: where SCAFFOLD's c, one number a parameter, lies in the vector, at its end; None: it has none.
      parts: the slices, which cover the vector in its order.
      method: of all parts.
    """

    spec: Spec
    trained: Spec
    buffers: Spec
    local: Spec
    frozen: frozenset[str]
    control: slice | None
    parts: tuple[Part, ...]
    method: Method

    def start(self, model: nn.Module) -> Tensor:
        """x ``(X,)`` of a model as it is."""
        stepping = Spec(self.trained.names + self.buffers.names, self.trained.shapes + self.buffers.shapes)
        start = stepping.flatten(_values(model, stepping))
        return torch.cat([start, start.new_zeros(self.spec.size - len(start))])

    def kept(self, model: nn.Module) -> Tensor:
        """What a client keeps for itself before its first round ``(L,)``."""
        values = _values(model, self.local)
        return self.local.flatten(values) if self.local.names else torch.zeros(0)


def _values(model: nn.Module, spec: Spec) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    values = {name: tensors[name].detach() for name in spec.names}
    for name, value in values.items():
        if not value.is_floating_point() and value.numel() and int(value.abs().max()) > codecs.MOST:
            raise ConfigError(
                f"model: buffer {name} holds {int(value.abs().max())} and changes in training, expected integers up "
                f"to {codecs.MOST}"
            )
    return {name: value.float() for name, value in values.items()}


def make(
    tensors: Tensors,
    options: Options = _DENSE,
    rules: Sequence[Rule] = (),
    setup: Setup = Setup(),  # noqa: B008 - frozen
    control: Options | Literal["exact"] | None = None,
) -> Plan:
    """The plan of a model's ``tensors`` that travel by ``options`` but for what ``rules`` say.

    Args:
      control: how SCAFFOLD's control variates travel; None: there are none.

    Raises:
      ConfigError: a rule fits no tensor, a method does not fit its part, or buffers are to go by a method.
    """
    shapes = tensors.parameters | tensors.buffers
    rule_of = {name: next((r for r in rules if tensors.fits(r, name)), None) for name in shapes}
    for rule in rules:
        if not any(tensors.fits(rule, name) for name in shapes):
            raise ConfigError(
                f"parts.match: {rule.match!r} fits none of the model's tensors; expected a pattern of "
                f"names such as {', '.join(list(shapes)[:3])}, or {', '.join(_WORDS)}"
            )
    fate: dict[str, Any] = {}
    for name, fitting in rule_of.items():
        how: Any = fitting.travels if fitting else "exact" if name in tensors.buffers else options
        if name in tensors.buffers and isinstance(how, Options):
            raise ConfigError(
                f"parts.travels: {how.name} does not go with the buffer {name}, which no gradient changes; expected "
                "exact, local or frozen (put a rule for buffers first)"
            )
        fate[name] = how

    def named(kind: dict[str, tuple[int, ...]], how: Any) -> list[str]:
        return [name for name in kind if fate[name] is how or fate[name] == how]

    ways: list[Any] = []  # in the order of the rules, the run's method last
    for rule in rules:
        if rule.travels not in ("local", "frozen", *ways):
            ways.append(rule.travels)
    if options not in ways:
        ways.append(options)
    groups = [(how, names) for how in ways if (names := named(tensors.parameters, how))]
    if not groups:
        raise ConfigError("parts: expected a parameter that travels, got rules that keep all local or frozen")
    exact = named(tensors.buffers, "exact")
    whole = [name for _, names in groups for name in names]
    spec = _spec([*whole, *sorted(exact, key=lambda name: name in tensors.integers)], shapes)
    parts: list[Part] = []
    start = 0
    for how, names in groups:
        own = _spec(names, shapes)
        title = how.name if isinstance(how, Options) else how
        title = title if title not in [p.name for p in parts] else f"{title}{len(parts) + 1}"
        seed = setup.seed if how is options else random.key(setup.seed, stream=f"part {title}")
        method = methods.build(
            _DENSE if how == "exact" else how, own, Setup(seed, setup.clients, setup.optimizer)
        )
        name = title.replace(".", "_").replace(":", "_")
        parts.append(Part(name, own, slice(start, start + own.size), method, seed))
        start += own.size
    for title, integers, build in (("buffers", False, codecs.averaged), ("counters", True, codecs.largest)):
        own = _spec([n for n in exact if (n in tensors.integers) is integers], shapes)
        if own.size:
            parts.append(Part(title, own, slice(start, start + own.size), build(own), setup.seed, 1.0))
            start += own.size
    trained, buffers, at = _spec(whole, shapes), _spec(spec.names[len(whole) :], shapes), None
    if control is not None:
        own = Spec(tuple(f"{name} (control)" for name in trained.names), trained.shapes)
        at, seed = slice(start, start + own.size), random.key(setup.seed, stream="part control")
        method = methods.build(_DENSE if control == "exact" else control, own, Setup(seed, setup.clients))
        if any(codec.integer for codec in method.passes):
            raise ConfigError(
                "local.scaffold: expected a method whose messages are numbers, got one of votes"
            )
        # Each message counts the same, whatever its client's samples: c moves by their sum over all clients.
        parts.append(Part("control", own, at, method, seed, 1 / (setup.clients or 1), each=True))
        spec = Spec(spec.names + own.names, spec.shapes + own.shapes)
    return Plan(
        spec,
        trained,
        buffers,
        _spec([*named(tensors.parameters, "local"), *named(tensors.buffers, "local")], shapes),
        frozenset(name for name in shapes if fate[name] == "frozen"),
        at,
        tuple(parts),
        join(spec, parts),
    )


def _spec(names: Sequence[str], shapes: dict[str, tuple[int, ...]]) -> Spec:
    return Spec(tuple(names), tuple(shapes[name] for name in names))
