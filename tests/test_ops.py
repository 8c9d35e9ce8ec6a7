"""fedmpi.ops against slow, independent references: big integers, stable sorts, explicit matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedmpi import methods, random
from fedmpi.methods.base import Setup
from fedmpi.ops import bits
from fedmpi.ops.hadamard import fwht
from fedmpi.ops.select import top_k
from fedmpi.ops.subspace import MATRICES, Dense, Embedding, Fastfood
from fedmpi.spec import Spec

quick = settings(deadline=None, max_examples=100)
key_values = st.integers(-(2**63), 2**63 - 1)

# --- bits -------------------------------------------------------------------------------------------


def big_integer(values: list[int], width: int) -> bytes:
    """The values one after the other, lowest bits first, as one little-endian number."""
    number = sum(value << (i * width) for i, value in enumerate(values))
    return number.to_bytes(-(-len(values) * width // 8), "little")


@given(st.integers(0, 4), st.integers(0, 70), st.data())
@quick
def test_pack_is_the_reference(clients, n, data):
    rows = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for _ in range(clients)]
    packed = bits.pack(torch.tensor(rows, dtype=torch.bool).view(clients, n))
    assert packed.dtype == torch.uint8
    assert packed.shape == (clients, bits.nbytes(n))
    assert [bytes(row.tolist()) for row in packed] == [big_integer([int(b) for b in row], 1) for row in rows]
    assert bits.unpack(packed, n).tolist() == rows


@given(st.integers(0, 3), st.integers(0, 30), st.integers(0, 40), st.data())
@example(2, 0, 0, None)
@example(1, 5, 0, None)
@quick
def test_pack_integers_is_the_reference(clients, n, width, data):
    integers = st.lists(st.integers(0, 2**width - 1), min_size=n, max_size=n)
    rows = [[0] * n if data is None else data.draw(integers) for _ in range(clients)]
    packed = bits.pack_integers(torch.tensor(rows, dtype=torch.int64).view(clients, n), width)
    assert packed.shape == (clients, bits.nbytes(n, width))
    assert [bytes(row.tolist()) for row in packed] == [big_integer(row, width) for row in rows]
    unpacked = bits.unpack_integers(packed, n, width)
    assert unpacked.dtype == torch.int64
    assert unpacked.tolist() == rows


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 255, 256, 257, 2**20, 2**20 + 1])
def test_index_width_is_the_least_that_holds_every_index(n):
    width = bits.index_width(n)
    assert n - 1 < 2**width
    assert width == 0 or n - 1 >= 2 ** (width - 1)
    assert width == math.ceil(math.log2(n))


# --- top-k ------------------------------------------------------------------------------------------


def reference_top_k(row: list[float], k: int) -> list[int]:
    """A stable sort by falling magnitude: among equals the lowest index comes first."""
    return sorted(np.argsort(-np.abs(np.array(row)), kind="stable")[:k].tolist())


@given(st.integers(1, 4), st.integers(1, 40), st.data())
@settings(deadline=None, max_examples=100)
def test_top_k_is_a_stable_argsort(clients, size, data):
    values = data.draw(
        st.sampled_from(
            [
                st.sampled_from([0.0, -0.0, 1.0, -1.0]),  # ties and zeros almost everywhere
                st.integers(-3, 3).map(float),
                st.floats(width=32, allow_nan=False),  # infinities and subnormals, too
            ]
        )
    )
    rows = [data.draw(st.lists(values, min_size=size, max_size=size)) for _ in range(clients)]
    k = data.draw(st.integers(1, size))
    chosen = top_k(torch.tensor(rows, dtype=torch.float32), k)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == [reference_top_k(row, k) for row in rows]


@pytest.mark.parametrize("k", [1, 7, 500, 5000])
def test_top_k_of_many(k):
    g_CD = random.normal(random.keys(0, 0, torch.arange(3), "top"), 5000)
    g_CD[1] = (g_CD[1] * 4).round()  # ties
    g_CD[2] = 0
    assert top_k(g_CD, k).tolist() == [reference_top_k(row, k) for row in g_CD.tolist()]


# --- Walsh–Hadamard ---------------------------------------------------------------------------------

ORDERS = [1 << i for i in range(9)]


def hadamard_matrix(n: int) -> torch.Tensor:
    return torch.from_numpy(scipy.linalg.hadamard(n)).float()


@pytest.mark.parametrize("n", ORDERS)
def test_fwht_is_the_matrix(n):
    """To the bit on integers, whose sums are exact."""
    x = random.integers(random.key(0, client=n), 3 * n, 2001).view(3, n).float() - 1000
    before = x.clone()
    y = fwht(x)
    assert torch.equal(y.double(), x.double() @ hadamard_matrix(n).double())
    assert torch.equal(fwht(y), n * x)
    assert torch.equal(x, before)
    assert torch.equal(fwht(torch.eye(n)), hadamard_matrix(n))
    assert torch.equal(fwht(x[0]), y[0])
    assert torch.equal(fwht(x.view(3, 1, n)), y.view(3, 1, n))


@pytest.mark.parametrize("n", ORDERS)
def test_fwht_returns_a_new_tensor(n):
    x = torch.ones(2, n)
    fwht(x).zero_()
    assert torch.equal(x, torch.ones(2, n))


def test_fwht_of_normals():
    x = random.normal(random.keys(0, 0, torch.arange(4), "x"), 256)
    error = fwht(x).double() - x.double() @ hadamard_matrix(256).double()
    # Eight additions of rounding error 2^-24 each, on values of at most 256 · max.
    assert error.abs().max() <= 8 * 2.0**-24 * x.double().abs().sum(1).max()


@pytest.mark.parametrize("n", [0, 3, 6, 257])
def test_fwht_refuses_other_lengths(n):
    with pytest.raises(ValueError, match=f"power of two, got {n}"):
        fwht(torch.zeros(2, n))


# --- embeddings -------------------------------------------------------------------------------------


def dims(size: int) -> list[int]:
    """1, 2, 3, half, one more than half of the padded length, all but one, all."""
    padded = 1 << (size - 1).bit_length()
    return sorted(
        {d for d in (1, 2, 3, size // 2, padded // 2, padded // 2 + 1, size - 1, size) if 0 < d <= size}
    )


PAIRS = [(size, dim) for size in (1, 3, 5, 8, 37, 64, 100) for dim in dims(size)]
pairs = pytest.mark.parametrize(("size", "dim"), PAIRS)


def explicit(embedding: Embedding) -> torch.Tensor:
    """A, column by column, in float64."""
    columns = []
    for j in range(embedding.dim):
        e_j = torch.zeros(1, embedding.dim)
        e_j[0, j] = 1
        columns.append(embedding.lift(e_j)[0])
    return torch.stack(columns, 1).double()


def written_out(size: int, dim: int, key: int) -> np.ndarray:
    """c · Unpad_D B H Π G H Pad as a product of numpy matrices, from the drawn B, Π and G."""
    n = 1
    while n < size:
        n *= 2
    B = np.diag(random.signs(random.key(key, stream="B"), n).double().numpy())
    G = np.diag(random.normal(random.key(key, stream="G"), n).double().numpy())
    P = np.eye(n)[random.permutation(random.key(key, stream="Π"), n).numpy()]
    H = scipy.linalg.hadamard(n).astype(np.float64)
    pad, unpad = np.eye(n)[:, :dim], np.eye(n)[:size]
    return unpad @ B @ H @ P @ G @ H @ pad / math.sqrt(n * dim)


def close(got: torch.Tensor, expected: torch.Tensor | np.ndarray, scale: float) -> bool:
    """Equal up to float32 rounding of numbers of size ``scale``."""
    return np.abs(np.asarray(got, np.float64) - np.asarray(expected, np.float64)).max() <= 3e-6 * scale


def test_pairs_include_the_hard_ones():
    assert {(5, 4), (5, 5), (37, 33), (37, 37), (64, 33), (100, 65), (100, 100), (1, 1)} <= set(PAIRS)


@pairs
@pytest.mark.parametrize("matrix", MATRICES)
def test_project_is_the_transpose_of_the_explicit_matrix(matrix, size, dim):
    embedding = MATRICES[matrix](size, dim, random.key(3, client=dim))
    A = explicit(embedding)
    assert A.shape == (size, dim)
    g_CD = random.normal(random.keys(1, dim, torch.arange(3), "g"), size)
    v_Cd = random.normal(random.keys(1, dim, torch.arange(3), "v"), dim)
    scale = float(A.abs().sum())
    assert close(embedding.project(g_CD), g_CD.double() @ A, scale)
    assert close(embedding.lift(v_Cd), v_Cd.double() @ A.T, scale)
    if matrix == "fastfood":  # a sum in a fixed order; a matrix product's order may depend on C
        assert torch.equal(embedding.project(g_CD)[1:2], embedding.project(g_CD[1:2]))
    assert embedding.project(g_CD[:0]).shape == (0, dim)
    assert embedding.lift(v_Cd[:0]).shape == (0, size)


@pairs
def test_fastfood_is_the_product_of_its_parts(size, dim):
    key = random.key(4, client=size)
    A = written_out(size, dim, key)
    assert close(explicit(Fastfood(size, dim, key)), A, math.sqrt(A.size))
    g_CD = random.normal(random.keys(1, dim, torch.arange(2), "g"), size)
    assert close(Fastfood(size, dim, key).project(g_CD), g_CD.double().numpy() @ A, np.abs(A).sum())


@pytest.mark.parametrize(("size", "dim"), [(5, 3), (37, 37)])
def test_dense_is_normals_over_the_root_of_d(size, dim):
    key = random.key(5)
    drawn = random.normal(random.key(key, stream="dense"), size * dim).double().view(size, dim)
    assert close(explicit(Dense(size, dim, key)), drawn / math.sqrt(dim), 1)


def over_keys(matrix: str, size: int, dim: int, count: int) -> torch.Tensor:
    """The matrices of ``count`` keys, ``(count, D, d)``."""
    keys = random.keys(6, size, torch.arange(count), f"{matrix} {dim}").tolist()
    eye = torch.eye(dim)
    return torch.stack([MATRICES[matrix](size, dim, key).lift(eye).T for key in keys]).double()


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize(("size", "dim"), [(3, 1), (5, 3), (8, 2), (5, 5)])
def test_expectation_of_the_gram_matrix_is_the_identity(matrix, size, dim):
    """E[A Aᵀ] = I: every entry of the mean over 800 keys within 5 standard errors, none above 0.1."""
    A = over_keys(matrix, size, dim, 800)
    gram = A @ A.transpose(1, 2)
    error = gram.std(0) / math.sqrt(len(gram))
    assert 0 < error.max() < 0.1
    assert ((gram.mean(0) - torch.eye(size)).abs() <= 5 * error + 1e-5).all()
    assert (A.mean(0).abs() <= 5 * A.std(0) / math.sqrt(len(A)) + 1e-6).all(), "E[A] = 0"


@pytest.mark.parametrize("matrix", MATRICES)
def test_factor_multiplies(matrix):
    plain, scaled = (MATRICES[matrix](37, 9, random.key(7), factor) for factor in (1.0, 0.25))
    assert torch.equal(explicit(scaled), explicit(plain) * 0.25)
    g_CD = random.normal(random.keys(1, 0, torch.arange(3), "g"), 37)
    assert torch.equal(scaled.project(g_CD), plain.project(g_CD) * 0.25)


@pytest.mark.parametrize("matrix", MATRICES)
def test_isometry_keeps_lengths_on_average(matrix):
    """The d squared singular values of A average 1 under ``isometry``, D/d under ``unbiased``."""
    size, dim, spec = 40, 10, Spec(("w",), ((40,),))
    means = {}
    for scale in ("unbiased", "isometry"):
        options = {"name": "intrinsic", "dim": dim, "matrix": matrix, "scale": scale}
        if matrix == "orthonormal":
            options |= {"matrix": "dense", "orthonormal": True}
        built = [methods.build(options, spec, Setup(seed)).up.subspaces.at(0, 0) for seed in range(200)]
        assert {e.factor for e in built} == {math.sqrt(dim / size) if scale == "isometry" else 1.0}
        squares = torch.tensor([float(e.lift(torch.eye(dim)).double().square().sum()) / dim for e in built])
        expected = 1 if scale == "isometry" else size / dim
        assert abs(squares.mean() - expected) <= 5 * squares.std() / math.sqrt(len(squares)) + 1e-5
        means[scale] = squares.mean()
    assert means["unbiased"] / means["isometry"] == pytest.approx(size / dim, rel=1e-5)


@given(st.sampled_from(sorted(MATRICES)), st.integers(1, 200), st.data(), key_values)
@quick
def test_project_is_the_adjoint_of_lift(matrix, size, data, key):
    """<A v, g> = <v, Aᵀ g>, up to float32 rounding of the terms."""
    dim = data.draw(st.integers(1, size))
    embedding = MATRICES[matrix](size, dim, key)
    v = random.normal(random.keys(8, 0, torch.arange(2), "v"), dim)
    g = random.normal(random.keys(8, 0, torch.arange(2), "g"), size)
    lifted, projected = embedding.lift(v).double(), embedding.project(g).double()
    left, right = (lifted * g).sum(1), (v * projected).sum(1)
    scale = lifted.norm(dim=1) * g.norm(dim=1) + v.norm(dim=1) * projected.norm(dim=1)
    assert ((left - right).abs() <= 1e-5 * scale).all()


@given(st.sampled_from(sorted(MATRICES)), st.integers(1, 60), st.data(), key_values)
@quick
def test_the_same_key_gives_the_same_matrix_and_another_another(matrix, size, data, key):
    dim = data.draw(st.integers(1, size))
    v = torch.ones(1, dim)
    first = MATRICES[matrix](size, dim, key).lift(v)
    assert torch.equal(first, MATRICES[matrix](size, dim, key).lift(v))
    if size >= 64:  # fewer signs can agree by chance
        assert not torch.equal(first, MATRICES[matrix](size, dim, key ^ 1).lift(v))
