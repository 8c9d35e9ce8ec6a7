"""Compiled kernels against their torch references: equal to the bit, over odd sizes, strides, types, threads. With
--full Triton's as well, in its interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmpi import random
from fedmpi.ops import bits, hadamard, select, sketch, subspace, sums

from .kernels import by_kernel, by_torch, keys, normals, quick, same, served_by, smallest

pytest.importorskip("numba")


@pytest.fixture(
    scope="module", autouse=True, params=["compiled", pytest.param("triton", marks=pytest.mark.slow)]
)
def package(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton":
        pytest.importorskip("triton", reason="no Triton here: launch/test.sh --full installs it")
        if torch.cuda.is_available():
            pytest.skip("Triton has a GPU, and test_gpu.py looks at its kernels there")
    with served_by(request.param):
        yield request.param


# --- Walsh–Hadamard ---------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(0, 13), st.integers(1, 3), st.booleans(), keys)
@quick
def test_fwht(rows: int, log2: int, threads: int, strided: bool, key: int) -> None:
    x = normals(key, rows, 2 << log2)[:, ::2] if strided else normals(key, rows, 1 << log2)
    before = x.clone()
    assert same(by_kernel(hadamard.fwht, x, threads=threads), hadamard.fwht_reference(x))
    assert same(x, before)


@pytest.mark.parametrize(
    "shape", [(1 << 16,), (1 << 17,), (3, 1 << 18), (2, 1, 1 << 19), (1 << 20,), (1 << 9, 256)]
)
def test_fwht_of_large_vectors(shape: tuple[int, ...]) -> None:
    """Beyond a block: every number of stages in the last sweep."""
    x = normals(1, *shape)
    expected = hadamard.fwht_reference(x)
    assert same(by_kernel(hadamard.fwht, x, threads=2), expected)
    assert same(by_kernel(hadamard.fwht, x, x), expected), "in place"
    assert same(x, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_fwht_of_other_types(dtype: torch.dtype) -> None:
    x = normals(2, 2, 512).mul(100).to(dtype)
    got = by_kernel(hadamard.fwht, x)
    assert got.dtype == dtype
    assert torch.equal(got, hadamard.fwht_reference(x))


def test_fwht_into_a_strided_tensor() -> None:
    x, out = normals(3, 2, 1024), torch.zeros(2, 2048)
    expected = hadamard.fwht_reference(x)
    by_kernel(hadamard.fwht, x, out[:, ::2])
    assert same(out[:, ::2].contiguous(), expected)
    assert not out[:, 1::2].any()
    assert same(by_torch(hadamard.fwht, x, out[:, ::2]).contiguous(), expected)


def test_threads_that_play_ranks_may_be_in_kernels_at_once(package: str) -> None:
    from fedmpi.comm import run_ranks

    if package == "triton":
        pytest.skip("Triton's interpreter is one thread's at a time")
    x = normals(4, 4, 1 << 14)
    expected = hadamard.fwht_reference(x)
    with smallest(0, 2):
        results = run_ranks(4, lambda comm: [hadamard.fwht(x[comm.rank]) for _ in range(20)])
    assert all(same(y, expected[rank]) for rank, ys in enumerate(results) for y in ys)


# --- bits -------------------------------------------------------------------------------------------

rows_and_bits = st.tuples(st.integers(1, 4), st.integers(1, 400))


@given(rows_and_bits, st.integers(1, 3), st.booleans(), keys)
@quick
def test_pack_and_unpack(shape: tuple[int, int], threads: int, strided: bool, key: int) -> None:
    x = normals(key, shape[0], 2 * shape[1]) > 0
    x = x[:, ::2] if strided else x[:, : shape[1]]
    packed = by_kernel(bits.pack, x, threads=threads)
    assert same(packed, bits.pack_reference(x))
    assert same(by_kernel(bits.unpack, packed, shape[1], threads=threads), x.contiguous())
    every_other = packed.repeat_interleave(2, 1)[:, ::2]
    assert same(by_kernel(bits.unpack, every_other, shape[1]), x.contiguous())


@given(rows_and_bits, st.integers(1, 3), st.booleans(), keys)
@quick
def test_signs(shape: tuple[int, int], threads: int, strided: bool, key: int) -> None:
    """Zeros of either sign, infinities and NaN among them."""
    g = normals(key, shape[0], 2 * shape[1]).round()
    g[:, ::7] *= float("inf")  # NaN where it was 0
    g = g[:, ::2] if strided else g[:, : shape[1]]
    keys_C = random.keys(key, 0, torch.arange(shape[0]), "coins")
    packed = by_kernel(bits.pack_signs, g, keys_C, threads=threads)
    assert same(packed, bits.pack_signs_reference(g, keys_C))
    for scale_C in (None, normals(key, shape[0])):
        signs = by_kernel(bits.unpack_signs, packed, shape[1], scale_C, threads=threads)
        assert same(signs, bits.unpack_signs_reference(packed, shape[1], scale_C))


def test_signs_of_zeros_are_the_keys_coins() -> None:
    keys_C = random.keys(5, 0, torch.arange(2), "coins")
    packed = by_kernel(bits.pack_signs, torch.tensor([0.0, -0.0]).repeat(2, 100), keys_C)
    assert torch.equal(bits.unpack_reference(packed, 200), random.coins(keys_C, 200))


@given(st.integers(1, 12), st.integers(1, 9000), st.integers(1, 3), keys)
@quick
def test_majority(voters: int, size: int, threads: int, key: int) -> None:
    rows = random.bits(random.key(key), (voters + 1) * size).view(torch.uint8)[: (voters + 1) * size]
    packed_WB, tie_B = rows.view(voters + 1, size).split([voters, 1])
    got = by_kernel(bits.majority, packed_WB, tie_B[0], threads=threads)
    assert same(got, bits.majority_reference(packed_WB, tie_B[0]))


@given(st.integers(1, 3), st.integers(1, 3000), st.integers(1, 62), st.integers(1, 3), keys)
@quick
def test_integers(rows: int, size: int, width: int, threads: int, key: int) -> None:
    values_CN = random.bits(random.keys(key, 0, torch.arange(rows), "x"), size) & ((1 << width) - 1)
    packed_CB = by_kernel(bits.pack_integers, values_CN, width, threads=threads)
    assert same(packed_CB, bits.pack_integers_reference(values_CN, width))
    assert same(by_kernel(bits.unpack_integers, packed_CB, size, width, threads=threads), values_CN)
    assert same(bits.unpack_integers_reference(packed_CB, size, width), values_CN)


@given(st.integers(1, 5), st.integers(1, 9000), st.integers(1, 3), st.integers(0, 70), keys)
@quick
def test_vote(voters: int, size: int, threads: int, word: int, key: int) -> None:
    rows = random.bits(random.key(key), voters * size).view(torch.uint8)[: voters * size]
    packed_WB = rows.view(voters, size)
    got = by_kernel(bits.vote, packed_WB, key, 64 * word, threads=threads)
    assert same(got, bits.vote_reference(packed_WB, key, 64 * word))
    coins_N = random.coins(key, 64 * word + 8 * size)[64 * word :]
    twice_N = 2 * bits.unpack_reference(packed_WB, 8 * size).sum(0)
    expected_N = (twice_N > voters) | ((twice_N == voters) & coins_N)
    assert torch.equal(bits.unpack_reference(got[None], 8 * size)[0], expected_N)


@given(
    st.integers(1, 5),
    st.lists(st.integers(0, 300), min_size=1, max_size=40),
    st.integers(1, 3),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.integers(0, 5),
    keys,
)
@quick
def test_vote_of_those_present_in_a_row(
    voters: int, lengths: list[int], threads: int, share: tuple[float, float], extra: int, key: int
) -> None:
    """Of all entries, and of the second of two owners, which begins at a word."""
    starts_R = torch.tensor([0, *lengths]).cumsum(0)
    size, count = int(starts_R[-1]), -(-int(starts_R[-1]) // 8) + extra
    drawn = random.uniform(random.keys(key, 0, torch.arange(voters), "there"), len(lengths))
    present_WR = drawn < torch.linspace(*share, voters)[:, None]
    rows = random.bits(random.key(key), voters * count).view(torch.uint8)[: voters * count]
    packed_WB = rows.view(voters, count)
    for start in {0, count // 16 * 64}:
        if start < 8 * count:
            there = packed_WB[:, start // 8 :], present_WR, starts_R, size, key, start
            got = by_kernel(bits.vote_of_present, *there, threads=threads)
            assert same(got, bits.vote_of_present_reference(*there))


@given(
    st.sampled_from([torch.int8, torch.int16, torch.int32, torch.float32]),
    st.integers(1, 3000),
    st.integers(1, 3),
    keys,
)
@quick
def test_what_votes_came_to(dtype: torch.dtype, size: int, threads: int, key: int) -> None:
    votes_N = normals(key, size).mul(2).round().to(dtype)
    got = by_kernel(bits.pack_votes, votes_N, key, threads=threads)
    assert same(got, bits.pack_votes_reference(votes_N, key))


@pytest.mark.parametrize("voters", [1, 2, 3, 4, 255, 256, 257])
def test_majority_at_its_edges(voters: int) -> None:
    """Every count of ones from none to all, against the definition; ties fall either way."""
    packed_WB = bits.pack_reference(
        torch.arange(voters)[:, None] < torch.arange(8 * 40)[None, :]
    )  # column n: n ones
    for tie in (0, 255):
        got = by_kernel(bits.majority, packed_WB, torch.full((40,), tie, dtype=torch.uint8))
        ones_N = torch.arange(8 * 40).clamp(max=voters)
        expected = (2 * ones_N > voters) | ((2 * ones_N == voters) & bool(tie))
        assert torch.equal(bits.unpack_reference(got[None], 8 * 40)[0], expected)


# --- top-k ------------------------------------------------------------------------------------------


@given(
    st.integers(1, 3), st.integers(16, 3000), st.integers(0, 4), st.integers(1, 3), st.booleans(), st.data()
)
@quick
def test_top_k(rows: int, size: int, coarse: int, threads: int, strided: bool, data: st.DataObject) -> None:
    """From all different to nearly all equal (``coarse``), some rows constant."""
    k, key = data.draw(st.integers(1, size)), data.draw(keys)
    x = normals(key, rows, 2 * size)
    x = (x * 10.0 ** (2 - coarse)).round() if coarse else x
    x[0] *= data.draw(st.sampled_from([1.0, 0.0, float("inf")]))  # 0 · inf: NaN is not asked for
    x = x.nan_to_num(posinf=float("inf"), neginf=float("-inf"))
    g = x[:, ::2] if strided else x[:, :size]
    for few in {min(k, size // 16), k}:
        if few:
            assert same(by_kernel(select.top_k, g, few, threads=threads), select.top_k_reference(g, few))


@pytest.mark.parametrize("k", [1, 50, 500, 6000])
def test_top_k_of_sorted_and_clustered_vectors(k: int) -> None:
    """Large ones all in one place, which a regular sample could miss; more than a block, a ragged end."""
    x = normals(7, 100_003)
    clustered = x.clone()
    clustered[70_000 : 70_000 + k // 2] *= 1000
    g = torch.stack([x, x.sort().values, clustered])
    assert same(by_kernel(select.top_k, g, k, threads=2), select.top_k_reference(g, k))


def test_top_k_survives_a_misleading_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A threshold that too few or nearly all reach: torch chooses."""
    x = normals(8, 1, 5000)
    for threshold in (100.0, 0.0):
        monkeypatch.setattr(select, "_threshold", lambda g_D, k, t=threshold: t)
        assert same(by_kernel(select.top_k, x, 100), select.top_k_reference(x, 100))


