"""fedmpi.random: golden vectors, an independent SplitMix64, and the distributions.

Every statistical test has fixed keys, so it passes always or never. Its bound is stated beside it: p > 10^-3
for a test of a distribution, 5 standard errors for a moment.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from fedmpi import random

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
KEY = random.key(1, 2, 3, "batches")

words64 = st.integers(-(2**63), 2**63 - 1)
seeds = st.integers(0, 2**63 - 1)
streams = st.text("abΠ ", max_size=5)


def splitmix(state: int) -> int:
    """SplitMix64's output function, from the paper (Steele, Lea, Flood 2014, figure 17)."""
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference_bits(key: int, n: int, start: int = 0) -> list[int]:
    """Unsigned words ``start`` to ``start + n`` of SplitMix64 seeded with ``key``."""
    return [splitmix(key + i * GAMMA) for i in range(start + 1, start + n + 1)]


def reference_key(seed: int, round: int, client: int, stream: str) -> int:
    name = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")
    base = splitmix(splitmix(splitmix(seed + GAMMA) + name) + round + GAMMA)
    return splitmix(base + (client + 2) * GAMMA)


def unsigned(words: torch.Tensor) -> list[int]:
    return [w & MASK for w in words.tolist()]


def test_reference_is_splitmix64():
    # The published test vector for seed 1234567 (Rosetta Code, "Pseudo-random numbers/Splitmix64").
    assert reference_bits(1234567, 5) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_golden():
    assert [random.key(0), random.key(1), random.key(2**63 - 1, 10**6, -1, "cohort"), KEY] == [
        -4703951131781356198,
        -2144516083638341719,
        1454171261599269351,
        -3832315763655342722,
    ]
    assert random.bits(KEY, 4).tolist() == [
        434591430075117581,
        -5060864114683935203,
        -4793398090642598986,
        5620737825746511994,
    ]
    hexes = [x.hex() for x in random.uniform(KEY, 3).tolist()]
    assert hexes == ["0x1.81fe800000000p-6", "0x1.7388640000000p-1", "0x1.7af4da0000000p-1"]
    hexes = [x.hex() for x in random.normal(KEY, 4).tolist()]
    assert hexes[:2] == ["0x1.21d2ac0000000p+1", "0x1.6757140000000p-2"]
    assert hexes[2:] == ["-0x1.539d860000000p-2", "-0x1.06c2780000000p+0"]
    assert random.integers(KEY, 8, 1000).tolist() == [23, 725, 740, 304, 846, 719, 306, 472]
    coins = "1011000000001110011100000010011001011001010111111"
    assert "".join(map(str, random.coins(KEY, len(coins)).int().tolist())) == coins
    assert random.signs(KEY, 4).tolist() == [1, -1, 1, 1]
    assert random.permutation(KEY, 10).tolist() == [8, 5, 1, 2, 4, 9, 0, 3, 6, 7]
    assert random.sample(KEY, 10**6, 5).tolist() == [279938, 782798, 128936, 883404, 742169]


def test_golden_of_many():
    """All bits of long vectors, which an error in one cell of a table would change."""
    made = {
        "bits": random.bits(KEY, 100_000),
        "normal": random.normal(KEY, 100_000),
        "permutation": random.permutation(KEY, 100_000),
        "table": random.half_normal_table(),
    }
    assert {name: hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16] for name, t in made.items()} == {
        "bits": "f107cb18651e653f",
        "normal": "6fc37c45bc4fb6e9",
        "permutation": "3a83c75c115c42c4",
        "table": "48e4c8057ed43dca",
    }


@given(seeds, st.integers(0, 2**40), st.integers(-1, 2**40), streams)
@settings(deadline=None)
def test_key_is_the_reference(seed, round, client, stream):
    assert random.key(seed, round, client, stream) & MASK == reference_key(seed, round, client, stream)


@given(seeds, st.integers(0, 10**9), st.lists(st.integers(-1, 2**40), max_size=8), streams)
@settings(deadline=None)
def test_keys_are_the_clients_keys(seed, round, clients, stream):
    batch = random.keys(seed, round, torch.tensor(clients, dtype=torch.int64), stream)
    assert batch.tolist() == [random.key(seed, round, client, stream) for client in clients]


@given(words64, st.integers(0, 70), st.integers(0, 2**40))
@settings(deadline=None)
def test_bits_are_the_reference(key, n, start):
    assert unsigned(random.bits(key, n, start)) == reference_bits(key, n, start)


@given(words64, st.integers(0, 150))
@settings(deadline=None)
def test_values_are_functions_of_the_words(key, n):
    words = reference_bits(key, n)
    assert random.uniform(key, n).tolist() == [(w >> 40) / 2**24 for w in words]
    coins = [bool(w >> b & 1) for w in words for b in range(64)][:n]
    assert random.coins(key, n).tolist() == coins
    assert random.signs(key, n).tolist() == [1.0 if coin else -1.0 for coin in coins]
    for high in (1, 7, 2**31):
        assert random.integers(key, n, high).tolist() == [(w >> 32) * high >> 32 for w in words]


