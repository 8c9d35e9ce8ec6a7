"""What becomes one of many vectors, over chunks, clients and ranks: their weighted sum, votes, or a value in their
midst.

With ``reproducible`` the sum is the same to the bit in any order: every weighted value is rounded to a
multiple of 2^-40 in int64, whose addition is associative. 2^-40 ≈ 10^-12 is far below the float32 step of
a parameter near 0.01, and sums up to 2^23 fit; a larger one is an error, never a silent wrap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmpi.comm.base import Comm
from fedmpi.errors import ConfigError, NumericalError
from fedmpi.message import CPU
from fedmpi.method import Compressor, Segment
from fedmpi.ops.sums import add_fixed, from_fixed

LARGEST = 2.0**22


def largest_term(terms: int) -> float:
    """The largest magnitude of a weighted value of an exact sum, so that no partial sum, on any rank, can wrap."""
    return LARGEST / max(terms, 1)


class Sum:
    """The weighted sum of vectors of S numbers; an integer one counts votes in the smallest fitting type.

    With ``flag`` one more number is summed over the ranks beside them: :attr:`flag_1`, a view.

    Attributes:
      total_S: the sum so far.
      floats: it is one of plain float32 numbers, so that others may add to it (:meth:`Compressor.add`).
      largest: the largest magnitude of a weighted value of an exact sum.
    """

    def __init__(
        self,
        size: int,
        *,
        integer: bool,
        exact: bool,
        terms: int,
        flag: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.integer, self.exact = integer, exact and not integer
        self.floats = not (integer or exact)
        votes = next(t for t in (torch.int8, torch.int16, torch.int32) if terms <= torch.iinfo(t).max)
        dtype = votes if integer else torch.int64 if exact else torch.float32
        self._all = torch.zeros(size + flag, dtype=dtype, device=device)
        self.total_S, self.flag_1 = self._all[:size], self._all[size:]
        self.largest = largest_term(terms)

    def clear(self) -> None:
        """Begin again, in the same memory."""
        self._all.zero_()

    def add(self, v_CS: Tensor, weights_C: Tensor) -> None:
        """Add C vectors with float64 weights (ignored for votes).

        Raises:
          NumericalError: an exact sum meets a value beyond 2^22.
        """
        if self.integer:
            self.total_S += v_CS.sum(0, dtype=self.total_S.dtype)
        elif self.exact:
            for v_S, weight in zip(v_CS, weights_C.tolist(), strict=True):
                if not add_fixed(self.total_S, v_S, weight, self.largest):
                    largest = float((v_S.double() * weight).abs().amax())
                    raise NumericalError(
                        f"reproducible: expected weighted values up to {self.largest:.3g}, got {largest:.3g}; "
                        f"a smaller local.lr keeps them small, reproducible: false takes any"
                    )
        else:
            for v_S, weight in zip(v_CS, weights_C.tolist(), strict=True):
                self.total_S.add_(v_S, alpha=weight)

    def over(self, comm: Comm) -> None:
        """Sum over all ranks, too."""
        self.start_over(comm)()

    def start_over(self, comm: Comm) -> Callable[[], None]:
        """Begin that; what comes back waits for the end, before which the sum must be left alone."""
        return comm.start_sum(self._all)

    def value(self, share: float = 1.0) -> Tensor:
        """The sum so far, over the weights' ``share`` that came: float32, or votes as integers."""
        if share == 1.0 or self.integer:
            return from_fixed(self.total_S).float() if self.exact else self.total_S
        return (from_fixed(self.total_S) / share).float() if self.exact else self.total_S / share


