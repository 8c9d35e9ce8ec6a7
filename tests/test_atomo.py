"""ATOMO: against a transcription, its mean and variance, corner matrices, what it refuses, its bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmpi import config, methods, random
from fedmpi.errors import ConfigError, MessageError
from fedmpi.message import Message
from fedmpi.method import Compressor
from fedmpi.methods.atomo import decompose, probabilities
from fedmpi.methods.base import Setup
from fedmpi.spec import Spec

from .codecs import LAYERS, context, sent
from .conftest import SMALL
from .softmax import Array, Softmax, assert_close, assert_same_sums, parameters, simulate


def codec(spec: Spec = LAYERS, **options: Any) -> Compressor:
    return methods.build({"name": "atomo", **options}, spec, Setup()).up


def atomo_probabilities(sigma: Array, s: int) -> Array:
    """Algorithm 1, line by line; σ decreasing."""
    p, i, n = np.zeros(len(sigma)), 0, len(sigma)
    while i < n:
        if abs(sigma[i]) * s <= np.abs(sigma[i:]).sum():
            for k in range(i, n):
                total = np.abs(sigma[i:]).sum()
                p[k] = abs(sigma[k]) * s / total if total else 0
            i = n
        else:
            p[i] = 1
            s, i = s - 1, i + 1
    return p


class Reference:
    """One client's estimate of a layer's gradient, in float64 by numpy's own SVD."""

    def __init__(self, rank: int, sampling: str, seed: int) -> None:
        self.rank, self.sampling, self.seed = rank, sampling, seed
        self.closest = np.inf  # to a decision that rounding could turn

    def estimate(self, matrix: Array, t: int, client: int, name: str) -> tuple[Array, list[Array]]:
        """Its value, and the atoms that it is the sum of."""
        u, sigma, v = np.linalg.svd(matrix, full_matrices=False)
        if self.sampling == "truncated":
            p, chosen = np.ones(len(sigma)), range(self.rank)
            self.closest = min(self.closest, sigma[self.rank - 1] / sigma[self.rank] - 1)
        else:
            p = atomo_probabilities(sigma, self.rank)
            draw = random.uniform(random.key(self.seed, t, client, f"atoms {name}"), len(sigma)).numpy()
            self.closest = min(self.closest, np.abs(draw - p)[p < 1].min())
            chosen = [i for i in range(len(sigma)) if draw[i] < p[i]]
        atoms = [sigma[i] / p[i] * np.outer(u[:, i], v[i]) for i in chosen]
        return sum(atoms, np.zeros(matrix.shape)), atoms


@pytest.mark.parametrize("topology", ["allreduce", "aggregator"])
@pytest.mark.parametrize(("sampling", "rank"), [("bernoulli", 2), ("bernoulli", 4), ("truncated", 2)])
def test_against_a_transcription(sampling: str, rank: int, topology: str) -> None:
    """θ ← θ − η Σ ω_k ĝ_k; the same atoms in each of 25 rounds."""
    simulation = simulate(
        method={"name": "atomo", "rank": rank, "sampling": sampling}, server={"lr": 0.1}, topology=topology
    )
    task, calls = Softmax(simulation), sent(simulation)
    reference = Reference(rank, sampling, simulation.config.seed)
    theta, omega = task.theta, task.sizes / task.sizes.sum()
    numbers = total = 0
    for t in range(25):
        line, mean = simulation.round(t), np.zeros(650)
        ((_, message, _),) = calls[t:]
        counts, rows = message.arrays["counts"].int()[:, 0].tolist(), message.arrays["out.weight.atoms"]
        for k, arrived in enumerate(rows.double().split(counts)):
            g = task.accumulated(theta, k, 2, 0.2)
            estimate, atoms = reference.estimate(g[:640].reshape(10, 64), t, k, "out.weight")
            assert len(arrived) == len(atoms), (t, k)
            for row, atom in zip(arrived.numpy(), atoms, strict=True):
                assert_close(np.outer(row[:10], row[10:]), atom, 2e-3)  # vectors of close σ turn easily
            mean += omega[k] * np.concatenate([estimate.ravel(), g[640:]])
            numbers += 74 * len(atoms) + 10
        total += sum(counts)
        assert line["atoms"] == sum(counts)
        theta = theta - 0.1 * mean
        assert_close(parameters(simulation), theta, 1e-4)
    assert reference.closest > 1e-6, "a decision that rounding could turn: choose another seed"
    assert (total == 25 * 5 * rank) == (sampling == "truncated")
    assert int(simulation.ledger.upload.sum()) == 25 * 5 * 1 + 4 * numbers
    assert int(simulation.ledger.download.sum()) == 25 * 5 * 4 * 650