@pytest.mark.parametrize("draw", [random.bits, random.uniform, random.coins, random.signs, random.normal])
@pytest.mark.parametrize("n", [0, 1, 65])
def test_batch_equals_one_by_one(draw, n):
    keys = random.keys(5, 6, torch.arange(-1, 4), "x")
    batch = draw(keys, n)
    assert batch.shape == (5, n)
    for row, key in zip(batch, keys.tolist(), strict=True):
        assert torch.equal(row, draw(key, n))


@pytest.mark.parametrize("draw", [random.bits, random.uniform, random.coins, random.signs, random.normal])
def test_prefix(draw):
    assert torch.equal(draw(KEY, 200)[:77], draw(KEY, 77))


def test_dtypes():
    kinds = [random.bits, random.uniform, random.coins, random.signs, random.normal, random.permutation]
    expected = [torch.int64, torch.float32, torch.bool, torch.float32, torch.float32, torch.int64]
    assert [draw(KEY, 3).dtype for draw in kinds] == expected


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    random.normal(KEY, 10)
    random.permutation(KEY, 1 << 16)
    assert torch.equal(torch.get_rng_state(), before)


# --- normal -----------------------------------------------------------------------------------------


def exact_normal(words: np.ndarray) -> np.ndarray:
    """The exact quantile of each word's upper-tail mass x · 2^-32, x = max(word >> 33, 1)."""
    quantile = -stats.norm.ppf(np.maximum(words >> 33, 1).astype(np.float64) * 2.0**-32)
    return np.where(words & 1, quantile, -quantile)


def test_normal_is_the_quantile():
    """The largest error is 10^-6: 8.5·10^-7 seen, with the rounding to float32 (docstring: 2·10^-5)."""
    words = random.bits(KEY, 1_000_000).numpy().view(np.uint64)
    error = np.abs(random.normal(KEY, 1_000_000).double().numpy() - exact_normal(words))
    assert error.max() < 1e-6


def test_normal_in_every_cell_of_the_table(monkeypatch):
    """The ends, the middle and beside the ends of every interval, the whole tail, and both signs."""
    x = [np.arange(50_000)]
    x += [np.linspace(2**e, 2 ** (e + 1) - 1, 8 * 256 + 1).astype(np.int64) for e in range(31)]
    x = np.unique(np.concatenate([*x, (1 << np.arange(1, 32)) - 1]))
    words = np.concatenate([x << 33, x << 33 | 1])
    monkeypatch.setattr(random, "bits", lambda key, n, device=None: torch.from_numpy(words))
    z = random.normal(0, len(words)).double().numpy()
    assert np.abs(z - exact_normal(words.view(np.uint64))).max() < 1e-6
    half = len(x)
    assert (z[:half] == -z[half:]).all()
    assert (np.diff(z[half:]) <= 0).all(), "a smaller tail mass must not give a smaller value"
    assert 6.22 < z.max() <= 6.24


def test_normal_distribution():
    n = 1_000_000
    z = random.normal(random.key(11, stream="moments"), n).double().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-3
    # Standard errors of the first four moments of a standard normal sample of size n.
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**power).mean() - mean) < 5 * np.sqrt(variance / n), power
    # Tails: counts beyond 3 and 4 sigma are Poisson.
    for bound in (3, 4):
        expected = 2 * n * stats.norm.sf(bound)
        assert abs((np.abs(z) > bound).sum() - expected) < 5 * np.sqrt(expected)


# --- other distributions ----------------------------------------------------------------------------


def test_uniform_distribution():
    u = random.uniform(random.key(12), 1_000_000).double().numpy()
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.kstest((u[1:] - u[:-1]) % 1, "uniform").pvalue > 1e-3


def test_coins_are_fair_and_independent():
    n = 1 << 20
    coin = random.coins(random.key(13), n).numpy()
    for lag in (0, 1, 2, 63, 64, 65):
        ones = (coin if lag == 0 else coin[lag:] ^ coin[:-lag]).sum()
        size = n - lag
        assert abs(ones - size / 2) < 5 * np.sqrt(size / 4), lag
    by_place = coin.reshape(-1, 64).sum(0)
    assert (np.abs(by_place - n / 128) < 5 * np.sqrt(n / 256)).all()


@pytest.mark.parametrize("high", [2, 3, 10, 1000])
def test_integers_are_uniform(high):
    counts = np.bincount(random.integers(random.key(14, client=high), 200_000, high), minlength=high)
    assert len(counts) == high
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("high", [0, -1, 2**31 + 1])
def test_integers_refuses(high):
    with pytest.raises(ValueError, match=rf"high: expected 1 to 2\^31, got {high}"):
        random.integers(KEY, 1, high)


# --- permutations -----------------------------------------------------------------------------------