class Mixed(Sum):
    """Stretches of different kinds in one sum: weighted means, votes or numbers that count one each, least values.

    Votes are whole numbers in float32 (or fixed point), exact in any order for up to 2^22 of them.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        *,
        exact: bool,
        terms: int,
        flag: bool = False,
        device: torch.device | None = None,
    ) -> None:
        if terms > LARGEST and any(kind == "votes" for _, kind in segments):
            raise ConfigError(f"cohort: expected at most {LARGEST:.0f} votes beside other parts, got {terms}")
        size = sum(size for size, _ in segments)
        super().__init__(size, integer=False, exact=exact, terms=terms, flag=flag, device=device)
        self.segments, self.terms = tuple(segments), terms
        self._sizes = [size for size, _ in segments]

    def add(self, v_CS: Tensor, weights_C: Tensor) -> None:
        stretches = zip(
            self.segments, self.total_S.split(self._sizes), v_CS.split(self._sizes, 1), strict=True
        )
        for (_, kind), total, v in stretches:
            if kind == "least":  # whole numbers, also where the others are fixed-point
                torch.minimum(total, v.amin(0).to(total.dtype), out=total)
                continue
            part = Sum(0, integer=False, exact=self.exact, terms=self.terms)
            part.total_S = total
            if kind == "votes":
                part.largest = 1.0
            part.add(v, weights_C if kind == "mean" else torch.ones_like(weights_C))

    def start_over(self, comm: Comm) -> Callable[[], None]:
        stretches = zip(self.segments, self.total_S.split(self._sizes), strict=True)
        least = [total for (_, kind), total in stretches if kind == "least"]
        if not least:
            return super().start_over(comm)
        told = comm.start_allgather_tensor(torch.cat(least))
        summed = super().start_over(comm)

        def end() -> None:
            least_L = told().amin(0)
            summed()
            for total, value in zip(least, least_L.split([len(total) for total in least]), strict=True):
                total.copy_(value)

        return end

    def value(self, share: float = 1.0) -> Tensor:
        parts = []
        for (_, kind), total in zip(self.segments, self.total_S.split(self._sizes), strict=True):
            part = from_fixed(total) if self.exact and kind != "least" else total
            parts.append((part / share if kind == "mean" and share != 1.0 else part).float())
        return torch.cat(parts)


_BLOCK_VALUES = 1 << 24  # sorted at a time


class Ordered(Sum):
    """The trimmed mean or the median in the place of the mean: what a few clients send, however large, hardly matters.

    Coordinate by coordinate, each client counting once whatever its weight: of C values the ⌊trim · C⌋ smallest and as
    many largest are left out; of an even number of values the median is the mean of the two in the middle. All C
    vectors are held: 4 · C · D bytes. Of sparse vectors the median is mostly zero.

    Source: Yin, Chen, Ramchandran, Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
    Rates", ICML 2018, Definitions 1 and 2.
    """

    def __init__(self, aggregate: str, trim: float, terms: int) -> None:
        super().__init__(0, integer=False, exact=False, terms=terms)
        self.aggregate, self.trim, self._rows = aggregate, trim, list[Tensor]()
        self.floats = False

    def add(self, v_CS: Tensor, weights_C: Tensor) -> None:
        self._rows.extend(v_CS.unbind())

    def value(self, share: float = 1.0) -> Tensor:
        count = len(self._rows)
        middle = (count - 1) // 2
        cut = middle if self.aggregate == "median" else min(middle, int(self.trim * count + 1e-9))
        blocks = zip(*(v_S.split(max(1, _BLOCK_VALUES // count)) for v_S in self._rows), strict=True)
        kept = (torch.stack(rows).sort(0).values[cut : count - cut] for rows in blocks)
        return torch.cat([rows.double().mean(0).float() for rows in kept])


@dataclass(frozen=True)
class Sums:
    """How a run adds up.

    Attributes:
      exact: the same to the bit in any order.
      aggregate, trim: mean, or what :class:`Ordered` takes, where one rank has all vectors.
      device: where messages are decoded and added up.
    """

    exact: bool = False
    aggregate: str = "mean"
    trim: float = 0.0
    device: torch.device = CPU

    def __call__(self, up: Compressor, terms: int, flag: bool = False) -> Sum:
        """The sum of so many clients' (or ranks') vectors; the weights' sum is 1."""
        if self.aggregate != "mean":
            return Ordered(self.aggregate, self.trim, terms)
        kinds = {kind for _, kind in up.segments}
        if kinds == {"least"} or len(kinds) > 1:
            return Mixed(up.segments, exact=self.exact, terms=terms, flag=flag, device=self.device)
        return Sum(up.size, integer=up.integer, exact=self.exact, terms=terms, flag=flag, device=self.device)

    def largest(self, up: Compressor, terms: int) -> float:
        """The largest magnitude that a weighted number of a message may have."""
        return largest_term(terms) if self.exact and not up.integer else torch.finfo(torch.float32).max
