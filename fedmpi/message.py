"""What clients send: named arrays whose bytes are the bytes that travel.

A :class:`Message` holds the messages of C clients at once. An array has one row a client, or, when
``lengths`` names it, a number of rows that differs from client to client (look-back: one coefficient
*or* one inner message). Bytes are counted on the arrays, never by a formula; the frame that
:func:`to_bytes` puts around them (names, dtypes, row counts: known to both ends of a run) is counted
where it really travels, in the wire bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from fedmpi.errors import MessageError

CPU = torch.device("cpu")
_MAGIC = b"fMSG"
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_DTYPES = (*_INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CODE = {dtype: code for code, dtype in enumerate(_DTYPES)}
_MAX_NDIM = 8

POSITIONS = ("index", "map")
"""Names (after any prefix) of arrays that only say where values belong."""


def is_position(name: str) -> bool:
    """Whether the array ``name`` only says where values belong."""
    return name.rpartition(".")[2] in POSITIONS


class Field(NamedTuple):
    """What a receiver expects of one array: its dtype, the shape of one row, and whether rows are ragged."""

    dtype: torch.dtype
    row: tuple[int, ...] = ()
    ragged: bool = False


Layout = dict[str, Field]


class Message(NamedTuple):
    """The messages of C clients.

    Attributes:
      arrays: name → ``(C, *row)``, or ``(sum of lengths, *row)`` for a ragged one.
      lengths: name → int64 ``(C,)`` on the CPU, wherever the arrays lie: the rows each client has of a
        ragged array. The receiver knows them from another array (a tag, a count), which is one of ``arrays``
        and so is counted.
      finite: of a compressor that :attr:`~fedmpi.method.Compressor.tells`, as it is made: no gradient that it was
        made of has an infinity or NaN. It does not travel. Where the gradients lie on a device it may be a bool
        tensor there, so that nobody waits for it before he must.
    """

    arrays: dict[str, Tensor]
    lengths: Mapping[str, Tensor] = {}
    finite: bool | Tensor | None = None

    @property
    def clients(self) -> int:
        """C."""
        for name, array in self.arrays.items():
            return len(self.lengths[name]) if name in self.lengths else len(array)
        return 0

    def nbytes(self) -> Tensor:
        """Bytes that each client sends, int64 ``(C,)``, measured on the arrays."""
        total_C = torch.zeros(self.clients, dtype=torch.int64, device="cpu")
        for name, array in self.arrays.items():
            row = array[:1].nbytes if len(array) else 0
            total_C += self.lengths[name] * row if name in self.lengths else row
        return total_C

    def total_nbytes(self, positions: bool = True) -> int:
        """The sum of :meth:`nbytes` over all clients.

        Args:
          positions: count arrays that say where values belong (``index``, ``map``), too. The
            papers' tables leave them out.
        """
        kept = (a for n, a in self.arrays.items() if positions or not is_position(n))
        return sum(array.nbytes for array in kept)

    def select(self, index: Tensor) -> Message:
        """The messages of the clients ``index`` (int64, increasing), in that order; itself where these are all."""
        if len(index) == self.clients:
            return self
        arrays, lengths = {}, {}
        keep_C = torch.zeros(self.clients, dtype=torch.bool, device="cpu")
        keep_C[index] = True
        for name, array in self.arrays.items():
            if name in self.lengths:
                kept = keep_C.repeat_interleave(self.lengths[name]).nonzero()[:, 0]
                arrays[name] = array.index_select(0, kept.to(array.device))
                lengths[name] = self.lengths[name][index]
            else:
                arrays[name] = array.index_select(0, index.to(array.device))
        return Message(arrays, lengths)

    def to(self, device: torch.device) -> Message:
        """The same with its arrays there; itself where they are. How many rows are whose stays on the host."""
        if all(array.device == device for array in self.arrays.values()):
            return self
        return self._replace(arrays={name: array.to(device) for name, array in self.arrays.items()})


def concat(messages: Sequence[Message]) -> Message:
    """One message of all clients of ``messages`` (at least one), in their order."""
    first = messages[0]
    return Message(
        {name: torch.cat([m.arrays[name] for m in messages]) for name in first.arrays},
        {name: torch.cat([m.lengths[name] for m in messages]) for name in first.lengths},
    )


def equal(a: Message, b: Message) -> bool:
    """True when both hold the same arrays, to the bit."""

    def same(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> bool:
        return x.keys() == y.keys() and all(
            x[n].dtype == y[n].dtype and x[n].shape == y[n].shape and _raw(x[n]) == _raw(y[n]) for n in x
        )

    return same(a.arrays, b.arrays) and same(a.lengths, b.lengths)


def _raw(array: Tensor) -> bytes:
    flat = array.detach().cpu().reshape(-1)
    # Not contiguous(): it keeps the odd strides that a view of at most one element may have.
    return (
        torch.empty(len(flat), dtype=flat.dtype, device="cpu").copy_(flat).view(torch.uint8).numpy().tobytes()
    )


def _raws(arrays: Sequence[Tensor]) -> list[bytes]:
    """What they hold, byte by byte: of those on a device in one copy."""
    if len(arrays) < 2 or len({array.device for array in arrays}) > 1 or arrays[0].device.type == "cpu":
        return [_raw(array) for array in arrays]
    flat = [array.detach().reshape(-1) for array in arrays]
    bytes_N = _raw(
        torch.cat([x.clone(memory_format=torch.contiguous_format).view(torch.uint8) for x in flat])
    )
    ends = list(accumulate(array.nbytes for array in arrays))
    return [bytes_N[end - array.nbytes : end] for end, array in zip(ends, arrays, strict=True)]


def to_bytes(message: Message, usable: bool | Tensor = True) -> bytes:
    """The message as one self-describing frame (little-endian), of arrays on any device.

    Args:
      usable: whether it is (0-d bool): if not the frame is empty. A device is asked for this and its arrays at once.
    """
    arrays = list(message.arrays.values())
    *raws, said = _raws([*arrays, usable.reshape(1)]) if isinstance(usable, Tensor) else [*_raws(arrays), b""]
    if usable is False or said == b"\0":
        return b""
    parts = [_MAGIC, struct.pack("<IH", message.clients, len(message.arrays))]
    for (name, array), raw in zip(message.arrays.items(), raws, strict=True):
        encoded, ragged, row = name.encode(), name in message.lengths, array.shape[1:]
        parts.append(struct.pack("<B", len(encoded)) + encoded)
        parts.append(struct.pack("<BBB", _CODE[array.dtype], ragged, len(row)))
        parts.append(struct.pack(f"<{len(row)}Q", *row))
        if ragged:
            parts.append(_raw(message.lengths[name].to(torch.int32)))
        parts.append(raw)
    return b"".join(parts)


def row_nbytes(layout: Layout) -> int | None:
    """Bytes of one client's message where every one has the same size; None with a ragged array."""
    if any(field.ragged for field in layout.values()):
        return None
    return sum(math.prod(field.row) * field.dtype.itemsize for field in layout.values())


