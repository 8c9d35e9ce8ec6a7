"""Partitions: every sample once, exact labels, sizes, proportions, requests that cannot be met."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from fedmpi import random
from fedmpi.errors import ConfigError
from fedmpi.tasks.partitions import PARTITIONS, Partition, _deal, _holders, _log_gamma, split

KEY = random.key(3, stream="partition")


def divide(name: str, labels_N: torch.Tensor, clients: int, key: int, **options: object) -> Partition:
    """``split``, of data that say whose each sample is: writers in runs, more of them than clients."""
    writers_N = torch.arange(len(labels_N)) * (clients + 3) // len(labels_N)
    return split(name, labels_N, clients, key, writers_N, **options)


label_lists = st.lists(st.integers(0, 6), min_size=1, max_size=120).map(torch.tensor)
keys = st.integers(-(1 << 63), (1 << 63) - 1)


def assert_partition(partition: Partition, samples: int, clients: int) -> None:
    """Every sample exactly once, every client at least one, and offsets that say the same."""
    assert partition.clients == clients
    assert partition.offset[0] == 0
    assert partition.offset[-1] == samples
    assert partition.index_N.sort().values.equal(torch.arange(samples))
    assert partition.index_N.dtype == partition.offset.dtype == torch.int64
    assert partition.sizes.min() >= 1
    assert partition.sizes.tolist() == [len(partition.of(c)) for c in range(clients)]


def label_counts(partition: Partition, labels_N: Tensor) -> Tensor:
    """Samples of each label at each client, ``(clients, labels)``."""
    owner = torch.arange(partition.clients).repeat_interleave(partition.sizes)
    table = torch.zeros(partition.clients, int(labels_N.max()) + 1, dtype=torch.int64)
    return table.index_put_((owner, labels_N[partition.index_N]), torch.tensor(1), accumulate=True)


@settings(deadline=None)
@given(labels_N=label_lists, key=keys, data=st.data())
def test_iid(labels_N: Tensor, key: int, data: st.DataObject) -> None:
    clients = data.draw(st.integers(1, len(labels_N)))
    partition = split("iid", labels_N, clients, key)
    assert_partition(partition, len(labels_N), clients)
    assert partition.sizes.max() - partition.sizes.min() <= 1


@settings(deadline=None)
@given(labels_N=label_lists, n=st.integers(1, 7), key=keys, data=st.data())
def test_labels(labels_N: Tensor, n: int, key: int, data: st.DataObject) -> None:
    """Exactly n labels a client whenever that is possible at all, ConfigError otherwise."""
    clients = data.draw(st.integers(1, len(labels_N)))
    count_L = labels_N.bincount()
    count_L = count_L[count_L > 0]
    # Gale and Ryser: such a table of labels and clients exists iff these three hold.
    possible = n <= len(count_L) <= clients * n <= int(count_L.clamp(max=clients).sum())
    if not possible:
        with pytest.raises(ConfigError, match=r"partition labels: (clients|labels_per_client): "):
            split("labels", labels_N, clients, key, labels_per_client=n)
        return
    partition = split("labels", labels_N, clients, key, labels_per_client=n)
    assert_partition(partition, len(labels_N), clients)
    table = label_counts(partition, labels_N)
    assert (table > 0).sum(1).tolist() == [n] * clients
    for column in table.T:
        held = column[column > 0]
        assert not len(held) or held.max() - held.min() <= 1


@settings(deadline=None)
@given(labels_N=label_lists, alpha=st.sampled_from([1e-6, 0.01, 0.5, 1, 30.0, 1e6]), key=keys, data=st.data())
def test_dirichlet(labels_N: Tensor, alpha: float, key: int, data: st.DataObject) -> None:
    clients = data.draw(st.integers(1, len(labels_N)))
    minimum = data.draw(st.integers(1, len(labels_N) // clients))
    partition = split("dirichlet", labels_N, clients, key, alpha=alpha, minimum=minimum)
    assert_partition(partition, len(labels_N), clients)
    assert partition.sizes.min() >= minimum


@pytest.mark.parametrize("name", PARTITIONS)
def test_a_partition_is_a_function_of_its_key(name: str) -> None:
    labels_N = torch.arange(600) % 10
    first, again, other = (divide(name, labels_N, 20, key) for key in (KEY, KEY, KEY + 1))
    assert first.index_N.equal(again.index_N)
    assert first.offset.equal(again.offset)
    assert not first.index_N.equal(other.index_N)


@pytest.mark.parametrize("name", PARTITIONS)
def test_golden(name: str) -> None:
    """The same split on any machine and in any later version."""
    partition = divide(name, torch.arange(200) % 10, 20, KEY)
    assert [*partition.sizes[:5].tolist(), *partition.of(0)[:5].tolist()] == GOLDEN[name]


GOLDEN = {  # the first five sizes and the first client's first five samples
    "iid": [10, 10, 10, 10, 10, 71, 59, 86, 37, 27],
    "labels": [11, 10, 10, 10, 10, 26, 46, 106, 85, 8],
    "dirichlet": [2, 3, 8, 16, 11, 169, 79],
    "natural": [17, 17, 18, 9, 9, 186, 115, 114, 120, 185],
    "power": [4, 7, 5, 11, 5, 71, 59, 86, 37],
}


@pytest.mark.parametrize("name", PARTITIONS)
def test_samples_are_in_random_order_inside_a_client(name: str) -> None:
    """Neither by label nor by number: a client's first batch is like any other."""
    labels_N = torch.arange(6000) % 10
    options = (
        {"labels_per_client": 10} if name == "labels" else {"alpha": 50.0} if name == "dirichlet" else {}
    )
    mine = divide(name, labels_N, 3, KEY, **options).of(1)
    half = len(mine) // 2
    assert len(labels_N[mine[:100]].unique()) == 10
    assert abs(mine[:half].double().mean() - mine[half:].double().mean()) < 5 * 6000 / (3 * half) ** 0.5


