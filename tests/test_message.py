"""fedmpi.message: bytes, frames, selection, and what an untrusted buffer may do."""

from __future__ import annotations

import math
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpi.errors import MessageError
from fedmpi.message import (
    Field,
    Layout,
    Message,
    concat,
    equal,
    from_bytes,
    from_rows,
    row_nbytes,
    to_bytes,
    to_rows,
)

DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES += [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WIDTH = dict(zip(DTYPES, [1, 1, 2, 4, 8, 2, 2, 4, 8], strict=True))

quick = settings(deadline=None, max_examples=80)


def random_array(rng: np.random.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Any bits: NaNs with payloads, infinities, subnormals."""
    raw = bytearray(rng.bytes(math.prod(shape) * WIDTH[dtype]))
    return torch.frombuffer(raw, dtype=dtype).view(shape) if raw else torch.empty(shape, dtype=dtype)


def fill(layout: Layout, clients: int, seed: int) -> Message:
    """A message of a layout with random bits and random row counts."""
    rng = np.random.default_rng(seed)
    arrays, lengths = {}, {}
    for name, field in layout.items():
        rows = clients
        if field.ragged:
            lengths[name] = torch.tensor(rng.integers(0, 4, clients).tolist(), dtype=torch.int64)
            rows = int(lengths[name].sum())
        arrays[name] = random_array(rng, field.dtype, (rows, *field.row))
    return Message(arrays, lengths)


rows_of = st.lists(st.integers(0, 3), max_size=3).map(tuple)
fields = st.builds(Field, st.sampled_from(DTYPES), rows_of, st.booleans())
names = st.sampled_from(["", "a", "theta", "inner.inner.values", "Σ", "naïve ✓", "x" * 255])
layouts = st.dictionaries(names, fields, min_size=1, max_size=4)
counts = st.integers(0, 5)
bit_seeds = st.integers(0, 2**32 - 1)
messages = st.builds(fill, layouts, counts, bit_seeds)


@given(layouts, counts, bit_seeds)
@quick
def test_round_trip(layout, clients, seed):
    message = fill(layout, clients, seed)
    frame = to_bytes(message)
    assert equal(from_bytes(frame), message)
    assert equal(from_bytes(frame, layout, clients), message)
    assert list(from_bytes(frame).arrays) == list(message.arrays)
    assert to_bytes(from_bytes(frame)) == frame
    assert equal(from_bytes(bytearray(frame)), message)


def test_round_trip_of_nothing():
    assert equal(from_bytes(to_bytes(Message({})), {}, 0), Message({}))


def test_round_trip_of_views():
    """What is not contiguous or shares memory travels as its values."""
    base = torch.arange(24.0).view(4, 6)
    message = Message({"rows": base[::2], "columns": base.T[:2, 1:3], "same": base[:1].expand(2, 6)})
    back = from_bytes(to_bytes(message))
    assert all(torch.equal(back.arrays[name], array) for name, array in message.arrays.items())


@pytest.mark.parametrize(
    "view",
    [
        torch.arange(6.0)[::6],
        torch.arange(12.0).view(2, 6)[:1, ::6],
        torch.ones(3, 4).T[1:2, :1],
        torch.zeros(5, 2)[:0, 0],
        torch.zeros(4, 3)[:, 1:1],
    ],
)
def test_views_of_one_element_or_none(view):
    """torch calls these contiguous whatever their strides."""
    assert torch.equal(from_bytes(to_bytes(Message({"a": view}))).arrays["a"], view)
    assert equal(Message({"a": view}), Message({"a": torch.tensor(view.tolist()).view(view.shape)}))


def test_a_parsed_message_owns_its_memory():
    frame = bytearray(to_bytes(Message({"a": torch.ones(2, 3)})))
    message = from_bytes(frame)
    frame[-4:] = b"\xff" * 4
    message.arrays["a"][0, 0] = 7
    assert message.arrays["a"].tolist() == [[7, 1, 1], [1, 1, 1]]


def test_frame_golden():
    """The frame's layout is part of the protocol: little-endian, the same on every machine."""
    arrays = {"s": torch.tensor([1, 0], dtype=torch.uint8), "v": torch.tensor([[1.0, -2.0]])}
    frame = to_bytes(Message(arrays, {"v": torch.tensor([0, 1])}))
    expected = b"fMSG" + bytes.fromhex("02000000 0200")
    expected += b"\x01s" + bytes.fromhex("00 00 00") + b"\x01\x00"
    expected += b"\x01v" + bytes.fromhex("07 01 01 0200000000000000 00000000 01000000 0000803f 000000c0")
    assert frame == expected


@given(layouts, counts, bit_seeds)
@quick
def test_nbytes_is_what_each_client_sends(layout, clients, seed):
    message = fill(layout, clients, seed)
    expected = []
    for client in range(clients):
        total = 0
        for name, field in layout.items():
            rows = int(message.lengths[name][client]) if field.ragged else 1
            total += rows * math.prod(field.row) * WIDTH[field.dtype]
        expected.append(total)
    nbytes = message.nbytes()
    assert nbytes.tolist() == expected
    assert nbytes.dtype == torch.int64
    assert sum(expected) == sum(a.numel() * a.element_size() for a in message.arrays.values())
    assert message.clients == clients


@given(layouts, counts, counts, bit_seeds)
@quick
def test_select_of_concat(layout, left, right, seed):
    a, b = fill(layout, left, seed), fill(layout, right, seed + 1)
    both = concat([a, b])
    assert both.clients == left + right
    assert both.nbytes().tolist() == [*a.nbytes().tolist(), *b.nbytes().tolist()]
    assert equal(both.select(torch.arange(left)), a)
    assert equal(both.select(torch.arange(left, left + right)), b)


@given(layouts, counts, bit_seeds, st.data())
@quick
def test_concat_of_selects(layout, clients, seed, data):
    message = fill(layout, clients, seed)
    assert equal(concat([message]), message)
    assert equal(message.select(torch.arange(clients)), message)
    empty = message.select(torch.arange(0))
    assert empty.clients == 0
    assert equal(concat([empty, message, empty]), message)
    if clients:
        assert equal(concat([message.select(torch.tensor([i])) for i in range(clients)]), message)
    chosen = torch.tensor(sorted(data.draw(st.sets(st.integers(0, max(clients - 1, 0))))), dtype=torch.int64)
    chosen = chosen[chosen < clients]
    part = message.select(chosen)
    assert part.nbytes().tolist() == message.nbytes()[chosen].tolist()
    if len(chosen):
        assert equal(part, concat([message.select(torch.tensor([i])) for i in chosen.tolist()]))
        again = torch.arange(0, len(chosen), 2)
        assert equal(part.select(again), message.select(chosen[again]))


@given(messages, st.data())
@quick
def test_equal_sees_every_bit(message, data):
    assert equal(message, from_bytes(to_bytes(message)))
    name = data.draw(st.sampled_from(list(message.arrays)))
    array = message.arrays[name]
    if array.numel():
        raw = array.clone().view(-1).view(torch.uint8)
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        other = {**message.arrays, name: raw.view(array.dtype).view(array.shape)}
        assert not equal(message, message._replace(arrays=other))
    assert not equal(message, message._replace(arrays={**message.arrays, "other": torch.zeros(1)}))


# --- hostile buffers --------------------------------------------------------------------------------

HOSTILE_LAYOUT = {
    "tag": Field(torch.uint8),
    "half": Field(torch.bfloat16, (2,)),
    "ρ": Field(torch.float32, (), ragged=True),
    "rows": Field(torch.int64, (1, 2), ragged=True),
    "none": Field(torch.float64, (0, 3)),
}


def hostile_frames() -> dict[str, bytes]:
    made = {f"{clients} clients": to_bytes(fill(HOSTILE_LAYOUT, clients, 1)) for clients in (0, 1, 3)}
    return made | {"no array": to_bytes(Message({}))}


FRAMES = hostile_frames()
frames = pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)


def parse_or_refuse(
    buffer: bytes, layout: Layout | None = None, clients: int | None = None
) -> Message | None:
    """The message or None; anything but a MessageError escapes."""
    try:
        return from_bytes(buffer, layout, clients)
    except MessageError:
        return None


@frames
def test_every_truncation_is_refused(frame):
    for length in range(len(frame)):
        with pytest.raises(MessageError, match=r"truncated|starts with"):
            from_bytes(frame[:length])


@frames
def test_every_trailing_byte_is_refused(frame):
    for tail in [bytes([b]) for b in range(256)] + [frame, bytes(100)]:
        with pytest.raises(MessageError, match=rf"{len(tail)} bytes follow its end \(oversized\)"):
            from_bytes(frame + tail)


@frames
def test_every_mutated_byte_parses_or_is_refused(frame):
    """What parses is a message that would be sent as these very bytes."""
    outcomes = set()
    for place in range(len(frame)):
        for flip in [1 << bit for bit in range(8)] + [0xFF, 0x7F]:
            mutated = bytearray(frame)
            mutated[place] ^= flip
            message = parse_or_refuse(mutated)
            outcomes.add(message is not None)
            if message is not None and message.arrays:
                assert to_bytes(message) == mutated
    assert False in outcomes


@given(st.sampled_from([0, 1, 3]), st.data())
@settings(deadline=None, max_examples=300)
def test_mutations_under_a_layout_keep_the_layout(clients, data):
    frame = bytearray(FRAMES[f"{clients} clients"])
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    message = parse_or_refuse(frame, HOSTILE_LAYOUT, clients)
    if message is not None:
        assert message.clients == clients
        for name, field in HOSTILE_LAYOUT.items():
            array = message.arrays[name]
            assert (array.dtype, tuple(array.shape[1:])) == (field.dtype, field.row)
            assert (name in message.lengths) == field.ragged
            assert len(array) == (int(message.lengths[name].sum()) if field.ragged else clients)


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=300)
def test_foreign_bytes_are_refused(data):
    if data[:4] != b"fMSG":
        with pytest.raises(MessageError):
            from_bytes(data)
    parse_or_refuse(b"fMSG" + data)
    parse_or_refuse(b"fMSG" + struct.pack("<IH", 2, 1) + data)
    parse_or_refuse(b"fMSG" + struct.pack("<IH", 0, 1) + b"\x01a" + data)