def to_rows(message: Message) -> Tensor:
    """Messages without ragged arrays as bytes alone, uint8 ``(C, row_nbytes)``: both ends know the layout."""
    arrays = [
        a.reshape(len(a), math.prod(a.shape[1:])).contiguous().view(torch.uint8)
        for a in message.arrays.values()
    ]
    return arrays[0] if len(arrays) == 1 else torch.cat(arrays, 1)


def from_rows(rows_CB: Tensor, layout: Layout) -> Message:
    """The inverse of :func:`to_rows`, whose arrays stand in the layout's order.

    Raises:
      MessageError: rows of another length.
    """
    if rows_CB.shape[1] != row_nbytes(layout):
        raise MessageError(f"message: rows of {rows_CB.shape[1]} bytes, expected {row_nbytes(layout)}")
    arrays, at = {}, 0
    for name, field in layout.items():
        size = math.prod(field.row) * field.dtype.itemsize
        # A copy where it is a part of the row: a view of wider numbers needs aligned bytes.
        part_CB = rows_CB[:, at : at + size].clone(memory_format=torch.contiguous_format)
        arrays[name] = part_CB.flatten().view(field.dtype).view(len(rows_CB), *field.row)
        at += size
    return Message(arrays)


class _Reader:
    """Takes bytes from a buffer and never past its end."""

    def __init__(self, buffer: bytes) -> None:
        self.buffer, self.at = memoryview(buffer), 0

    def take(self, n: int, what: str) -> memoryview:
        left = len(self.buffer) - self.at
        if n > left:
            raise MessageError(f"message: {what} needs {n} bytes, {left} are left (truncated or foreign)")
        self.at += n
        return self.buffer[self.at - n : self.at]

    def unpack(self, form: str, what: str) -> tuple[int, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form), what))

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], what: str) -> Tensor:
        if math.prod(max(1, n) for n in shape) * dtype.itemsize >= 1 << 63:
            raise MessageError(f"message: {what} has the shape {shape}, which no tensor can have")
        # Python integers cannot overflow, and nothing is allocated before the bytes are known to be there.
        raw = self.take(math.prod(shape) * dtype.itemsize, what)
        if not raw:
            return torch.empty(shape, dtype=dtype, device="cpu")
        return torch.frombuffer(bytearray(raw), dtype=dtype).view(shape)


