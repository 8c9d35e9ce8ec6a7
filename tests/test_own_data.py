"""Data as people have them: arrays, other types, Datasets, tables; a part of them; who holds what, who is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedmpi import config
from fedmpi.cli import main
from fedmpi.comm import solo
from fedmpi.engine.clients import cohort
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import CommError, ConfigError, DataError
from fedmpi.tasks.data import DATA, load
from fedmpi.tasks.partitions import divide

from .conftest import SMALL, metrics, write_config
from .interrupted import SAVED, check_the_same, outcome, rounds_saved, train

MODULE = """
import threading
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from fedmpi.tasks.data import Data, Split

rng = np.random.default_rng(2)
x = rng.standard_normal((30, 2))
y, z = (x[:, 0] > 0).astype(np.int32), x[:, 1].copy()

class Pairs(Dataset):
    def __init__(self, n=20, noise=0.0, broken=None, ragged=None):
        self.n, self.noise, self.broken, self.ragged = n, noise, broken, ragged
    def __len__(self):
        return self.n
    def __getitem__(self, i):
        if i == self.broken:
            raise KeyError("no such file")
        width = 3 if i == self.ragged else 2
        return np.resize(x[i], width) + self.noise * float(torch.rand(())), int(y[i])

class Huge(Pairs):
    def __len__(self):
        return 1 << 50

class Stream(IterableDataset):
    def __iter__(self):
        return ((torch.from_numpy(x[i]), torch.tensor(y[i])) for i in range(20))

def frame(values):
    import pandas
    return pandas.DataFrame(values)