def header(count: int, row: tuple[int, ...], *, ragged: int = 0, code: int = 7, tail: bytes = b"") -> bytes:
    """A frame of one array "a"."""
    description = struct.pack("<BBB", code, ragged, len(row)) + struct.pack(f"<{len(row)}Q", *row)
    return b"fMSG" + struct.pack("<IH", count, 1) + b"\x01a" + description + tail


HUGE = 2**32 - 1
ROW_COUNTS = struct.pack("<4i", *[2**31 - 1] * 4)


@pytest.mark.parametrize(
    "frame",
    [
        header(1, (2**60,)),
        header(1, (2**64 - 1,) * 8),
        header(1, (2**31, 2**31)),
        header(HUGE, ()),
        header(HUGE, (2**60,)),
        header(HUGE, (), ragged=1),
        header(4, (), ragged=1, tail=ROW_COUNTS),
        header(4, (2**60,), ragged=1, tail=ROW_COUNTS),
        header(4, (), ragged=1, tail=struct.pack("<4i", 1, -1, 0, 0)),
        b"fMSG" + struct.pack("<IH", HUGE, 2**16 - 1),
    ],
)
def test_a_false_header_is_refused_without_allocating(frame):
    tracemalloc.start()
    try:
        with pytest.raises(MessageError):
            from_bytes(frame)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("count", "row"),
    [(0, (2**63,)), (0, (2**64 - 1,)), (0, (2**62, 2**62)), (1, (0, 2**63)), (1, (2**62, 2**62, 0))],
)
@pytest.mark.parametrize("ragged", [0, 1])
def test_a_shape_beyond_64_bits_of_no_elements_is_refused(count, row, ragged):
    with pytest.raises(MessageError):
        from_bytes(header(count, row, ragged=ragged, tail=bytes(4 * count * ragged)))