def from_bytes(
    buffer: bytes,
    layout: Layout | None = None,
    clients: int | None = None,
    device: torch.device | None = None,
) -> Message:
    """The message that :func:`to_bytes` made.

    Args:
      buffer: the frame, from an untrusted sender.
      layout: what the method's compressor sends; anything else is refused.
      clients: how many clients' messages are expected.
      device: where its arrays are to lie; default: the CPU, where they are checked.

    Raises:
      MessageError: a truncated, oversized or foreign buffer; nothing larger than it is allocated.
    """
    reader = _Reader(buffer)
    if bytes(reader.take(4, "the magic number")) != _MAGIC:
        raise MessageError(f"message: it starts with {bytes(buffer[:4])!r}, expected {_MAGIC!r}")
    count, fields = reader.unpack("<IH", "the header")
    if clients is not None and count != clients:
        raise MessageError(f"message: holds {count} clients, expected {clients}")
    arrays: dict[str, Tensor] = {}
    lengths: dict[str, Tensor] = {}
    for _ in range(fields):
        (n,) = reader.unpack("<B", "a name's length")
        try:
            name = str(reader.take(n, "a name"), "utf-8")
        except UnicodeDecodeError:
            raise MessageError("message: an array's name is not UTF-8") from None
        code, ragged, ndim = reader.unpack("<BBB", f"the description of {name!r}")
        if code >= len(_DTYPES) or ragged > 1 or ndim > _MAX_NDIM or name in arrays:
            raise MessageError(f"message: the description of {name!r} is not one that fedmpi writes")
        row = reader.unpack(f"<{ndim}Q", f"the shape of {name!r}")
        got = Field(_DTYPES[code], row, bool(ragged))
        if layout is not None and layout.get(name) != got:
            raise MessageError(
                f"message: array {name!r} is {got}, expected {layout.get(name, 'no such array')}"
            )
        rows = count
        if ragged:
            lengths[name] = reader.tensor(torch.int32, (count,), f"the row counts of {name!r}").long()
            if count and int(lengths[name].min()) < 0:
                raise MessageError(f"message: {name!r} has a negative row count")
            rows = int(lengths[name].sum())
            if rows > len(
                buffer
            ):  # rows without bytes are there in any number, but their owners would be listed
                raise MessageError(f"message: {name!r} has {rows} rows in {len(buffer)} bytes")
        arrays[name] = reader.tensor(got.dtype, (rows, *row), f"array {name!r}")
    if layout is not None and arrays.keys() != layout.keys():
        raise MessageError(f"message: it lacks {sorted(layout.keys() - arrays.keys())}")
    if reader.at != len(buffer):
        raise MessageError(f"message: {len(buffer) - reader.at} bytes follow its end (oversized)")
    message = Message(arrays, lengths)
    return message if device is None else message.to(device)
