"""How the training samples are given to clients: every sample to exactly one client.

A partition is made from one owner a sample, so it takes O(samples + clients) memory and a few sorts, for a
million clients too. All decisions that are stored are integers.

Shape suffixes: N samples, C clients, n labels of a client, S slots (a label at a client: S = C · n).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from fedmpi import own, random
from fedmpi.errors import ConfigError
from fedmpi.tasks import Options, choose
from fedmpi.tasks.dataset import Split
from fedmpi.tasks.own_partition import owners
from fedmpi.validation import checked


class Partition(NamedTuple):
    index_N: Tensor  # int64, the samples grouped by client, in random order inside a client
    offset: Tensor  # int64 (clients + 1,): client c has index_N[offset[c] : offset[c + 1]]

    def of(self, client: int) -> Tensor:
        """The samples of ``client``: int64, a view. IndexError for a client that is not there."""
        if not 0 <= client < self.clients:
            raise IndexError(f"client: expected 0 to {self.clients - 1}, got {client}")
        return self.index_N[int(self.offset[client]) : int(self.offset[client + 1])]

    def rows(self, clients_C: Tensor) -> Tensor:
        """The samples of several clients, int64 ``(C, the largest's)``; a smaller one's row ends with its last sample
        again and again."""
        sizes_C = self.sizes_of(clients_C)
        place_CN = torch.arange(int(sizes_C.max())).expand(len(clients_C), -1)
        return self.index_N[self.offset[clients_C][:, None] + torch.minimum(place_CN, sizes_C[:, None] - 1)]

    def sizes_of(self, clients_C: Tensor) -> Tensor:
        """Samples of these clients, int64 ``(C,)``."""
        return self.offset[clients_C + 1] - self.offset[clients_C]

    @property
    def sizes(self) -> Tensor:
        """Samples of each client, int64 ``(clients,)``."""
        return self.offset.diff()

    @property
    def clients(self) -> int:
        return len(self.offset) - 1


class PartitionOptions(Options):
    seed: NonNegativeInt | None = Field(
        None, lt=2**63, description="of who holds what, apart from the run's (default: the run's)"
    )


class IidOptions(PartitionOptions):
    """No more."""


class LabelsOptions(PartitionOptions):
    labels_per_client: PositiveInt = Field(
        3, description="every client holds samples of exactly so many labels"
    )


class DirichletOptions(PartitionOptions):
    alpha: float = Field(0.5, ge=1e-6, le=1e6, description="the smaller, the fewer labels a client holds")
    minimum: NonNegativeInt = Field(
        1, description="samples that every client holds at least; a client with 0 never sends a message"
    )


class NaturalOptions(PartitionOptions):
    """No more."""


class PowerOptions(PartitionOptions):
    exponent: float = Field(
        1.0, ge=0, le=8, description="the i-th largest client's size is in proportion to i to minus this"
    )
    minimum: PositiveInt = Field(1, description="samples that every client holds at least")


def split(
    name: str, labels_N: Tensor, clients: int, key: int, groups_N: Tensor | None = None, **options: object
) -> Partition:
    """The partition ``name`` of samples with labels ``labels_N`` (int64) among ``clients``.

    Args:
      name: a row of :data:`PARTITIONS`.
      labels_N: one label a sample; where it is no label (values, pixels, tokens), only its length counts.
      clients: how many, 1 to N.
      key: an integer of :func:`fedmpi.random.key`.
      groups_N: int64, whose sample each is, if the data say so.
      options: fields of the row's options.

    Raises:
      ConfigError: an unknown name or option, or a request that cannot be met; names the argument.
    """
    row = choose("partition", name, PARTITIONS)
    given = checked(row.options, options, f"partition {name}")
    if not 1 <= clients <= len(labels_N):
        raise ConfigError(
            f"partition {name}: clients: expected 1 to {len(labels_N)} (the samples), got {clients}"
        )
    others = ", ".join(other for other, kind in PARTITIONS.items() if kind.needs == "nothing")
    if row.needs == "labels" and (labels_N.dim() != 1 or labels_N.dtype != torch.int64):
        raise ConfigError(
            f"partition {name}: expected data with a class a sample, got other targets; for any data: {others}"
        )
    if row.needs == "groups":
        if groups_N is None:
            raise ConfigError(
                f"partition {name}: expected data that say whose each sample is, got some that do not; for any "
                f"data: {others}"
            )
        labels_N = groups_N
    return row.split(labels_N, clients, key, given)


def divide(name: str, train: Split, clients: int, seed: int, /, **options: object) -> Partition:
    """The partition of a run with this seed: :func:`split` of its training set, or your own.

    Args:
      name: a row of :data:`PARTITIONS`, or the import path of your own ``divide(targets, clients, seed, groups,
        **options)``, which returns the client of each sample, ``(N,)``.
      seed: the run's; the option ``seed`` goes before it.
    """
    chosen = checked(PartitionOptions, {"seed": options.get("seed")}, "partition").seed
    seed = seed if chosen is None else chosen
    key = random.key(seed, stream="partition")
    if own.is_path(name):
        given = {key: value for key, value in options.items() if key != "seed"}
        return _group(owners(name, train, clients, seed, given), clients, key)
    return split(name, train.y, clients, key, train.groups, **options)


def iid(labels_N: Tensor, clients: int, key: int, options: IidOptions) -> Partition:
    """A random partition whose sizes differ by at most one."""
    order_N = _shuffled(key, len(labels_N), "order")
    return Partition(order_N, _cuts(len(labels_N), clients))


def labels(labels_N: Tensor, clients: int, key: int, options: LabelsOptions) -> Partition:
    """Every client holds samples of exactly ``labels_per_client`` labels; which ones is random.

    The clients · labels_per_client slots go to the labels in proportion to their samples (Webster's
    method, at least one a label, at most one a client), and a label's samples are shared among its
    slots with a difference of at most one. So sizes are equal where proportions come out even, and near
    N / clients elsewhere. The shards of McMahan et al. ("Communication-efficient learning of deep
    networks from decentralized data", AISTATS 2017) give "at most", not "exactly": a client's shards can
    be of one label.
    """
    n = options.labels_per_client
    by_label_N, values, counts = _by_label(labels_N, key)
    if n > len(values):
        raise ConfigError(
            f"partition labels: labels_per_client: expected at most {len(values)} (labels in use), got {n}"
        )
    holders = _holders(values, counts, clients, n)
    label_Cn = _deal(holders, clients, n, key)
    slots_S = label_Cn.flatten().argsort(stable=True)  # the slots of each label together
    sizes, owners = torch.zeros(clients, dtype=torch.int64), []
    for mine, count in zip((slots_S // n).split_with_sizes(holders), counts, strict=True):
        share = torch.full_like(mine, count // len(mine))
        share[sizes[mine].argsort(stable=True)[: count % len(mine)]] += 1  # odd samples: who has least
        sizes[mine] += share
        owners.append(mine.repeat_interleave(share))
    owner_N = torch.empty_like(by_label_N)
    owner_N[by_label_N] = torch.cat(owners)
    return _group(owner_N, clients, key)


def dirichlet(labels_N: Tensor, clients: int, key: int, options: DirichletOptions) -> Partition:
    """Every label is divided among the clients in proportions drawn from Dirichlet(alpha, …, alpha).

    So clients differ in their labels and in their size (Yurochkin et al., "Bayesian nonparametric
    federated learning of neural networks", ICML 2019). Instead of drawing again until all are large
    enough, which never ends with many clients, those with fewer than ``minimum`` samples are filled up
    with random samples of the largest.
    """
    n, samples = options.minimum, len(labels_N)
    if n * clients > samples:
        raise ConfigError(
            f"partition dirichlet: minimum: expected at most {samples // clients} "
            f"({samples} samples for {clients} clients), got {n}"
        )
    by_label_N, values, counts = _by_label(labels_N, key)
    # Fixed point keeps a last bit of log or exp from moving a cut: 2^bits · clients · samples < 2^62.
    bits = min(30, 62 - clients.bit_length() - samples.bit_length())
    owners = []
    for value, count in zip(values, counts, strict=True):
        log_C = _log_gamma(random.key(key, stream=f"gamma {value}"), clients, options.alpha)
        weight_C = ((log_C - log_C.max()).exp() * 2**bits).round().long()
        cut_C = weight_C.cumsum(0) * count // weight_C.sum()
        share_C = cut_C.diff(prepend=cut_C.new_zeros(1))
        owners.append(torch.arange(clients).repeat_interleave(share_C))
    owner_N = torch.empty_like(by_label_N)
    owner_N[by_label_N] = torch.cat(owners)
    return _group(_fill_up(owner_N, clients, n, key), clients, key)


def natural(groups_N: Tensor, clients: int, key: int, options: NaturalOptions) -> Partition:
    """Everybody's samples stay together. With as many clients as groups each client is one; with fewer, random
    groups share a client, in numbers that differ by at most one."""
    values, group_N = groups_N.unique(return_inverse=True)
    if clients > len(values):
        raise ConfigError(
            f"partition natural: clients: expected at most {len(values)} (as many as the data name), got {clients}"
        )
    owner = _shuffled(key, len(values), "groups") % clients
    return _group(owner[group_N], clients, key)


def power(labels_N: Tensor, clients: int, key: int, options: PowerOptions) -> Partition:
    """Random samples, and sizes by a power law (Zipf's), dealt to the clients at random."""
    n, samples = options.minimum, len(labels_N)
    if n * clients > samples:
        raise ConfigError(
            f"partition power: minimum: expected at most {samples // clients} "
            f"({samples} samples for {clients} clients), got {n}"
        )
    # Fixed point, as in dirichlet().
    bits = min(30, 62 - clients.bit_length() - samples.bit_length())
    weight_C = (torch.arange(1, clients + 1).double() ** -options.exponent * 2**bits).round().long()
    weight_C = weight_C[_shuffled(key, clients, "sizes")]
    cut_C = weight_C.cumsum(0) * (samples - n * clients) // weight_C.sum()
    size_C = cut_C.diff(prepend=cut_C.new_zeros(1)) + n
    offset = torch.cat((size_C.new_zeros(1), size_C.cumsum(0)))
    return Partition(_shuffled(key, samples, "order"), offset)


class PartitionKind(NamedTuple):
    options: type[Options]
    split: Callable[[Tensor, int, int, Any], Partition]  # (labels_N or groups_N, clients, key, options)
    summary: str
    needs: Literal["nothing", "labels", "groups"]


PARTITIONS: dict[str, PartitionKind] = {
    "iid": PartitionKind(IidOptions, iid, "random, equal sizes", "nothing"),
    "labels": PartitionKind(LabelsOptions, labels, "a fixed number of labels a client", "labels"),
    "dirichlet": PartitionKind(
        DirichletOptions, dirichlet, "label proportions from a Dirichlet distribution", "labels"
    ),
    "natural": PartitionKind(NaturalOptions, natural, "as the data say: by writer, person, …", "groups"),
    "power": PartitionKind(PowerOptions, power, "random, sizes by a power law", "nothing"),
}


def _shuffled(key: int, samples: int, stream: str) -> Tensor:
    return random.permutation(random.key(key, stream=stream), samples)


def _cuts(total: int, parts: int) -> Tensor:
    """Where to cut ``total`` into ``parts`` that differ by at most one, int64 ``(parts + 1,)``."""
    return torch.arange(parts + 1) * total // parts


def _group(owner_N: Tensor, clients: int, key: int) -> Partition:
    order_N = _shuffled(key, len(owner_N), "order")
    index_N = order_N[owner_N[order_N].argsort(stable=True)]
    sizes = owner_N.bincount(minlength=clients)
    return Partition(index_N, torch.cat((sizes.new_zeros(1), sizes.cumsum(0))))


def _by_label(labels_N: Tensor, key: int) -> tuple[Tensor, list[int], list[int]]:
    """The samples in random order, sorted by label; the labels that occur; how often each does."""
    # Not the order of _group: a client's part of a label would then come early or late as a whole.
    order_N = _shuffled(key, len(labels_N), "shares")
    values, counts = torch.unique(labels_N, return_counts=True)
    return order_N[labels_N[order_N].argsort(stable=True)], values.tolist(), counts.tolist()


def _holders(values: list[int], counts: list[int], clients: int, n: int) -> list[int]:
    """How many clients hold each label: sums to clients · n, in proportion to the label's samples."""
    slots, samples = clients * n, sum(counts)
    most = [min(count, clients) for count in counts]
    if slots < len(values):
        raise ConfigError(
            f"partition labels: clients: {clients} with labels_per_client = {n} hold at most {slots} labels, "
            f"expected all {len(values)} in the data to be held"
        )
    if slots > sum(most):
        scarce = {value: count for value, count in zip(values, counts, strict=True) if count < clients}
        raise ConfigError(
            f"partition labels: labels_per_client: {n} for {clients} clients needs {slots} holders, the data "
            f"allow {sum(most)}; labels with fewer samples than clients (label: samples): {scarce}"
        )

    def holders(divisor: int) -> list[int]:  # grows with the divisor by at most one a label and step
        rounded = ((2 * divisor * count + samples) // (2 * samples) for count in counts)
        return [min(max(1, r), m) for r, m in zip(rounded, most, strict=True)]

    low, high = 0, samples * clients
    while high - low > 1:  # the largest divisor that gives out no slot too many
        middle = (low + high) // 2
        low, high = (middle, high) if sum(holders(middle)) <= slots else (low, middle)
    found = holders(low)
    growing = [i for i, more in enumerate(holders(high)) if more > found[i]]
    for i in growing[: slots - sum(found)]:
        found[i] += 1
    return found


def _deal(holders: list[int], clients: int, n: int, key: int) -> Tensor:
    """Which labels each client holds, int64 ``(C, n)``, none twice: a random way to meet ``holders``.

    Slots sorted by label and dealt in turn meet it, since no label has more slots than there are
    clients. Then random pairs of clients trade labels where neither would hold one twice, often
    enough that which labels meet is as good as independent (tests/test_partitions.py). With more than
    half of the labels a client, few trades would be possible: then what a client lacks is dealt.
    """
    if 2 * n > len(holders):
        lacking_Cn = _deal([clients - h for h in holders], clients, len(holders) - n, key)
        held = torch.ones(clients, len(holders), dtype=torch.bool).scatter_(1, lacking_Cn, False)
        return held.nonzero()[:, 1].view(clients, n)
    slot_S = torch.arange(len(holders)).repeat_interleave(torch.tensor(holders))
    label_Cn = slot_S.view(n, clients).T[random.permutation(random.key(key, stream="deal"), clients)]
    half = torch.arange(clients // 2)
    for trade in range(6 * n):
        middle = int(random.integers(random.key(key, trade, stream="pairs"), 1, clients))
        a, b = (middle + 1 + half) % clients, (middle - half) % clients  # mirror images: pairs without a sort
        i, j = (random.integers(random.key(key, trade, stream=s), len(half), n) for s in ("give", "take"))
        give, take = label_Cn[a, i], label_Cn[b, j]
        fair = (label_Cn[a] != take[:, None]).all(1) & (label_Cn[b] != give[:, None]).all(1)
        label_Cn[a[fair], i[fair]] = take[fair]
        label_Cn[b[fair], j[fair]] = give[fair]
    return label_Cn


def _log_gamma(key: int, n: int, alpha: float) -> Tensor:
    """Logarithms of ``n`` independent Gamma(alpha, 1) variates, float64 ``(n,)``.

    Marsaglia and Tsang, "A simple method for generating gamma variables", ACM TOMS 26(3), 2000, for
    alpha + 1 and then boosted, G(alpha) = G(alpha + 1) · U^(1/alpha), as a logarithm because small
    alphas underflow. Each variate has words of its own, whatever the others' rejections.
    """

    def uniform(indices: Tensor, attempt: int, stream: str) -> Tensor:  # inside (0, 1)
        return random.uniform(random.keys(key, attempt, indices, stream), 1)[:, 0].double() + 2.0**-25

    everyone = torch.arange(n)
    d = alpha + 1 - 1 / 3
    cube = torch.empty(n, dtype=torch.float64)
    pending, attempt = everyone, 0
    while len(pending):
        x = random.normal(random.keys(key, attempt, pending, "normal"), 1)[:, 0].double()
        v = (1 + x / (9 * d) ** 0.5).clamp(min=0) ** 3
        accepted = uniform(pending, attempt, "accept").log() < x * x / 2 + d * (
            1 - v + v.log()
        )  # never at v = 0
        cube[pending[accepted]] = v[accepted]
        pending, attempt = pending[~accepted], attempt + 1
    return (d * cube).log() + uniform(everyone, 0, "boost").log() / alpha


def _fill_up(owner_N: Tensor, clients: int, minimum: int, key: int) -> Tensor:
    """The owners after clients below ``minimum`` samples got random ones of the largest clients."""
    sizes = owner_N.bincount(minlength=clients)
    short = (minimum - sizes).clamp(min=0)
    missing = int(short.sum())
    if not missing:
        return owner_N
    low, high = minimum, int(sizes.max())
    while high - low > 1:  # the highest level above which there are samples enough
        level = (low + high) // 2
        low, high = (level, high) if int((sizes - level).clamp(min=0).sum()) >= missing else (low, level)
    keep = sizes.clamp(max=low)
    above = (sizes > low).nonzero()[:, 0]
    keep[above[: int((sizes - keep).sum()) - missing]] += 1
    index_N, offset = _group(owner_N, clients, key)
    rank_N = torch.arange(len(index_N)) - offset[:-1].repeat_interleave(sizes)
    pool = index_N[rank_N >= keep.repeat_interleave(sizes)]
    owner_N[pool] = torch.arange(clients).repeat_interleave(short)
    return owner_N
