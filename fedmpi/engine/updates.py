"""What clients computed, and updates that are not numbers, or too long.

``on_bad_update: reject`` leaves a client out of a round, as if its message had been lost, when its loss or gradient, a
number of its message, what the message decodes to or what the client would keep is NaN or infinite (or, with
``reproducible``, beyond what an exact sum holds). Both ends keep what they had, it sends no bytes, and the weights of
the others are renormalised. Checking a message takes decoding it once more.

Shape suffixes: C clients, D parameters, S numbers that are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedmpi.config import Config
from fedmpi.errors import NumericalError
from fedmpi.meet.sums import LARGEST
from fedmpi.message import CPU, Message
from fedmpi.method import Compressor, Context, State, believed
from fedmpi.ops.sums import finite as finite_numbers
from fedmpi.ops.sums import finite_rows
from fedmpi.tasks.partitions import Partition


class Update(NamedTuple):
    """What C clients computed.

    Attributes:
      g_CD: what servers subtract: accumulated gradients; of buffers x before − x after. Where the trainer computes.
      loss_C: mean losses, on the CPU.
      steps_C: local steps τ, on the CPU.
      kept: what they keep besides what their method keeps (:meth:`Trainer.keeps`).
    """

    g_CD: Tensor
    loss_C: Tensor
    steps_C: Tensor
    kept: State = {}  # noqa: RUF012 - a named tuple's default, which nobody changes

    def select(self, rows: Tensor) -> Update:
        """Those of the clients at the positions ``rows``; itself where these are all."""
        if len(rows) == len(self.g_CD):
            return self
        there = rows.to(self.g_CD.device)
        kept = {name: value[there] for name, value in self.kept.items()}
        return Update(self.g_CD[there], self.loss_C[rows], self.steps_C[rows], kept)


def on_host(losses: Sequence[float | Tensor]) -> Tensor:
    """Float64 ``(C,)``, asked for at once."""
    there = [loss for loss in losses if isinstance(loss, Tensor)]
    if len(there) < len(losses) or not there:
        return torch.tensor([float(loss) for loss in losses], dtype=torch.float64)
    return torch.stack(there).to(CPU)


def counters(config: Config, partition: Partition) -> tuple[str, ...]:
    """What is worth counting in every round of this configuration: clients whose message was rejected, whose gradient
    was clipped, who were late, who had no samples."""
    there = {
        "rejected": config.on_bad_update == "reject",
        "clipped": config.clip is not None,
        "late": config.time is not None,
        "empty": bool((partition.sizes == 0).any()),
    }
    return tuple(name for name, asked in there.items() if asked)


def finite(update: Update) -> Tensor:
    """The clients that computed numbers, bool ``(C,)`` on the CPU: a loss up to 2^22 and a finite gradient."""
    return (update.loss_C.abs() <= LARGEST) & finite_rows(update.g_CD).to(CPU)


def fits(
    codec: Compressor, message: Message, before: State, after: State, ctx: Context, largest_C: Tensor
) -> Tensor:
    """The clients whose message can be summed, bool ``(C,)`` on the CPU.

    Args:
      message: what they would send, from the state ``before``; they would keep ``after``.
      largest_C: float64, the largest magnitude that a decoded number of each may have.
    """
    decoded_CS, _ = codec.decompress(message, believed(codec, before), ctx)
    good_C = (decoded_CS.double().abs() <= largest_C[:, None].to(decoded_CS.device)).all(1).to(CPU)
    for value in after.values():
        good_C &= finite_rows(value).to(CPU)
    for name, array in message.arrays.items():
        rows = finite_rows(array).to(CPU)
        if name in message.lengths:
            owners = torch.arange(len(good_C)).repeat_interleave(message.lengths[name])
            good_C[owners[~rows]] = False
        else:
            good_C &= rows
    return good_C


def check_fits_float32(message: Message, after: State, t: int) -> None:
    """Raises NumericalError when a message of finite gradients, or what its clients keep ``after`` it, has numbers that
    float32, or a half, cannot hold."""
    if finite_numbers(*message.arrays.values(), *after.values()):  # a device is asked once
        return
    for name, array in message.arrays.items():
        if not finite_numbers(array):
            raise _overflow(t, f"the message's {name}", array, "gradients")
    for name, value in after.items():
        if not finite_numbers(value):
            raise _overflow(t, f"a client's {name}", value, "gradients")


def check_server(state: State, before: State, mean_S: Tensor, t: int) -> None:
    """Raises NumericalError when finite messages, of the mean ``(S,)``, took the server's state, or a view, beyond what
    float32 holds. Ranks that hold the same find the same. What stands in the state ``before`` too is not looked at."""
    new = {name: value for name, value in state.items() if value is not before.get(name)}
    if finite_numbers(*new.values()):  # a device is asked once
        return
    for name, value in new.items():
        if not finite_numbers(value):
            decoded = "the mean of what the messages decode to"
            raise _overflow(
                t, f"the server's {name}" if finite_numbers(mean_S) else decoded, value, "messages"
            )


def _overflow(t: int, what: str, value: Tensor, of: str) -> NumericalError:
    return NumericalError(
        f"round {t}: {what} is beyond the largest {str(value.dtype).removeprefix('torch.')}, though the {of} are "
        "finite; expected smaller gradients: lower local.lr, or set clip.norm"
    )


def clip(update: Update, norm: float) -> tuple[Update, int]:
    """The update with gradients of at most this L2 norm, and how many were longer."""
    norm_C: Tensor = torch.linalg.vector_norm(update.g_CD, dim=1, dtype=torch.float64)
    long_C = norm_C > norm
    factor_C = torch.where(long_C, norm / norm_C, 1.0)
    g_CD = update.g_CD * factor_C.float()[:, None]
    tiny_C = factor_C < torch.finfo(torch.float32).tiny  # a factor that a float32 holds few bits of, or none
    if bool(tiny_C.any()):
        g_CD[tiny_C] = (update.g_CD[tiny_C] * factor_C[tiny_C, None]).float()
    return update._replace(g_CD=g_CD), int(long_C.sum())