@pytest.mark.parametrize(
    ("frame", "match"),
    [
        (b"", "truncated"),
        (b"GIF89a" + bytes(40), "starts with b'GIF8'"),
        (header(1, (), code=9, tail=bytes(8)), "not one that fedmpi writes"),
        (header(1, (), ragged=2, tail=bytes(8)), "not one that fedmpi writes"),
        (header(1, (1,) * 9, tail=bytes(4)), "not one that fedmpi writes"),
        (header(1, (), ragged=1, tail=struct.pack("<i", -1)), "negative row count"),
        (b"fMSG" + struct.pack("<IH", 1, 1) + b"\x01\xff" + bytes(9), "not UTF-8"),
        (b"fMSG" + struct.pack("<IH", 0, 2) + b"\x01a\x07\x00\x00" * 2, "not one that fedmpi writes"),
    ],
)
def test_what_is_wrong_is_said(frame, match):
    with pytest.raises(MessageError, match=match):
        from_bytes(frame)


EXPECTED = {"a": Field(torch.float32, (3,)), "b": Field(torch.uint8, (), ragged=True)}


@pytest.mark.parametrize(
    ("sent", "match"),
    [
        ({**EXPECTED, "a": Field(torch.float64, (3,))}, "array 'a' is .*float64"),
        ({**EXPECTED, "a": Field(torch.float32, (4,))}, r"array 'a' is .*\(4,\)"),
        ({**EXPECTED, "a": Field(torch.float32, (3, 1))}, "array 'a' is"),
        ({**EXPECTED, "a": Field(torch.float32, (3,), ragged=True)}, "array 'a' is .*ragged=True"),
        ({**EXPECTED, "b": Field(torch.uint8)}, "array 'b' is .*ragged=False"),
        ({**EXPECTED, "c": Field(torch.uint8)}, "array 'c' is .* no such array"),
        ({"a": EXPECTED["a"]}, r"lacks \['b'\]"),
        ({}, r"lacks \['a', 'b'\]"),
    ],
)
def test_another_layout_is_refused(sent, match):
    with pytest.raises(MessageError, match=match):
        from_bytes(to_bytes(fill(sent, 2, 0)), EXPECTED)


@pytest.mark.parametrize("clients", [0, 1, 3])
def test_another_number_of_clients_is_refused(clients):
    frame = to_bytes(fill(EXPECTED, 2, 0))
    with pytest.raises(MessageError, match=f"holds 2 clients, expected {clients}"):
        from_bytes(frame, EXPECTED, clients)


@given(
    st.dictionaries(names, fields.map(lambda field: field._replace(ragged=False)), min_size=1, max_size=3),
    counts,
    bit_seeds,
)
@quick
def test_rows_are_the_arrays_bytes_alone(layout, clients, seed):
    message = fill(layout, clients, seed)
    rows = to_rows(message)
    assert rows.shape == (clients, row_nbytes(layout))
    assert equal(from_rows(rows, layout), message)
    longer = torch.cat([rows, torch.zeros(clients, 1, dtype=torch.uint8)], 1)
    with pytest.raises(
        MessageError, match=f"rows of {row_nbytes(layout) + 1} bytes, expected {row_nbytes(layout)}"
    ):
        from_rows(longer, layout)
    assert row_nbytes(layout | {"ragged": Field(torch.uint8, (), ragged=True)}) is None