def load(folder, kind="arrays"):
    test = (x[20:], y[20:])
    return {
        "arrays": lambda: ((x[:20], y[:20]), test),
        "splits": lambda: Data("mine", Split(x[:20], y[:20], np.arange(20, dtype=np.uint16) // 5), Split(*test), 2),
        "floats": lambda: ((x[:20].astype(np.float16), x[:20, 1]), (x[20:].astype(np.float16), x[20:, 1])),
        "lists": lambda: ((x[:20].tolist(), y[:20].tolist()), (x[20:].tolist(), y[20:].tolist())),
        "frames": lambda: ((frame(x[:20]), frame(y[:20])[0]), (frame(x[20:]), frame(y[20:])[0])),
        "column": lambda: ((x[:20], z[:20, None]), (x[20:], z[20:, None])),
        "labels": lambda: ((x[:20], x[:20] > 0), (x[20:], x[20:] > 0)),
        "dataset": lambda: (Pairs(), Pairs(10)),
        "stream": lambda: (Stream(), Pairs(10)),
        "noisy": lambda: (Pairs(noise=1.0), Pairs(10)),
        "broken": lambda: (Pairs(broken=7), Pairs(10)),
        "ragged": lambda: (Pairs(ragged=7), Pairs(10)),
        "huge": lambda: (Huge(), Pairs(10)),
        "single": lambda: (TensorDataset(torch.ones(5, 2)), Pairs(10)),
        "overflow": lambda: ((1e300 * x[:20], y[:20]), test),
    }[kind]()

def taken(folder, limit=None):
    return (x[:limit or 9], y[:limit or 9]), (x[20:], y[20:])

def none(folder, **rest):
    return (x[:20], y[:20]), (x[20:], y[20:])

def divide(targets, clients, seed, groups, step=1):
    return (np.arange(len(targets)) * step + seed) % clients

def large(round, clients, cohort, sizes, seed, least=1):
    # Random ones of those that hold enough.
    return np.random.permutation(np.flatnonzero(sizes.numpy() >= least))[:cohort]

calls, idents = [], {}

def turns(round, clients, cohort, sizes, seed):
    calls.append(round)
    return [len(calls) % clients]

def apart(round, clients, cohort, sizes, seed):
    # Another client on each rank (which are threads here), once the run has begun.
    return [0] if round == 0 else [idents.setdefault(threading.get_ident(), len(idents))]

def odd(round, clients, cohort, sizes, seed, kind="twice"):
    return {"twice": [1, 1], "beyond": [clients], "halves": [0.5], "word": "ab", "none": None}[kind]

def beyond(targets, clients, seed, groups):
    return torch.full((len(targets),), clients)

def halves(targets, clients, seed, groups):
    return torch.zeros(len(targets))
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine_of_data.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield "mine_of_data"


def arrays(mine: str) -> Any:
    return __import__(mine)


@pytest.mark.parametrize(
    ("kind", "notes"),
    [
        (
            "arrays",
            [
                "train.x converted from float64 to float32",
                "train.y converted from int32 to int64",
                "2 classes",
            ],
        ),
        ("splits", ["train.groups converted from uint16 to int64"]),
        ("floats", ["train.x converted from float16 to float32", "1 values a sample"]),
        ("dataset", ["train.x converted from float64", "2 classes"]),
        ("lists", ["train.x converted from float64", "2 classes"]),
        ("frames", ["train.x converted from float64", "train.y converted from int32", "2 classes"]),
        ("stream", ["train.x converted from float64", "train.y converted from int32"]),
        ("noisy", ["train gives another sample 0 each time; each is read once"]),
    ],
)
def test_own_data_become_tensors_and_it_is_said(mine: str, kind: str, notes: list[str]) -> None:
    found, own = load(f"{mine}:load", kind=kind), arrays(mine)
    said = "\n".join(found.notes)
    assert [note for note in notes if note not in said] == []
    assert len(set(found.notes)) == len(found.notes)
    assert (found.train.x.dtype, found.test.x.dtype) == (torch.float32, torch.float32)
    x = torch.from_numpy(own.x)
    if kind == "floats":
        assert torch.equal(found.train.x, x[:20].half().float())
        assert torch.equal(found.train.y, x[:20, 1].float())
    elif kind != "noisy":
        assert torch.equal(found.train.x, x[:20].float())
        assert found.train.y.tolist() == own.y[:20].tolist()
        assert found.train.y.dtype == torch.int64
    assert found.classes == (1 if kind == "floats" else 2)
    if kind == "splits":
        assert found.train.groups is not None
        assert found.train.groups.tolist() == [i // 5 for i in range(20)]


@pytest.mark.parametrize(
    ("kind", "loss"),
    [("floats", "squared_error"), ("column", "squared_error"), ("labels", "binary_cross_entropy")],
)
def test_targets_of_values_and_of_several_labels_train(mine: str, kind: str, loss: str) -> None:
    """(N,), (N, 1) as slices of arrays have it, and whether each of several labels is so."""
    values = {**SMALL, "data": {"name": f"{mine}:load", "kind": kind}, "loss": loss, "partition": "iid"}
    sim = Simulation(config.parse({**values, "rounds": 20, "evaluate_every": 1}), solo())
    losses = []
    for t in range(20):
        sim.round(t)
        losses.append(sim.measures["test_loss"])
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            "broken",
            DataError,
            r"train: sample 7 cannot be read: KeyError: 'no such file' \(.*mine_of_data\.py:",
        ),
        (
            "ragged",
            DataError,
            r"train: sample 7: x: expected \(2,\) of torch.float64 as in sample 0, got \(3,\)",
        ),
        ("huge", DataError, r"train: expected a Dataset that fits into memory .* set limit"),
        ("single", DataError, r"train: sample 0: expected a pair \(x, y\), got a tuple"),
        ("overflow", DataError, r"train\.x: expected finite numbers"),
    ],
)
def test_own_data_that_cannot_be_read(mine: str, kind: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(f"{mine}:load", kind=kind)


def test_a_run_says_what_was_converted_once(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {**SMALL, "data": f"{mine}:load", "partition": "iid"}
    assert not main(
        ["train", write_config(tmp_path, values), "--local-ranks", "2", "--out", str(tmp_path / "run")]
    )
    assert capsys.readouterr().err.count("data: train.x converted from float64 to float32") == 1


def test_every_data_set_has_a_limit(mine: str) -> None:
    assert all("limit" in row.options.model_fields for row in DATA.values())
    whole, some = load("digits"), load("digits", limit=100)
    assert torch.equal(some.train.x, whole.train.x[:100])
    assert torch.equal(some.test.y, whole.test.y[:100])
    assert some.train.x.untyped_storage().nbytes() == some.train.x.nbytes, "not the whole in memory"
    assert len(load(f"{mine}:none", limit=5).train.y) == 5, "of an own one that has no such option"
    assert len(load(f"{mine}:taken", limit=12).train.y) == 12, "an own one's own option"
    assert len(load(f"{mine}:taken").train.y) == 9
    with pytest.raises(ConfigError, match=r"data\.limit: .*greater than 0"):
        load(f"{mine}:none", limit=0)


ROWS = """size,colour, rooms,price,sold,street
1.5,red,3,100.5,1,A
2.5,blue,2,90.25,0,A
3.5,red,1,80,1,B

4.5,green,3,120.75,0,"C, left"
5.5,blue,4,130,1,B
"""


def table(folder: Path, text: str = ROWS, **options: Any) -> Any:
    (folder / "houses.csv").write_text(text)
    given = {"file": "houses.csv", "target": "price", "categories": ["colour"], "group": "street"}
    return load("csv", folder=str(folder), **{**given, **options})


def test_a_table_becomes_inputs_and_targets(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text(
        "size,colour,rooms,price,sold,street\n9,red,1,7.5,1,Z\n8,black,2,8,0,A\n"
    )
    found = table(tmp_path, test="test.csv", inputs=["size", "colour", "rooms"])
    size, rooms = np.array([1.5, 2.5, 3.5, 4.5, 5.5]), np.array([3.0, 2, 1, 3, 4])
    blue, green, red = (
        [float(c == n) for c in ("red", "blue", "red", "green", "blue")] for n in ("blue", "green", "red")
    )
    columns = [(size - 3.5) / size.std(), blue, green, red, (rooms - rooms.mean()) / rooms.std()]
    np.testing.assert_allclose(found.train.x.numpy(), np.stack(columns, 1), rtol=1e-6)
    assert found.test.x[1, 1:4].tolist() == [0, 0, 0], "a colour that training has not"
    assert found.test.x[0, 0] == pytest.approx((9 - 3.5) / size.std())
    assert (found.train.y.tolist(), found.classes) == ([100.5, 90.25, 80, 120.75, 130], 1)
    assert found.train.groups.tolist() == [0, 0, 1, 2, 1]
    assert found.notes == ("data: price: 1 values",)


@pytest.mark.parametrize(
    ("options", "y", "classes"),
    [
        ({"target": "sold"}, [1, 0, 1, 0, 1], 2),
        ({"target": "colour", "categories": []}, [2, 0, 2, 1, 0], 3),
        ({"target": ["rooms", "price"]}, [[3, 100.5], [2, 90.25], [1, 80], [3, 120.75], [4, 130]], 2),
        ({"target": ["sold"], "kind": "labels"}, [[1], [0], [1], [0], [1]], 1),
        ({"target": "rooms", "kind": "values"}, [3, 2, 1, 3, 4], 1),
    ],
)
def test_targets_of_a_table(tmp_path: Path, options: dict[str, Any], y: list[Any], classes: int) -> None:
    inputs = {"inputs": ["size"], "categories": []}
    found = table(tmp_path, **{**inputs, **options, "test_share": 0.4})
    every = sorted([*found.train.y.tolist(), *found.test.y.tolist()], key=str)
    assert (every, found.classes) == (sorted(y, key=str), classes)
    assert (len(found.train.y), len(found.test.y)) == (3, 2)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            ROWS.replace("2.5", "many"),
            {},
            r"houses\.csv, row 3: size: expected a number in every row .*, got 'many'",
        ),
        (ROWS.replace("2.5", ""), {}, r"row 3: size: expected a number .*, got ''"),
        (ROWS.replace("2.5", "nan"), {}, r"row 3: size: expected a number .*, got 'nan'"),
        (ROWS.replace("90.25,0", "90.25"), {}, r"houses\.csv, row 3: expected 6 columns, got 5"),
        (ROWS, {"categories": []}, r"row 2: colour: expected a number .*data\.categories\), got 'red'"),
        (ROWS, {"target": "cost"}, r"data\.target: expected columns of size, colour, .*, got 'cost'"),
        (
            ROWS,
            {"target": ["sold", "rooms"], "kind": "classes"},
            "expected one column with kind: classes, got 2",
        ),
        (ROWS, {"test_share": 0.01}, r"data\.test_share: expected a share that leaves rows on both sides"),
        (ROWS, {"file": "flats.csv"}, r"csv: expected a file flats\.csv in .*; give data\.folder"),
        (ROWS.replace('"C, left"', '"C, left'), {}, r"houses\.csv: expected CSV"),
        ("size,size\n1,2\n", {}, "row 1: expected different names of columns"),
        ("size,price\n", {"target": "price"}, "expected samples below the names"),
    ],
)
def test_a_table_that_does_not_fit_is_named(
    tmp_path: Path, text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        table(tmp_path, text, **options)


def test_a_partition_has_a_seed_of_its_own() -> None:
    train_set = load("digits").train
    base = divide("dirichlet", train_set, 10, 1, alpha=0.5)
    for name, options in (("dirichlet", {"alpha": 0.5}), ("iid", {}), ("power", {}), ("labels", {})):
        one = divide(name, train_set, 10, 1, **options)
        assert torch.equal(divide(name, train_set, 10, 2, seed=1, **options).index_N, one.index_N)
        assert not torch.equal(divide(name, train_set, 10, 2, seed=0, **options).index_N, one.index_N)
        assert torch.equal(divide(name, train_set, 10, 1, seed=None, **options).index_N, one.index_N)
    parsed = [
        config.parse(
            {
                **SMALL,
                "partition": {"name": "dirichlet", "alpha": 0.5, "seed": 1},
                "clients": 10,
                "seed": seed,
            }
        )
        for seed in (4, 5)
    ]
    made = [Simulation(one, solo()) for one in parsed]
    assert all(torch.equal(m.partition.index_N, base.index_N) for m in made)
    assert not torch.equal(*(m.call(0).called for m in made))


def test_an_own_partition(mine: str) -> None:
    values = {
        **SMALL,
        "partition": {"name": f"{mine}:divide", "step": 2, "seed": 5},
        "clients": 4,
        "cohort": 2,
    }
    parsed = config.parse(values)
    assert config.parse(parsed.plain()) == parsed
    made = Simulation(parsed, solo())
    owners = (torch.arange(len(made.data.train.y)) * 2 + 5) % 4
    for client in range(4):
        assert set(owners[made.partition.of(client)].tolist()) <= {client}
    assert made.partition.sizes.tolist() == owners.bincount(minlength=4).tolist()
    assert made.partition.index_N.sort().values.tolist() == list(range(len(owners)))
    for name, message in (
        ("beyond", "expected clients from 0 to 3, got 4"),
        ("halves", r"returned shape \(\d+,\) of torch\.float32, expected divide\("),
        ("nothing", "partition.name: cannot import"),
    ):
        with pytest.raises(ConfigError, match=message):
            divide(f"{mine}:{name}", load("digits").train, 4, 0)


def test_poisson_sampling_calls_each_client_for_itself() -> None:
    values = {**SMALL, "sampling": "poisson", "clients": 40, "cohort": 10}
    parsed = config.parse(values)
    made = Simulation(parsed, solo())
    called = [cohort(parsed, made.partition, t) for t in range(400)]
    sizes = torch.tensor([len(c) for c in called])
    counts = torch.cat(called).bincount(minlength=40).double()
    assert sizes.unique().numel() > 8, "rounds of one size are no Poisson sampling"
    # Binomial(40, 1/4) by round, Binomial(400, 1/4) by client; the seed is fixed, so that this holds or does not.
    assert stats.chisquare([counts.sum(), 16000 - counts.sum()], [4000, 12000]).pvalue > 0.01
    assert float(counts.var()) == pytest.approx(400 * 3 / 16, rel=0.5)
    assert float(sizes.double().var()) == pytest.approx(40 * 3 / 16, rel=0.25)
    whole = config.parse({**values, "cohort": None})
    assert cohort(whole, made.partition, 3).tolist() == list(range(40))


def test_an_own_sampling(mine: str, tmp_path: Path) -> None:
    """Its draws are the round's, whoever draws: three ranks and a resume call the same clients."""
    sampling = {"name": f"{mine}:large", "least": 200}
    values = {**SAVED, "sampling": sampling, "checkpoint": {"rounds": 2, "keep": 9}, "cohort": 2}
    parsed = config.parse(values)
    assert parsed.plain()["sampling"] == sampling
    assert config.parse(parsed.plain()) == parsed
    made = Simulation(parsed, solo())
    called = [cohort(parsed, made.partition, t) for t in range(20)]
    assert all(int(made.partition.sizes_of(c).min()) >= 200 and len(c) == 2 for c in called)
    assert len({tuple(c.tolist()) for c in called}) > 1
    check_the_same(values, tmp_path)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ("turns", "turns gives another cohort when it is asked for round 0 again"),
        ({"kind": "twice"}, "odd: expected each client once, got 1 2 times"),
        ({"kind": "beyond"}, "odd: expected clients from 0 to 5, got 6"),
        ({"kind": "halves"}, r"odd returned shape \(1,\) of torch.float64, expected sample\(round"),
        ({"kind": "word"}, "odd returned a str, expected sample"),
        ({"kind": "none"}, "odd returned a NoneType, expected sample"),
        ({"kinds": "none"}, "does not take what it is given .*'kinds'"),
        ({"kind": "what"}, "odd failed: KeyError: 'what'"),
    ],
    ids=str,
)
def test_an_own_sampling_that_fails_is_named(mine: str, sampling: Any, message: str) -> None:
    sampling = f"{mine}:{sampling}" if isinstance(sampling, str) else {"name": f"{mine}:odd", **sampling}
    with pytest.raises(ConfigError, match=message):
        Simulation(config.parse({**SMALL, "sampling": sampling}), solo())