def test_reach_finds_thresholds_and_nan() -> None:
    from fedmpi.ops.compiled.select import reach

    x = torch.tensor([0.5, -2.0, 1.0, float("nan"), -0.0, -1.0, 3.0])
    assert reach(x, 1.0, 0, 7).tolist() == [1, 2, 3, 5, 6]
    assert reach(x, 1.0, 6, 7) is None
    assert reach(x, 1.0, 0, 4) is None


# --- embeddings and sketches ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "dim", "clients"),
    [(1 << 16, 1, 1), (70_001, 300, 3), (1 << 17, 9000, 2), (40_000, 37_000, 1), (66_000, 66_000, 1)],
)
def test_fastfood(size: int, dim: int, clients: int, package: str) -> None:
    """From one block of sums to sixteen; D a power of two, just above one, just below; d up to D."""
    embedding = subspace.Fastfood(size, dim, random.key(5, client=dim), 0.3)
    v, g = normals(size, clients, 2 * dim)[:, ::2], normals(dim, clients, 2 * size)[:, ::2]
    for threads in (1, 3) if package == "compiled" else (1,):
        assert same(by_kernel(embedding.lift, v, threads=threads), by_torch(embedding.lift, v))
        assert same(by_kernel(embedding.project, g, threads=threads), by_torch(embedding.project, g))