@pytest.mark.parametrize("sampling", ["bernoulli", "truncated"])
def test_convolutions_are_matrices(sampling: str) -> None:
    """Through the engine, on a CNN of which four layers are factored; the gradients are the simulation's own."""
    model = {"name": "cnn", "channels": [4, 6], "hidden": 12}
    simulation = simulate(
        method={"name": "atomo", "sampling": sampling, "rank": 2},
        model=model,
        local={"lr": 0.1, "batch": 16},
    )
    calls, reference = sent(simulation), Reference(2, sampling, simulation.config.seed)
    theta = parameters(simulation)
    omega = simulation.partition.sizes.double().numpy() / float(simulation.partition.sizes.sum())
    factored = {
        "conv1.weight": (4, 9),
        "conv2.weight": (6, 36),
        "hidden.weight": (12, 24),
        "out.weight": (10, 12),
    }
    for t in range(4):
        simulation.round(t)
        ((g_CD, message, _),) = calls[t:]
        mean = np.zeros(len(theta))
        for k in range(5):
            parts = []
            for name, view in simulation.spec.views(g_CD[k].double()).items():
                part = view.numpy()
                if name in factored:
                    part, atoms = reference.estimate(part.reshape(factored[name]), t, k, name)
                    assert len(atoms) == int(message.lengths[f"{name}.atoms"][k])
                parts.append(part.ravel())
            mean += omega[k] * np.concatenate(parts)
        theta = theta - 0.1 * mean
        assert_close(parameters(simulation), theta)
    assert set(message.lengths) == {f"{name}.atoms" for name in factored}


def flat(seed: int, spec: Spec = LAYERS) -> Tensor:
    return torch.randn(spec.size, generator=torch.Generator().manual_seed(seed))


def test_unbiased_with_the_least_variance() -> None:
    """20,000 clients' estimates of one gradient, all against exact standard errors, five of them: each entry's mean,
    var = Σ (1/p_i − 1) (σ_i u_i v_iᵀ)²; the mean squared error, Σ (1/p_i − 1) σ_i²; the mean number of atoms,
    Σp = s."""
    n, rank = 20_000, 3
    up, g_D = codec(rank=rank), flat(0)
    expected = {name: view.flatten(1) for name, view in LAYERS.views(g_D.double()[None]).items()}
    total = dict.fromkeys(expected, 0.0)
    square, counts = dict.fromkeys(expected, 0.0), torch.zeros(3, dtype=torch.float64)
    for t in range(10):
        ctx = context(n // 10, t)
        message, _ = up.compress(g_D.expand(n // 10, -1), {}, ctx)
        counts += message.arrays["counts"].double().sum(0) / n
        for name, view in LAYERS.views(up.decompress(message, {}, ctx)[0].double()).items():
            total[name] += view.flatten(1).sum(0).numpy() / n
            square[name] += float(((view.flatten(1) - expected[name]) ** 2).sum()) / n
    assert square["bias"] == square["small"] == 0
    for index, name in enumerate(("conv", "wide", "tall")):
        shape = (LAYERS.shapes[LAYERS.names.index(name)][0], -1)
        matrix, mean = expected[name].numpy().reshape(shape), total[name].reshape(shape)
        u, sigma, v = np.linalg.svd(matrix, full_matrices=False)
        p = atomo_probabilities(sigma, rank)
        assert (p < 1).any()
        odds = 1 / p - 1
        entry = sum(odds[i] * (sigma[i] * np.outer(u[:, i], v[i])) ** 2 for i in range(len(sigma)))
        assert np.all(np.abs(mean - matrix) <= 5 * np.sqrt(entry / n) + 1e-6), name
        # (b/p − 1)² is odds² with probability p, else 1: mean odds, second moment p·odds⁴ + 1 − p.
        of_square = (sigma**4 * (p * odds**4 + (1 - p) * (odds > 0) - odds**2)).sum()
        assert abs(square[name] - (sigma**2 * odds).sum()) <= 5 * np.sqrt(of_square / n), name
        assert abs(float(counts[index]) - rank) <= 5 * np.sqrt((p * (1 - p)).sum() / n), name


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.sampled_from([0.0, 1e-9, 0.5, 1.0, 1.0, 3.0, 10.0, 1e4]), min_size=1, max_size=12),
    st.integers(1, 12),
)
@example([0.7, 0.7, 0.7], 3)  # 0.7 · (3 / 2.1) is above 1 in floats
def test_probabilities_are_algorithm_1(values: list[float], budget: int) -> None:
    sigma, budget = np.sort(values)[::-1].copy(), min(budget, len(values))
    p = probabilities(torch.tensor(sigma)[None], budget)[0].numpy()
    assert np.abs(p - atomo_probabilities(sigma, budget)).max() <= 2**-24 + 1e-12
    assert p.max() <= 1
    assert ((p > 0) == (sigma > 0)).all()
    assert abs(p.sum() - min(budget, (sigma > 0).sum())) <= len(p) * 2**-24 + 1e-9


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6), (1, 5), (12, 40)])
def test_atoms_are_singular_triplets(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if min(shape) > 4:
        matrix[:, 2:] = matrix[:, :1]  # of rank 2
    left, right, sigma = (x[0].numpy() for x in decompose(matrix[None]))
    assert np.allclose(sigma, np.linalg.svd(matrix.numpy())[1], atol=1e-7)
    assert np.allclose(left.T @ right, matrix, atol=1e-13)
    assert np.allclose(np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1), sigma)
    assert (np.diff(sigma) <= 0).all()