def test_ranks_that_sample_apart_end(mine: str, tmp_path: Path) -> None:
    with pytest.raises(CommError, match="ranks disagree on the clients of round 1: rank 0 has"):
        train({**SMALL, "sampling": f"{mine}:apart", "clients": 5}, tmp_path, ranks=2)


@pytest.mark.parametrize("method", ["signsgd", {"name": "lookback", "threshold": 0.5}])
def test_rounds_without_a_client_leave_the_model_and_resume(method: Any, tmp_path: Path) -> None:
    """A third of the rounds calls nobody; any round may call more than the cohort on average."""
    values = {**SAVED, "sampling": "poisson", "cohort": 1, "method": method, "rounds": 12}
    values["checkpoint"] = {"rounds": 1, "keep": 20}
    train(values, tmp_path)
    counts = [line["clients"] for line in metrics(tmp_path)]
    assert min(counts) == 0
    assert max(counts) > 1
    expected, kept = outcome(tmp_path), rounds_saved(tmp_path)
    assert kept == list(range(1, 13))
    for path in (tmp_path / "checkpoints").iterdir():
        if int(path.name[6:]) > counts.index(0) + 1:
            path.rename(tmp_path / path.name)
    train(values, tmp_path, ranks=2, resume=True)
    assert outcome(tmp_path) == expected