@given(st.integers(1, 3), st.integers(1, 20_000), st.integers(1, 3), st.booleans(), st.data())
@quick
def test_hashed(clients: int, size: int, threads: int, strided: bool, data: st.DataObject) -> None:
    dim, key = data.draw(st.integers(1, min(size, 3000))), data.draw(keys)
    embedding = subspace.Hashed(size, dim, key, data.draw(st.sampled_from([1.0, 0.3])))
    v, g = normals(key, clients, 2 * dim), normals(~key, clients, 2 * size)
    v, g = (v[:, ::2], g[:, ::2]) if strided else (v[:, :dim], g[:, :size])
    assert same(by_kernel(embedding.lift, v, threads=threads), by_torch(embedding.lift, v))
    assert same(by_kernel(embedding.project, g, threads=threads), by_torch(embedding.project, g))


@pytest.mark.parametrize("matrix", ["fastfood", "hashed"])
def test_embeddings_of_no_clients_and_of_other_types(matrix: str) -> None:
    embedding = subspace.MATRICES[matrix](1 << 16, 50, 9)
    assert by_kernel(embedding.project, torch.zeros(0, 1 << 16)).shape == (0, 50)
    assert by_kernel(embedding.lift, torch.zeros(0, 50)).shape == (0, 1 << 16)
    g = normals(1, 1, 1 << 16).double()
    assert same(by_kernel(embedding.project, g), by_torch(embedding.project, g))


