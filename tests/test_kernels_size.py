"""What long vectors are quantised, rounded, stepped and counted with, against its references: equal to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedmpi import random
from fedmpi.methods.base import pack_changes, remember, shape_of_changes
from fedmpi.methods.blocks import Blocks
from fedmpi.ops import bits, halves, pages, quantize, select, sketch, steps

from .kernels import by_kernel, by_torch, keys, normals, quick, same

pytest.importorskip("numba")

sizes = st.one_of(st.integers(1, 300), st.sampled_from([1023, 1024, 1025, 4095, 4097, 9000]))
threads = st.integers(1, 3)


def sparse(key: int, *shape: int) -> Tensor:
    """Normals with stretches of zeros, and strides."""
    x = normals(key, *shape[:-1], 2 * shape[-1])[..., ::2]
    return x * (torch.arange(shape[-1]) % 37 > 9)


# --- levels in bit planes, codes in records -----------------------------------------------------------


@given(sizes, st.sampled_from([1, 7, 64, 512, 1024, 3000, 1 << 20]), st.integers(2, 8), threads, keys)
@quick
def test_planes(size: int, bucket: int, width: int, threads: int, key: int) -> None:
    g, ks, bucket = sparse(key, 2, size), torch.tensor([key, 3]), min(bucket, size)
    squares = quantize.bucket_squares_reference(g, bucket)
    assert same(by_kernel(quantize.bucket_squares, g, bucket, threads=threads), squares)
    assert squares.sum(1).tolist() == pytest.approx((g.double() ** 2).sum(1).tolist())
    largest = quantize.bucket_largest_reference(g, bucket)
    assert same(by_kernel(quantize.bucket_largest, g, bucket, threads=threads), largest)
    for norms in (squares.sqrt().float(), largest):
        planes = quantize.to_planes_reference(g, norms, bucket, width, ks)
        assert same(by_kernel(quantize.to_planes, g, norms, bucket, width, ks, threads=threads), planes)
        v = quantize.from_planes_reference(planes, norms, bucket, size)
        assert same(by_kernel(quantize.from_planes, planes, norms, bucket, size, threads=threads), v)


@given(
    sizes,
    st.sampled_from([2, 38, 64, 256]),
    st.sampled_from([(8, False), (4, False), (4, True)]),
    st.booleans(),
    threads,
    keys,
)
@quick
def test_records(size: int, block: int, kind: tuple[int, bool], draws: bool, threads: int, key: int) -> None:
    x, blocks, start = sparse(key, 2, size), Blocks(kind[0], block, kind[1]), 7 * block
    x[1, ::5], x[1, ::3], x[1, 1::11] = math.nan, math.inf, -math.inf
    ks = torch.tensor([key, 3]) if draws else None
    records = by_torch(blocks.encode, x, ks, start)
    assert same(by_kernel(blocks.encode, x, ks, start, threads=threads), records)
    v = by_torch(blocks.decode, records, size)
    assert v.isfinite().all()
    assert same(by_kernel(blocks.decode, records, size, threads=threads), v)


@pytest.mark.parametrize("how", [by_kernel, by_torch])
def test_records_that_nobody_wrote(how: object) -> None:
    levels = Blocks(4, 4, False)._levels(torch.device("cpu"))
    good = quantize.to_records_reference(torch.ones(1, 8), 4, 4, levels, True, None)
    for at, byte in ((3, 0x7F), (3, 0xBF), (4, 0xF0), (11, 0x0F)):  # infinite, negative, and codes of 15
        bad = good.clone().view(-1)
        bad[at] = byte
        bad[at - 1] = 0x80 if byte == 0x7F else bad[at - 1]
        assert how(quantize.from_records, bad.view(good.shape), 4, levels, 8)[1] is False  # type: ignore[operator]


# --- halves -------------------------------------------------------------------------------------------


@given(sizes, st.sampled_from([torch.bfloat16, torch.float16]), st.booleans(), keys)
@quick
def test_halves(size: int, dtype: torch.dtype, odd: bool, key: int) -> None:
    x = normals(key, 2, size) * 10.0 ** normals(key + 1, 2, size).mul(12).clamp(-44, 38)
    x[0, 0] = math.inf if odd else -3.4e38
    flags = torch.zeros(2, 1, dtype=torch.uint8)
    half = halves.narrow(x, dtype, flags[0])
    assert same(half.view(torch.int16), halves.narrow_reference(x, dtype, flags[1]).view(torch.int16))
    assert flags.flatten().tolist() == [odd, odd]
    assert half.isfinite().all()
    wide, good = halves.widen(half)
    assert good
    assert same(wide, half.float())
    total = normals(key + 2, size)
    expected = total.clone().add_(wide[0], alpha=0.3)
    assert halves.add(total, half[0], 0.3)
    assert same(total, expected)


@pytest.mark.parametrize("size", [1, 1 << 18])
def test_halves_that_are_not_finite(size: int) -> None:
    half = torch.ones(1, size, dtype=torch.bfloat16)
    half[0, -1] = math.nan
    assert not halves.widen(half)[1]
    assert not halves.add(torch.zeros(size), half[0], 1.0)


# --- servers' steps, and downloads that are only counted ------------------------------------------------


@given(sizes, threads, keys)
@quick
def test_steps(size: int, threads: int, key: int) -> None:
    theta, u = normals(key, size), sparse(key + 1, size)
    changed, version = normals(key + 2, size).mul(3).abs().int(), torch.tensor(9)
    theta[-1] = math.nan
    after = theta.add(u, alpha=-0.1)
    marked = steps.mark_reference(theta, after, changed, version)
    got = by_kernel(steps.step_and_mark, theta, u, -0.1, changed, version, threads=threads)
    assert same(got[0], after)
    assert same(got[1], marked)
    assert same(by_kernel(steps.mark, theta, after, changed, version, threads=threads), marked)
    versions = [0, 2, 3, 8, 9, 30]
    counts = steps.changed_since_reference(marked, versions)
    assert by_kernel(steps.changed_since, marked, versions) == counts
    assert by_torch(steps.changed_since, marked, versions) == counts


@given(st.integers(1, 400), st.floats(0, 1), keys)
@quick
def test_shapes_of_changes(size: int, share: float, key: int) -> None:
    changed = torch.arange(size) < round(share * size)
    arrays = pack_changes(normals(key, size), changed)
    shapes = shape_of_changes(int(changed.sum()), size)
    assert list(arrays) == list(shapes)
    assert [(a.shape, a.dtype) for a in arrays.values()] == [(a.shape, a.dtype) for a in shapes.values()]


# --- sketches -------------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.integers(1, 5), st.integers(1, 90), keys)
@quick
def test_places_of_a_few_coordinates(size: int, rows: int, columns: int, key: int) -> None:
    count_sketch, index = sketch.CountSketch(size, rows, columns, key), torch.randperm(size)[:40]
    everywhere = sketch._draw(size, rows, columns, count_sketch.key, torch.device("cpu"))
    assert torch.equal(count_sketch._places_at(index), everywhere[:, index].long())


def test_memory_in_huge_pages_is_memory() -> None:
    x = pages.zeros(3 << 20)
    assert x.shape == (3 << 20,)
    assert not x.any()
    assert pages.empty_like(x[::3]).shape == (1 << 20,)
    assert pages.empty(0).shape == (0,)


# --- Prune's mask, votes, histories ---------------------------------------------------------------------


@given(st.integers(1, 3000), st.sampled_from(["different", "rounded", "zeros"]), st.floats(0, 1), keys)
@quick
def test_the_largest_with_ties_by_a_key(size: int, kind: str, share: float, key: int) -> None:
    x, k = normals(key, size), max(1, round(share * size))
    if kind != "different":
        x = (2 * x).round() if kind == "rounded" else x * (torch.arange(size) % 19 == 0)
    expected = select.top_by_key_reference(x, k, key)
    assert torch.equal(by_kernel(select.top_by_key, x, k, key), expected)
    assert torch.equal(by_torch(select.top_by_key, x, k, key), expected)


@pytest.mark.parametrize("share", [0.001, 0.5])
def test_the_largest_of_a_long_vector_with_ties_by_a_key(share: float) -> None:
    """Where a permutation is a bijection that nobody sorts."""
    x = torch.where(torch.arange(100_003) % 3 == 0, 1.0, normals(5, 100_003).abs().clamp(max=0.99))
    for k in (5, 33_000, 40_000):
        few = torch.where(torch.rand(100_003, generator=torch.Generator().manual_seed(1)) < share, x, 0.5 * x)
        expected = select.top_by_key_reference(few, k, 11)
        assert torch.equal(by_kernel(select.top_by_key, few, k, 11), expected)


@pytest.mark.parametrize("size", [1, 700, 1 << 16, 100_003])
def test_ranks_are_the_inverse_of_a_permutation(size: int) -> None:
    order = random.permutation(17, size)
    places = torch.arange(size)[:: max(1, size // 300)]
    assert torch.equal(random.ranks(17, size, order[places]), places)


@given(sizes, st.sampled_from([torch.int8, torch.int16, torch.int32, torch.float32]), threads, keys)
@quick
def test_votes(size: int, dtype: torch.dtype, threads: int, key: int) -> None:
    votes = normals(key, size).mul(2).round().to(dtype)
    expected = bits.pack_votes_reference(votes, key)
    assert torch.equal(by_kernel(bits.pack_votes, votes, key, threads=threads), expected)


@pytest.mark.parametrize("keep", [0, 1, 2, 9])
def test_a_history_grows_in_place_and_none_changes(keep: int) -> None:
    """Also where two go on from the same one: a round that is repeated after a rewind."""
    now, expected = torch.zeros(0, 3), torch.zeros(0, 3)
    before: list[tuple[Tensor, Tensor]] = []
    for t in range(50):
        for row in (torch.full((3,), -1.0 - t), torch.full((3,), float(t))):
            rows = torch.cat([expected, row[None]])
            after, rows = remember(now, row, keep), rows[max(0, len(rows) - keep) :]
            assert torch.equal(after, rows)
            before.append((after, rows))
        now, expected = after, rows
        assert all(torch.equal(old, was) for old, was in before)


def test_most_rounds_write_one_row_of_a_history() -> None:
    now = remember(torch.zeros(0, 3), torch.ones(3), 64)
    memory = [now.untyped_storage().data_ptr()]
    for _ in range(70):
        now = remember(now, torch.ones(3), 64)
        memory.append(now.untyped_storage().data_ptr())
    assert len(set(memory)) == 1


@given(sizes, keys)
@quick
def test_steps_at_a_few_places(size: int, key: int) -> None:
    theta, changed, version = normals(key, size), normals(key + 2, size).abs().int(), torch.tensor(9)
    index = random.permutation(key, size)[: -(-size // 3)].sort().values
    u = sparse(key + 1, len(index))
    after = steps.add_at(theta, index, u, -0.3)
    assert same(after, theta.index_add(0, index, u, alpha=-0.3))
    marked = steps.mark_reference(theta, after, changed, version)
    assert same(steps.mark_at(theta, after, changed, version, index), marked)
