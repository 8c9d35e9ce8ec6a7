"""Clients' own tests: before and after local steps, by hand; what each keeps of the model, in a file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedmpi import config
from fedmpi.analysis import clients
from fedmpi.analysis.report import report
from fedmpi.comm import solo
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import ConfigError, DataError

from . import nets
from .conftest import SMALL
from .interrupted import SAVED, only, outcome, train

NET = {"name": "tests.nets:build", "p": 0.0}
LAST = [{"match": "last.*", "travels": "local"}, {"match": "norm.running*", "travels": "local"}]
TEST = {"of": 0.25, "after": True}


def simulation(**changes: Any) -> Simulation:
    return Simulation(config.parse({**SMALL, "client_test": TEST, "evaluate_every": 1, **changes}), solo())


@pytest.mark.parametrize(
    "changes",
    [
        {"cohort": 6},
        {"local": {"lr": 0.01, "steps": 3, "batch": 8, "optimizer": "adamw", "keep": True}},
        {"model": NET, "parts": LAST, "local": {"lr": 0.05, "steps": 3, "batch": 8}},
        {"local": {"lr": 0.01, "steps": 3, "optimizer": "torch.optim:RMSprop"}},
    ],
    ids=["sgd", "kept memory", "parts of their own", "own optimizer"],
)
def test_after_local_steps_as_by_hand(changes: dict[str, Any]) -> None:
    """From what a client would send, and what it would keep."""
    made = simulation(**changes)
    for t in range(3):
        made.round(t)
    assert made.tested is not None
    assert made.held is not None
    assert made.tested.after is not None
    x_X, trainer, ids = made.replica.parameters(), made.trainer, torch.arange(6)
    before_of = {name: value.clone() for name, value in made.own.get(ids).items()}
    found: list[list[float]] = [[], []]
    for client in ids.tolist():
        kept = {name: value[client : client + 1] for name, value in before_of.items()}
        update = trainer.train(x_X, made.data.train, made.partition, torch.tensor([client]), 2, None, kept)
        rate = torch.ones_like(x_X)
        rate[: trainer.spec.size] = made.config.local.lr
        index = made.held.of(client)
        for of, x, own in (
            (found[0], x_X, kept),
            (found[1], x_X - rate * update.g_CD[0], update.kept),
        ):
            model = trainer.load(x, {name: value[0] for name, value in own.items()}).eval()
            with torch.no_grad():
                right = model(made.data.train.x[index]).argmax(1) == made.data.train.y[index]
            of.append(float(right.double().mean()))
    assert made.tested.before.tolist() == pytest.approx(found[0])
    assert made.tested.after.tolist() == pytest.approx(found[1])
    assert made.measures["client_accuracy"] == pytest.approx(sum(found[0]) / 6)
    assert made.measures["client_after_accuracy"] == pytest.approx(sum(found[1]) / 6)
    assert made.measures["client_after_worst"] == pytest.approx(min(found[1]))
    after = made.own.get(ids)
    assert all(torch.equal(value, before_of[name]) for name, value in after.items()), "a test changes nothing"


def test_the_same_at_any_number_of_ranks_and_what_clients_keep(tmp_path: Path) -> None:
    """Also after a resume; a client's row in place of the model's own values is that client's model."""
    values = {**SAVED, "model": {**NET, "p": 0.2}, "parts": LAST, "client_test": {**TEST, "save": True}}
    values |= {"clients": 9, "best": "client_after_worst"}
    train(values, tmp_path / "1")
    train(values, tmp_path / "3", ranks=3)
    assert outcome(tmp_path / "3") == outcome(tmp_path / "1")
    files = [(tmp_path / "1" / name).read_bytes() for name in ("clients.csv", "clients.safetensors")]
    only(tmp_path / "3", 3)
    train(values, tmp_path / "3", ranks=2, resume=True)
    for name, expected in zip(("clients.csv", "clients.safetensors"), files, strict=True):
        assert (tmp_path / "3" / name).read_bytes() == expected
    rows = list(csv.DictReader((tmp_path / "1" / "clients.csv").open()))
    assert [*rows[0]] == ["client", "samples", "accuracy", "after_accuracy"]
    summary = train(values, tmp_path / "again")
    mean = sum(float(row["after_accuracy"]) for row in rows) / len(rows)
    assert summary["client_after_accuracy"] == pytest.approx(mean)
    text = report([tmp_path / "1"], tmp_path / "report")
    assert f"{100 * mean:.2f} %" in text
    assert "mean after" in text
    assert (tmp_path / "report" / "clients.png").read_bytes().startswith(b"\x89PNG")
    assert "(clients.png)" in (tmp_path / "report" / "report.md").read_text()
    own, shared = (load_file(tmp_path / "1" / f"{name}.safetensors") for name in ("clients", "model"))
    ids = own.pop("clients").tolist()
    assert set(own) == {"last.weight", "last.bias", "norm.running_mean", "norm.running_var"}
    made = Simulation(config.parse(values), solo())
    for t in range(5):
        made.round(t)
    assert ids == made.own.known.tolist()
    model = nets.build((1, 8, 8), 10)
    for row, client in enumerate(ids):
        kept = {name: value[0] for name, value in made.own.get(torch.tensor([client])).items()}
        expected = made.trainer.load(made.replica.parameters(), kept).state_dict()
        model.load_state_dict({**shared, **{name: value[row] for name, value in own.items()}}, strict=True)
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_damaged_file_of_clients_is_named(tmp_path: Path) -> None:
    (tmp_path / "clients.csv").write_text("client,samples,auc\n0,5,0.75\n1,9,\n4,3,0.5\n")
    assert clients.load(tmp_path) == clients.Clients([0.5, 0.75], [])
    assert clients.load(tmp_path / "none") is None
    for text in ("", "a,b\n", "client,samples,auc\n0,5\n", "client,samples,auc\n0,5,x\n"):
        (tmp_path / "clients.csv").write_text(text)
        with pytest.raises(DataError, match=r"clients\.csv.*: expected"):
            clients.load(tmp_path)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ({"of": 0.2, "save": True}, r"client_test\.save: expected parts that clients keep"),
        ({"of": 0.0, "after": True}, "of: expected a share above 0, or groups, with after or save, got 0"),
        ({"share": 0.2}, "share"),
        (1.5, "client_test"),
        ("group", "client_test"),
    ],
)
def test_what_cannot_be_tested_is_named(test: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulation(client_test=test)
