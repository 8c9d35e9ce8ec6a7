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
    return (update.loss_C.abs() <= LARGEST) & update.g_CD.sum(1).isfinite()


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
        good_C &= _finite_rows(value)
    for name, array in message.arrays.items():
        rows = _finite_rows(array)
        if name in message.lengths:
            owners = torch.arange(len(good_C)).repeat_interleave(message.lengths[name])
            good_C[owners[~rows]] = False
        else:
            good_C &= rows
    return good_C


def check_fits_float32(message: Message, t: int) -> None:
    """Raises NumericalError when a message of finite gradients has numbers that float32, or a half, cannot hold."""
    for name, array in message.arrays.items():
        if array.is_floating_point() and not bool(array.isfinite().all()):
            raise NumericalError(
                f"round {t}: the message's {name} is beyond the largest {str(array.dtype).removeprefix('torch.')}, "
                "though the gradients are finite; expected smaller gradients: lower local.lr, or set clip.norm"
            )


def _finite_rows(value: Tensor) -> Tensor:
    return value.flatten(1).isfinite().all(1) if value.ndim > 1 else value.isfinite()


def clip(update: Update, norm: float) -> tuple[Update, int]:
    """The update with gradients of at most this L2 norm, and how many were longer."""
    norm_C: Tensor = torch.linalg.vector_norm(update.g_CD, dim=1, dtype=torch.float64)
    long_C = norm_C > norm
    factor_C = torch.where(long_C, norm / norm_C, 1.0)
    return update._replace(g_CD=update.g_CD * factor_C.float()[:, None]), int(long_C.sum())
