"""Adding up clients' vectors over chunks, clients and ranks.

With ``reproducible`` the sum is the same to the bit in any order: every weighted value is rounded to a
multiple of 2^-40 in int64, whose addition is associative. 2^-40 ≈ 10^-12 is far below the float32 step of
a parameter near 0.01, and sums up to 2^23 fit; a larger one is an error, never a silent wrap.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedmpi.comm.base import Comm
from fedmpi.errors import NumericalError
from fedmpi.ops.sums import add_fixed, from_fixed

LARGEST = 2.0**22


def largest_term(terms: int) -> float:
    """The largest magnitude of a weighted value of an exact sum, so that no partial sum, on any rank, can wrap."""
    return LARGEST / max(terms, 1)


class Sum:
    """The weighted sum of vectors of S numbers; an integer one counts votes in the smallest fitting type.

    With ``flag`` one more number is summed over the ranks beside them: :attr:`flag_1`, a view.
    """

    def __init__(self, size: int, *, integer: bool, exact: bool, terms: int, flag: bool = False) -> None:
        self.integer, self.exact = integer, exact and not integer
        votes = next(t for t in (torch.int8, torch.int16, torch.int32) if terms <= torch.iinfo(t).max)
        dtype = votes if integer else torch.int64 if exact else torch.float32
        self._all = torch.zeros(size + flag, dtype=dtype)
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
