"""Updates that are not numbers, or too long.

``on_bad_update: reject`` leaves a client out of a round, as if its message had been lost, when its loss or gradient, a
number of its message, what the message decodes to or what the client would keep is NaN or infinite (or, with
``reproducible``, beyond what an exact sum holds). Both ends keep what they had, it sends no bytes, and the weights of
the others are renormalised. Checking a message takes decoding it once more.

Shape suffixes: C clients, D parameters, S numbers that are summed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmpi.config import Config
from fedmpi.engine.trainer import Update
from fedmpi.errors import NumericalError
from fedmpi.meet.sums import LARGEST
from fedmpi.message import Message
from fedmpi.method import Compressor, Context, State, believed
from fedmpi.ops.sums import finite as finite_numbers
from fedmpi.ops.sums import finite_rows
from fedmpi.tasks.partitions import Partition


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
    """The clients that computed numbers, bool ``(C,)``: a loss up to 2^22 and a finite gradient."""
    return (update.loss_C.abs() <= LARGEST) & finite_rows(update.g_CD)


def fits(
    codec: Compressor, message: Message, before: State, after: State, ctx: Context, largest_C: Tensor
) -> Tensor:
    """The clients whose message can be summed, bool ``(C,)``.

    Args:
      message: what they would send, from the state ``before``; they would keep ``after``.
      largest_C: float64, the largest magnitude that a decoded number of each may have.
    """
    decoded_CS, _ = codec.decompress(message, believed(codec, before), ctx)
    good_C = (decoded_CS.double().abs() <= largest_C[:, None]).all(1)
    for value in after.values():
        good_C &= finite_rows(value)
    for name, array in message.arrays.items():
        rows = finite_rows(array)
        if name in message.lengths:
            owners = torch.arange(len(good_C)).repeat_interleave(message.lengths[name])
            good_C[owners[~rows]] = False
        else:
            good_C &= rows
    return good_C


def check_fits_float32(message: Message, after: State, t: int) -> None:
    """Raises NumericalError when a message of finite gradients, or what its clients keep ``after`` it, has numbers that
    float32, or a half, cannot hold."""
    for name, array in message.arrays.items():
        if not finite_numbers(array):
            raise _overflow(t, f"the message's {name}", array, "gradients")
    for name, value in after.items():
        if not finite_numbers(value):
            raise _overflow(t, f"a client's {name}", value, "gradients")


def check_server(state: State, before: State, mean_S: Tensor, t: int) -> None:
    """Raises NumericalError when finite messages, of the mean ``(S,)``, took the server's state, or a view, beyond what
    float32 holds. Ranks that hold the same find the same. What stands in the state ``before`` too is not looked at."""
    for name, value in state.items():
        if value is not before.get(name) and not finite_numbers(value):
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