def test_equal_labels_give_equal_sizes() -> None:
    """LBGM's setting: 60,000 samples, 100 clients, 3 labels each."""
    labels_N = torch.arange(60_000) % 10
    partition = split("labels", labels_N, 100, KEY, labels_per_client=3)
    assert partition.sizes.tolist() == [600] * 100
    assert sorted(label_counts(partition, labels_N).unique().tolist()) == [0, 200]


def test_unequal_labels_get_holders_in_proportion() -> None:
    assert _holders([0, 1, 2], [600, 300, 100], 100, 1) == [60, 30, 10]
    assert _holders([0, 1, 2], [997, 2, 1], 10, 1) == [8, 1, 1]
    assert _holders([0, 1], [10, 2], 6, 1) == [5, 1]
    assert _holders([0, 1, 2], [900, 50, 50], 10, 2) == [10, 5, 5]


@pytest.mark.parametrize(("n", "clients"), [(2, 100), (3, 100), (5, 100), (8, 100)])
def test_which_labels_meet_is_independent(n: int, clients: int) -> None:
    """Over 60 deals all pairs of 10 labels meet equally often: χ² below its 1 − 10⁻⁶ quantile.

    The counts are less spread than Poisson's (n labels a client are fixed), so the test is conservative.
    The same for label and client: no client number prefers a label.
    """
    meet, mine = torch.zeros(10, 10), torch.zeros(clients, 10)
    for k in range(60):
        table = torch.zeros(clients, 10).scatter_(
            1, _deal([n * clients // 10] * 10, clients, n, random.key(k)), 1
        )
        assert table.sum(1).eq(n).all()
        assert table.sum(0).eq(n * clients // 10).all()
        # For n > 5 pairs that a client lacks: there the few events are.
        rare = table if n <= 5 else 1 - table
        meet, mine = meet + rare.T @ rare, mine + rare
    pairs = meet[torch.triu(torch.ones(10, 10), 1).bool()]
    for counts in (pairs, mine.flatten()):
        chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
        assert stats.chi2.sf(chi2, len(counts) - 1) > 1e-6


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0, 7.5, 1e4])
def test_gamma_variates(alpha: float) -> None:
    """Kolmogorov and Smirnov against scipy, 20,000 variates, p > 10⁻⁴."""
    log_g = _log_gamma(random.key(11), 20_000, alpha)
    log_cdf = stats.loggamma(alpha).cdf(log_g.numpy())
    assert stats.kstest(log_cdf, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
def test_dirichlet_proportions(alpha: float) -> None:
    """A label's share at a client has mean 1/C and variance (C − 1) / (C²(αC + 1))."""
    clients, labels_N = 10, torch.arange(200_000) % 200
    table = label_counts(split("dirichlet", labels_N, clients, KEY, alpha=alpha), labels_N)
    assert table.sum(0).eq(1000).all()
    share = table.double() / 1000
    variance = (clients - 1) / (clients**2 * (alpha * clients + 1))
    assert share.var(correction=0).item() == pytest.approx(variance, rel=0.1)
    assert (share.mean(1) - 0.1).abs().max() < 5 * (variance / 200) ** 0.5


def test_filling_up_takes_from_the_largest_only() -> None:
    """With α → 0 a label goes to one client; all others are filled up to the minimum, nobody below it."""
    labels_N = torch.arange(1000) % 2
    sizes = split("dirichlet", labels_N, 100, KEY, alpha=1e-6, minimum=3).sizes.sort().values
    assert sizes[:98].tolist() == [3] * 98
    assert sizes[98:].sum() == 1000 - 98 * 3
    assert sizes[99] - sizes[98] <= 1


@pytest.mark.parametrize(
    ("name", "clients", "options", "message"),
    [
        ("idd", 5, {}, r"unknown partition 'idd'; did you mean 'iid'\? valid: iid, labels, dirichlet"),
        ("iid", 41, {}, r"clients: expected 1 to 40 \(the samples\), got 41"),
        ("iid", 0, {}, r"clients: expected 1 to 40 \(the samples\), got 0"),
        ("iid", 5, {"alpha": 1}, r"partition iid\.alpha: unknown key"),
        (
            "labels",
            5,
            {"labels_per_client": 5},
            r"labels_per_client: expected at most 4 \(labels in use\), got 5",
        ),
        ("labels", 5, {"labels_per_client": 0}, r"labels_per_client: .*greater than 0, got 0"),
        ("labels", 5, {"labels_per_client": 2.5}, r"labels_per_client: .*integer, got 2\.5"),
        (
            "labels",
            1,
            {"labels_per_client": 3},
            r"clients: 1 with labels_per_client = 3 hold at most 3 labels, expected all 4",
        ),
        (
            "labels",
            14,
            {"labels_per_client": 3},
            r"labels_per_client: 3 for 14 clients needs 42 holders, the data allow 40",
        ),
        ("dirichlet", 5, {"alpha": 0}, r"alpha: .*, got 0"),
        ("dirichlet", 5, {"alpha": -1.0}, r"alpha: .*, got -1\.0"),
        ("dirichlet", 5, {"alpha": float("nan")}, r"alpha: .*, got nan"),
        ("dirichlet", 5, {"alpha": float("inf")}, r"alpha: .*, got inf"),
        ("dirichlet", 5, {"minimum": 9}, r"minimum: expected at most 8 \(40 samples for 5 clients\), got 9"),
        (
            "dirichlet",
            5,
            {"alhpa": 1},
            r"partition dirichlet\.alhpa: unknown key; did you mean 'alpha'\? valid: seed, alpha, minimum",
        ),
    ],
)
def test_what_cannot_be_met_is_named(name: str, clients: int, options: dict[str, Any], message: str) -> None:
    labels_N = torch.tensor([0] * 12 + [1] * 12 + [2] * 12 + [3] * 4)
    with pytest.raises(ConfigError, match=message):
        split(name, labels_N, clients, KEY, **options)


def test_a_client_that_is_not_there() -> None:
    partition = split("iid", torch.zeros(10, dtype=torch.int64), 3, KEY)
    for client in (-1, 3):
        with pytest.raises(IndexError, match=f"expected 0 to 2, got {client}"):
            partition.of(client)


@pytest.mark.parametrize("name", PARTITIONS)
def test_many_clients(name: str) -> None:
    """Whatever needs clients · samples steps or bytes (here 10¹⁰) does not end."""
    labels_N = torch.arange(200_000) % 10
    partition = divide(name, labels_N, 50_000, KEY)
    assert partition.clients == 50_000
    assert partition.sizes.min() >= 1
    assert partition.index_N.sort().values.equal(torch.arange(200_000))
