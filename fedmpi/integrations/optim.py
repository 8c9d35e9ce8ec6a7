"""``fedmpi.optim``: optimizers that exchange what they keep, in place of gradients.

    optimizer = fedmpi.optim.OneBitAdam(model.parameters(), lr=1e-3, warmup=1000)
    loss.backward(); optimizer.step()      # of a plain module: the optimizer averages over the ranks

Shape suffixes: N numbers of all parameters (padded to whole bytes a rank), W ranks, K numbers of a rank's chunk, B
bytes, S segments.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate, pairwise
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from fedmpi.comm.agree import agree, versions
from fedmpi.comm.base import Comm, LostError, RankError, together
from fedmpi.errors import ConfigError
from fedmpi.integrations.local_options import connected
from fedmpi.integrations.modules import DTYPES
from fedmpi.integrations.scaling import scaler_behind
from fedmpi.integrations.shards import is_sharded, same_start
from fedmpi.ops import bits
from fedmpi.ops.sums import finite

_KEPT = ("m", "v", "residual", "server")
_COUNTS = ("step", "skipped")


class Chunks:
    """How a vector is cut: into a chunk a rank, which it averages, and these into segments, each with a scale.

    A segment is what of a tensor lies in a chunk, so that a tensor of small numbers is not sent at the scale of one of
    large ones.
    """

    def __init__(self, sizes: Iterable[int], ranks: int) -> None:
        ends = list(accumulate(sizes))
        self.size, self.ranks = ends[-1], ranks
        self.chunk = 8 * max(1, math.ceil(self.size / (8 * ranks)))
        self.padded = self.chunk * ranks
        cuts = sorted({0, *ends, *range(0, self.padded + 1, self.chunk)})
        self.lengths = [b - a for a, b in pairwise(cuts)]
        owner = [a // self.chunk for a, _ in pairwise(cuts)]
        self.of = [
            [n for n, r in zip(self.lengths, owner, strict=True) if r == rank] for rank in range(ranks)
        ]
        self.most = max(map(len, self.of))
        self.nbytes = self.chunk // 8 + 4 * self.most

    def compress(self, x_K: Tensor, rank: int) -> Tensor:
        """The chunk of ``rank`` as ``(B,)`` bytes: its signs (of 0: +) and scales, with which it is as long as before
        in each segment."""
        parts = x_K.split(self.of[rank])
        norms_S = torch.stack(torch._foreach_norm(list(parts)))
        scales_S = x_K.new_zeros(self.most)
        scales_S[: len(parts)] = norms_S / torch.tensor(self.of[rank], device=x_K.device).sqrt()
        return torch.cat([bits.pack((x_K >= 0)[None])[0], scales_S.view(torch.uint8)])

    def decompress(self, row_B: Tensor, rank: int) -> Tensor:
        """What such bytes say: ± the segment's scale."""
        signs_B, scales_B = row_B.split([self.chunk // 8, 4 * self.most])
        scales_S = scales_B.clone().view(torch.float32)[: len(self.of[rank])]
        lengths_S = torch.tensor(self.of[rank], device=row_B.device)
        scales_K = scales_S.repeat_interleave(lengths_S, output_size=self.chunk)
        return torch.where(bits.unpack(signs_B[None], self.chunk)[0], scales_K, -scales_K)


class OneBitAdam(torch.optim.Optimizer):
    """1-bit Adam: Adam for some steps, then its variance stays and momenta travel as signs, both ways with feedback.

    Source: Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed", ICML
    2021, Algorithm 1. After T_w steps, on rank i, with C[x] = ‖x‖/√n · sign(x):

        m⁽ⁱ⁾ = β₁ m + (1 − β₁) g⁽ⁱ⁾;  m̂⁽ⁱ⁾ = C[m⁽ⁱ⁾ + δ⁽ⁱ⁾];  δ⁽ⁱ⁾ ← m⁽ⁱ⁾ + δ⁽ⁱ⁾ − m̂⁽ⁱ⁾
        a = (1/W) Σ m̂⁽ⁱ⁾ + δ̄;  m ← C[a];  δ̄ ← a − m;  x ← x − γ m / √v_{T_w}

    A rank sends 2 (W − 1)/W · N/8 bytes a step, and a scale a tensor. Readings: the ranks share out the server's part,
    a chunk each; C is of each tensor (and chunk) by itself; m and v have Adam's bias correction, v that of step T_w,
    and √v has ε, so that the first T_w steps are those of ``torch.optim.AdamW`` on the mean gradient; the sign of 0 is
    +; no number moves by more than Adam's own bound, γ max(1, (1 − β₁)/√(1 − β₂)) (Kingma and Ba 2015, section 2.1),
    as one of a small v would, by a scale that is its whole tensor's. A number that had no gradient in all of the T_w
    steps has v = 0, and does not move afterwards: a warning says how many.

    Its rate is Adam's. Warm up by at least a tenth of the steps, and until the learning rate's own warm-up is over:
    v must have settled. (The paper: until ‖v_t‖₁/‖v_{t−Δ}‖₁ > 0.96, with Δ = 1/(1 − β₂).)

    Give it a plain module's parameters: DistributedDataParallel would average gradients as well. A parameter without
    gradient counts as one of zeros. A step in which a gradient is not finite on any rank is left out on all.

    Attributes:
      steps, skipped: that counted, and that were left out.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        warmup: int,
        group: dist.ProcessGroup | None = None,
        comm: Comm | str = "auto",
    ) -> None:
        """Called by all ranks, whose parameters are equal.

        Args:
          lr: as in ``torch.optim.AdamW``, like the next three.
          betas: β₁ and β₂.
          eps: ε.
          weight_decay: decoupled, not part of the gradient.
          warmup: T_w, steps of Adam itself, which send float32.
          group: the ranks to average over (default: all).
          comm: "auto": as the job's process group if there is one, else as the launcher says; "group", "mpi", or a
            :class:`fedmpi.comm.Comm`.

        Raises:
          ConfigError: an argument is wrong, or a parameter no dense one of floats.
          CommError: the ranks disagree on arguments, or do not start from the same parameters.
        """
        self.comm = connected(group, comm)
        with together(self.comm, "looking at its arguments"):
            _check(lr, betas, eps, weight_decay, warmup)
            defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
            super().__init__(params, defaults)
            named = {
                f"{i}.{j}": p for i, g in enumerate(self.param_groups) for j, p in enumerate(g["params"])
            }
            self._parameters: list[Tensor] = _checked(named)
        self.warmup, self.steps, self.skipped = warmup, 0, 0
        shapes = {name: list(p.shape) for name, p in named.items()}
        agree(self.comm, {**versions(), "warmup": warmup, "parameters": shapes})
        same_start(self.comm, named)
        self.chunks = Chunks([p.numel() for p in self._parameters], self.comm.size)
        device = self._parameters[0].device
        self._kept = {
            "m": torch.zeros(self.chunks.size, device=device),
            "v": torch.zeros(self.chunks.size, device=device),
            "residual": torch.zeros(self.chunks.padded, device=device),
            "server": torch.zeros(self.chunks.chunk, device=device),
        }
        self._sent0 = self.comm.sent

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Called by all ranks.

        Raises:
          ConfigError: by a GradScaler, which leaves out steps on one rank and not on another.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            if scaler_behind() is not None:
                raise ConfigError(
                    "optimizer: expected step() to be called by the job, got a GradScaler's call, which leaves out "
                    "steps on one rank and not on another; train in bfloat16 or float32, without a scaler"
                )
            with torch.no_grad():
                self._step()
        except BaseException as error:
            if not isinstance(error, (LostError, RankError)):
                self.comm.fail(f"{type(error).__name__}: {error}")
            raise
        return loss

    def _step(self) -> None:
        g_N = torch.cat([_gradient(p) for p in self._parameters])
        if self.steps < self.warmup:
            counts = self._warm(g_N)
        else:
            counts = self._compressed(g_N)
        if not counts:
            self.skipped += 1
            return
        self.steps += 1
        if self.steps == self.warmup and (still := int((self._kept["v"] == 0).sum())):
            warnings.warn(
                f"fedmpi.optim.OneBitAdam: {still:,} of {len(self._kept['v']):,} numbers had no gradient in the first "
                f"{self.warmup} steps, and do not move from here on; expected a warmup in which each has one",
                stacklevel=5,
            )
        self._move()

    def _each(self) -> Iterable[tuple[dict[str, Any], slice]]:
        """Parameter groups, and where in the vectors they lie."""
        start = 0
        for group in self.param_groups:
            stop = start + sum(p.numel() for p in group["params"])
            yield group, slice(start, stop)
            start = stop

    def _warm(self, g_N: Tensor) -> bool:
        """Adam's moments of the mean gradient; False where it is not finite."""
        self.comm.sum([g_N])
        g_N /= self.comm.size
        if not finite(g_N):
            return False
        m_N, v_N = self._kept["m"], self._kept["v"]
        for group, part in self._each():
            beta1, beta2 = group["betas"]
            m_N[part].lerp_(g_N[part], 1 - beta1)
            v_N[part].mul_(beta2).addcmul_(g_N[part], g_N[part], value=1 - beta2)
        return True

    def _compressed(self, g_N: Tensor) -> bool:
        """The momentum that all ranks get from theirs; False, and nothing has changed, where one is not finite."""
        cut, comm, size = self.chunks, self.comm, self.chunks.size
        p_N = self._kept["residual"].clone()
        for group, part in self._each():
            p_N[part] += torch.lerp(self._kept["m"][part], g_N[part], 1 - group["betas"][0])
        rows_WB = torch.stack([cut.compress(p_K, r) for r, p_K in enumerate(p_N.split(cut.chunk))])
        residual_N = p_N - torch.cat([cut.decompress(row_B, r) for r, row_B in enumerate(rows_WB)])
        if not finite(p_N):
            scales_WB = rows_WB[:, cut.chunk // 8 :]
            scales_WB.copy_(torch.full((cut.most,), math.nan, device=p_N.device).view(torch.uint8))
        from_WB = comm.alltoall_tensor(rows_WB)
        a_K = (
            torch.stack([cut.decompress(row_B, comm.rank) for row_B in from_WB]).mean(0)
            + self._kept["server"]
        )
        mine_B = cut.compress(a_K, comm.rank)
        all_WB = comm.allgather_tensor(mine_B)
        m_N = torch.cat([cut.decompress(row_B, r) for r, row_B in enumerate(all_WB)])
        if not finite(m_N):  # the same numbers on all ranks
            return False
        self._kept |= {"m": m_N[:size].clone(), "residual": residual_N}
        self._kept["server"] = a_K - cut.decompress(mine_B, comm.rank)
        return True

    def _move(self) -> None:
        t, frozen = self.steps, min(self.steps, self.warmup)
        for group, part in self._each():
            beta1, beta2 = group["betas"]
            m, v = self._kept["m"][part], self._kept["v"][part]
            u = m / (1 - beta1**t) / ((v / (1 - beta2**frozen)).sqrt_() + group["eps"])
            if t > self.warmup:
                most = max(1.0, (1 - beta1) / math.sqrt(1 - beta2))
                u.clamp_(-most, most).masked_fill_(v == 0, 0.0)
            params = group["params"]
            for p, step in zip(params, u.split([p.numel() for p in params]), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(step.view(p.shape), alpha=-group["lr"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """
        Raises:
          ConfigError: after it was made: momenta of all parameters travel together.
        """
        if hasattr(self, "chunks"):
            raise ConfigError(
                "optimizer: expected all parameters when it is made, got more; make a new OneBitAdam"
            )
        super().add_param_group(param_group)

    def stats(self) -> dict[str, Any]:
        """Steps since it was made or loaded on, and bytes since it was made."""
        return {
            "step": self.steps,
            "skipped": self.skipped,
            "compressed": self.steps >= self.warmup,
            "wire_sent_bytes": self.comm.sent - self._sent0,
            "compressed_bytes_a_step": 2 * (self.comm.size - 1) * self.chunks.nbytes,
            "kept_bytes": sum(x.nbytes for x in self._kept.values()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Every rank saves its own: what it has not sent yet is in it."""
        counts = {
            "ranks": self.comm.size,
            "rank": self.comm.rank,
            "step": self.steps,
            "skipped": self.skipped,
        }
        kept = {name: x.cpu().clone() for name, x in self._kept.items()}
        return super().state_dict() | {"onebit": {**counts, **kept}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` stood. Called by all ranks, each with its own.

        Raises:
          ConfigError: on all ranks, and nothing has changed: it is no such state, or not this rank's, or the ranks' are
            not of the same step.
        """
        told = []
        with together(self.comm, "looking at its state"):
            saved = self._saved(state_dict)
            told = [saved[name] for name in _COUNTS]
        every = self.comm.allgather_tensor(torch.tensor(told)).tolist()
        if any(other != every[0] for other in every):
            raise ConfigError(f"state_dict: expected steps saved at the same time, got {every} of the ranks")
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "onebit"})
        self.steps, self.skipped = told
        for name, x in self._kept.items():
            x.copy_(saved[name])

    def _saved(self, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
        saved = state_dict.get("onebit")
        if not isinstance(saved, Mapping) or {*saved} != {"ranks", "rank", *_COUNTS, *_KEPT}:
            raise ConfigError("state_dict: expected what OneBitAdam.state_dict() returned")
        mine = self.comm.rank, self.comm.size
        if (saved["rank"], saved["ranks"]) != mine:
            raise ConfigError(
                f"state_dict: expected that of rank {mine[0]} of {mine[1]}, got rank {saved['rank']}'s of "
                f"{saved['ranks']}; every rank saves and loads its own"
            )
        for name, x in self._kept.items():
            if not isinstance(saved[name], Tensor) or saved[name].shape != x.shape:
                raise ConfigError(f"state_dict: {name}: expected {len(x)} numbers, as of these parameters")
        for name in _COUNTS:
            if type(saved[name]) is not int or saved[name] < 0:
                raise ConfigError(f"state_dict: {name}: expected a whole number from 0, got {saved[name]!r}")
        return saved


def _gradient(p: Tensor) -> Tensor:
    """
    Raises:
      ConfigError: it is sparse.
    """
    if p.grad is None:
        return torch.zeros(p.numel(), device=p.device)
    if p.grad.layout != torch.strided:
        raise ConfigError(
            f"optimizer: expected dense gradients, got a sparse one of shape {tuple(p.shape)}; set sparse=False"
        )
    return p.grad.detach().reshape(-1).float()


def _check(lr: float, betas: tuple[float, float], eps: float, weight_decay: float, warmup: int) -> None:
    if type(warmup) is not int or warmup < 1:
        raise ConfigError(f"warmup: expected a whole number of steps from 1, got {warmup!r}")
    for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{name}: expected a number from 0, got {value!r}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ConfigError(f"betas: expected two numbers from 0 to below 1, got {betas!r}")


def _checked(named: Mapping[str, Tensor]) -> list[Tensor]:
    if not sum(p.numel() for p in named.values()):
        raise ConfigError("params: expected parameters, got none")
    for name, p in named.items():
        if p.dtype not in DTYPES or is_sharded(p):
            kind = "a sharded one" if is_sharded(p) else str(p.dtype)
            raise ConfigError(
                f"params: parameter {name} (its group and place) is {kind}, expected a whole one of float32, bfloat16 "
                "or float16"
            )
    if len({p.device for p in named.values()}) > 1:
        raise ConfigError("params: expected all on one device, got several")
    return list(named.values())