@given(words64, st.integers(0, 3000) | st.integers(1 << 16, 1 << 18))
@example(KEY, (1 << 16) - 1)
@example(KEY, 1 << 16)
@example(KEY, (1 << 16) + 1)
@example(KEY, (1 << 17) - 1)
@example(KEY, 1 << 17)
@example(KEY, (1 << 17) + 1)
@example(KEY, 1 << 20)
@example(KEY, 10**6)
@settings(deadline=None, max_examples=40)
def test_permutation_is_one(key, n):
    assert torch.equal(random.permutation(key, n).sort().values, torch.arange(n))


@given(words64, st.data())
@settings(deadline=None, max_examples=40)
def test_sample_is_a_part_of_the_permutation(key, data):
    n = data.draw(st.integers(0, 300) | st.integers((1 << 16) - 2, 1 << 17))
    start = data.draw(st.just(0) | st.integers(0, n))
    k = data.draw(st.integers(0, n - start))
    assert torch.equal(random.sample(key, n, k, start=start), random.permutation(key, n)[start : start + k])


@pytest.mark.parametrize(("n", "k"), [(5, 6), (5, -1), (1 << 17, (1 << 17) + 1)])
def test_sample_refuses(n, k):
    with pytest.raises(ValueError, match=rf"k: expected 0 to n = {n}, got {k}"):
        random.sample(KEY, n, k)
    with pytest.raises(ValueError, match=rf"k: expected 0 to n = {n}, got {k - 1} from 1 on"):
        random.sample(KEY, n, k - 1, start=1)


def test_sample_of_a_huge_range_takes_little():
    chosen = random.sample(KEY, 10**12, 1000)
    assert len(chosen.unique()) == 1000
    assert stats.kstest(chosen.numpy() / 10**12, "uniform").pvalue > 1e-3


def test_small_permutations_are_all_equally_likely():
    keys = random.keys(15, 0, torch.arange(4800), "small").tolist()
    seen: dict[tuple[int, ...], int] = {}
    for key in keys:
        order = tuple(random.permutation(key, 4).tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 24
    assert stats.chisquare(list(seen.values())).pvalue > 1e-3


@pytest.mark.parametrize("n", [1 << 16, (1 << 16) + 1, 10**6])
def test_keyed_bijection_looks_random(n):
    """Over keys: the first places are uniform and independent. Within one: no trace of the order."""
    keys = random.keys(16, 0, torch.arange(1000), "large").tolist()
    first = np.array([random.sample(key, n, 3).tolist() for key in keys]) / n
    for place in range(3):
        assert stats.kstest(first[:, place], "uniform").pvalue > 1e-3
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert stats.kstest((first[:, b] - first[:, a]) % 1, "uniform").pvalue > 1e-3
    order = random.permutation(keys[0], n).numpy()
    assert (order == np.arange(n)).sum() <= 10  # fixed points: Poisson of mean 1, P(> 10) = 10^-8
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 5 / np.sqrt(n)
    assert stats.kstest(np.diff(order) % n / n, "uniform").pvalue > 1e-3
    odd = order & 1
    assert abs((odd[1:] ^ odd[:-1]).mean() - 0.5) < 5 * 0.5 / np.sqrt(n)


# --- independence of keys ---------------------------------------------------------------------------


def test_keys_of_different_purposes_differ():
    grid = [(s, r, c, x) for s in range(6) for r in range(6) for c in range(-1, 6) for x in ("", "a", "b")]
    assert len({random.key(*entry) for entry in grid}) == len(grid)


@pytest.mark.parametrize("axis", ["seed", "round", "client", "stream"])
def test_neighbouring_keys_are_independent(axis):
    """Streams of neighbours share no word (SplitMix64's streams overlap when keys differ by a few
    multiples of its increment) and are uncorrelated."""
    n = 20_000
    kinds = {"seed": int, "round": int, "client": int, "stream": str}
    keys = [random.key(**{"seed": 0, axis: kinds[axis](i)}) for i in range(8)]
    assert len({w for key in keys for w in random.bits(key, n).tolist()}) == len(keys) * n
    z = torch.stack([random.normal(key, n) for key in keys]).double().numpy()
    correlation = np.corrcoef(z) - np.eye(len(keys))
    assert np.abs(correlation).max() < 5 / np.sqrt(n)
    lagged = [np.corrcoef(a[1:], b[:-1])[0, 1] for a in z for b in z]
    assert np.abs(lagged).max() < 5 / np.sqrt(n)


def test_first_words_over_clients_are_uniform():
    """One value a client, as in drawing a subspace or a coin a client."""
    keys = random.keys(17, 3, torch.arange(100_000), "draw")
    u = random.uniform(keys, 1)[:, 0].double().numpy()
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.kstest((u[1:] - u[:-1]) % 1, "uniform").pvalue > 1e-3
    assert abs(random.coins(keys, 1).double().mean() - 0.5) < 5 * 0.5 / np.sqrt(len(keys))