@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 5000), st.integers(1, 700), st.integers(1, 3), keys
)
@quick
def test_count_sketch(clients: int, rows: int, size: int, columns: int, threads: int, key: int) -> None:
    sketch_ = sketch.CountSketch(size, rows, columns, key)
    g = normals(key, clients, 2 * size)[:, ::2]
    encoded = by_torch(sketch_.encode, g)
    assert same(by_kernel(sketch_.encode, g, threads=threads), encoded)
    assert same(by_kernel(sketch_.estimate, encoded, threads=threads), by_torch(sketch_.estimate, encoded))


def test_estimates_of_a_diverged_sketch_are_not_finite_either() -> None:
    sketch_ = sketch.CountSketch(3000, 3, 50, 1)
    v = normals(1, 1, 150)
    v[0, ::3], v[0, ::5] = float("nan"), float("inf")
    got, expected = by_kernel(sketch_.estimate, v), by_torch(sketch_.estimate, v)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())
    assert got.isnan().any()


# --- sums -------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 9000), st.integers(1, 3), st.booleans(), keys)
@quick
def test_dots(clients: int, size: int, threads: int, strided: bool, key: int) -> None:
    v, w = normals(key, clients, 2 * size), normals(~key, clients, 2 * size)
    v, w = (v[:, ::2], w[:, ::2]) if strided else (v[:, :size], w[:, size:])
    got = by_kernel(sums.dots, v, w, threads=threads)
    assert same(got, sums.dots_reference(v, w))
    a, b = v.double(), w.double()
    expected = torch.stack([(a * b).sum(1), (a * a).sum(1), (b * b).sum(1)])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-9)


@given(st.integers(1, 5000), st.integers(1, 3), st.floats(0, 1), st.integers(-45, 22), keys)
@quick
def test_add_fixed(size: int, threads: int, weight: float, log2: int, key: int) -> None:
    """Halves of the last place among them."""
    v = normals(key, 2 * size).mul(2.0**log2).clamp(-(2.0**22), 2.0**22)[::2]
    v[::3] = (v[::3] * 2.0**41).round() * 2.0**-41
    totals = [random.bits(random.key(key), size) >> 2 for _ in range(2)]
    assert by_kernel(sums.add_fixed, totals[0], v, weight, 2.0**22, threads=threads)
    assert sums.add_fixed_reference(totals[1], v, weight, 2.0**22)
    assert same(totals[0], totals[1])


@pytest.mark.parametrize("bad", [1.5, -1.5, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1500, 2999])
def test_add_fixed_refuses_what_is_too_large(bad: float, place: int) -> None:
    v = torch.ones(3000)
    assert by_kernel(sums.add_fixed, torch.zeros(3000, dtype=torch.int64), v, 1.0, 1.0)
    v[place] = bad
    for add in (sums.add_fixed, sums.add_fixed_reference):
        assert not by_kernel(add, torch.zeros(3000, dtype=torch.int64), v, 1.0, 1.0)


# --- shapes that do not fit: an error, never memory that is not theirs --------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: bits.unpack_signs(torch.zeros(1, 10, dtype=torch.uint8), 1000),
        lambda: bits.majority(torch.zeros(3, 100, dtype=torch.uint8), torch.zeros(50, dtype=torch.uint8)),
        lambda: sums.dots(torch.zeros(1, 5000), torch.zeros(1, 4000)),
        lambda: sums.add_fixed(torch.zeros(100, dtype=torch.int64), torch.zeros(5000), 1.0, 1.0),
        lambda: subspace.Fastfood(1 << 16, 10, 1).project(torch.zeros(1, 100)),
        lambda: subspace.Hashed(1 << 16, 10, 1).lift(torch.zeros(1, 9)),
        lambda: subspace.Hashed(1 << 16, 10, 1).lift(torch.zeros(1, 10), torch.zeros(1, 9)),
        lambda: sketch.CountSketch(5000, 3, 10, 1).encode(torch.zeros(1, 6000)),
        lambda: hadamard.fwht(torch.zeros(1024), torch.zeros(512)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call: Callable[[], Any]) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        by_kernel(call)
