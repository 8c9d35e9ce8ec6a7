"""What a rank takes of a download: a frame from whoever sent it, against the layout that the server's rule declares."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmpi.errors import MessageError
from fedmpi.message import Message, from_bytes
from fedmpi.method import Server, State
from fedmpi.ops.sums import finite


def receive(server: Server, view: State, frame: bytes, version: int) -> State:
    """The view after the download ``frame``, which brings it to ``version``.

    Raises:
      MessageError: it is not what this server sends; nothing much larger than it is allocated.
    """
    message = from_bytes(frame, clients=1)
    _check_layout(server, message, len(frame))
    _check_finite(message.arrays, "array ")
    try:
        new = server.reconcile(view, message.to(server.parameters(view).device), version)
    except (LookupError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise MessageError(
            f"download: its arrays do not fit the model or one another ({said:.200})"
        ) from None
    if new.keys() != view.keys():
        raise MessageError(f"download: it leads to {', '.join(new)}, expected {', '.join(view)}")
    for name, value in new.items():
        was = view[name]
        if value.dtype != was.dtype or value.shape[1:] != was.shape[1:] or value.ndim != was.ndim:
            raise MessageError(f"download: {name} comes to {tuple(value.shape)}, expected {tuple(was.shape)}")
        if value.is_floating_point() and value.shape != was.shape:
            raise MessageError(f"download: {name} comes to {tuple(value.shape)}, expected {tuple(was.shape)}")
    _check_finite({name: value for name, value in new.items() if value is not view[name]}, "")
    return new


def _check_finite(values: Mapping[str, Tensor], what: str) -> None:
    if finite(*values.values()):  # a device is asked once
        return
    for name, value in values.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise MessageError(
                f"download: {what}{name!r} has a NaN or an infinity, expected finite numbers; either it was changed on "
                f"its way or the server's parameters have overflowed: then try a smaller server.lr or local.lr"
            )


def _check_layout(server: Server, message: Message, size: int) -> None:
    layout = server.downloads()
    if message.lengths:
        raise MessageError(f"download: {next(iter(message.lengths))!r} is ragged, which no download is")
    for name, array in message.arrays.items():
        shape = tuple(array.shape[1:])
        if any(n > size for n in shape):  # rows without bytes are there in any number
            raise MessageError(f"download: array {name!r} has the shape {shape} in {size} bytes")
        if layout is None:
            continue
        dtype, row = layout.get(name, (torch.bool, (0,)))
        fits = array.dtype == dtype and len(shape) == len(row)
        if not (fits and all(want in (-1, got) for got, want in zip(shape, row, strict=True))):
            expected = f"{dtype} {row}" if name in layout else f"one of {', '.join(layout)}"
            raise MessageError(f"download: array {name!r} is {array.dtype} {shape}, expected {expected}")