@pytest.mark.parametrize("sampling", ["bernoulli", "truncated"])
def test_zero_and_low_rank_gradients(sampling: str) -> None:
    """Zero layers send no atoms; a layer whose rank is at most s arrives exactly; the counts differ a client."""
    spec = Spec(("w",), ((8, 30),))
    up, ctx = codec(spec, rank=2, sampling=sampling), context(3)
    g_CD = torch.zeros(3, 240)
    g_CD[1] = torch.outer(torch.arange(8.0), torch.ones(30)).flatten()
    g_CD[2] = g_CD[1]
    g_CD[2, 30:60] += torch.linspace(-1, 1, 30)
    message, _ = up.compress(g_CD, {}, ctx)
    atoms = message.arrays["counts"][:, 0].tolist()
    assert atoms[0] == 0
    assert 1 <= atoms[1] <= 2  # a rounding error of σ₂ may count as an atom
    v_CD, _ = up.decompress(message, {}, ctx)
    assert not v_CD[0].any()
    assert torch.allclose(v_CD[1:], g_CD[1:], atol=1e-5)
    assert message.nbytes().tolist() == [1 + 4 * 38 * n for n in atoms]


def test_signs_of_the_vectors_do_not_matter() -> None:
    up, ctx = codec(), context(5)
    message, _ = up.compress(torch.stack([flat(i) for i in range(5)]), {}, ctx)
    turned = {name: -a if name.endswith("atoms") else a for name, a in message.arrays.items()}
    v_CD, _ = up.decompress(message, {}, ctx)
    again_CD, _ = up.decompress(Message(turned, message.lengths), {}, ctx)
    assert torch.equal(v_CD, again_CD)


def test_decoding_is_exact_arithmetic() -> None:
    """To the bit the float32 sum of products in the atoms' order, in numpy: no library's matrix product."""
    up, ctx = codec(), context(5)
    message, _ = up.compress(torch.stack([flat(i) for i in range(5)]), {}, ctx)
    v_CD, _ = up.decompress(message, {}, ctx)
    rows = message.arrays["wide.atoms"].split(message.lengths["wide.atoms"].tolist())
    for k, atoms in enumerate(rows):
        total = np.zeros((11, 20), np.float32)
        for row in atoms.numpy():
            total += np.outer(row[:11], row[11:])
        assert np.array_equal(LAYERS.views(v_CD)["wide"][k], total)


def test_a_budget_beyond_the_rank_is_dense() -> None:
    """With its sums and its bytes: factors would take more numbers than the layer has."""
    atomo, dense = simulate(method={"name": "atomo", "rank": 1000}), simulate()
    for t in range(3):
        assert atomo.round(t)["upload_bytes"] == dense.round(t)["upload_bytes"]
    assert_same_sums(atomo.replica.parameters(), dense.replica.parameters(), terms=6 * 1437)


@pytest.mark.parametrize(("rows", "dtype"), [(255, torch.uint8), (256, torch.int16)])
def test_counts_are_wide_enough(rows: int, dtype: torch.dtype) -> None:
    up = codec(Spec(("w",), ((rows, 300),)), rank=100)
    assert up.layout()["counts"].dtype == dtype
    g_CD = torch.eye(300)[:rows].flatten()[None]  # all σ alike: every atom has p = 100 / rows
    message, _ = up.compress(g_CD, {}, context(1))
    assert int(message.arrays["counts"]) == int(message.lengths["w.atoms"])
    assert (
        codec(Spec(("w",), ((rows, 300),)), rank=100, sampling="truncated").layout()["counts"].dtype
        == torch.uint8
    )


def forged(message: Message, counts: list[int], name: str = "wide.atoms") -> Message:
    """With other counts, and, if ``name`` is given, atoms to match."""
    arrays, lengths = dict(message.arrays), dict(message.lengths)
    arrays["counts"] = arrays["counts"].clone()
    arrays["counts"][:, 1] = torch.tensor(counts)
    if name:
        arrays[name] = torch.zeros(sum(counts), arrays[name].shape[1])
        lengths[name] = torch.tensor(counts)
    return Message(arrays, lengths)


@pytest.mark.parametrize(("sampling", "most"), [("bernoulli", 11), ("truncated", 2)])
def test_impossible_messages_are_refused(sampling: str, most: int) -> None:
    up, ctx = codec(sampling=sampling), context(2)
    message, _ = up.compress(torch.stack([flat(0), flat(1)]), {}, ctx)
    up.decompress(forged(message, [0, most]), {}, ctx)
    with pytest.raises(MessageError, match=f"'wide\\.atoms', expected at most {most}"):
        up.decompress(forged(message, [0, most + 1]), {}, ctx)
    wrong = [int(n) + 1 for n in message.lengths["wide.atoms"]]
    with pytest.raises(MessageError, match="'wide\\.atoms' has other rows than 'counts' says"):
        up.decompress(forged(message, wrong, name=""), {}, ctx)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"rank": 0}, "method.rank"), ({"sampling": "top"}, "method.sampling"), ({"ranks": 3}, "method.ranks")],
)
def test_bad_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config.parse({**SMALL, "method": {"name": "atomo", **options}})
