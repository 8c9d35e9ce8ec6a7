"""Losses and metrics against scikit-learn and torch, of the table and by import path, at any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn
from torch import Tensor
from torch.nn import functional as F

from fedmpi import config, random
from fedmpi.cli import main
from fedmpi.comm import run_ranks, solo
from fedmpi.comm.base import Comm
from fedmpi.engine.draws import seed_all
from fedmpi.engine.rounds import Simulation
from fedmpi.errors import ConfigError, DataError, FedMPIError
from fedmpi.tasks import objectives
from fedmpi.tasks.dataset import IGNORE, Data, Split
from fedmpi.tasks.metrics import Tally, measures
from fedmpi.tasks.objectives import OBJECTIVES

from .conftest import SMALL, metrics, write_config

N, K, L = 60, 7, 4
RNG = np.random.default_rng(5)
X = torch.from_numpy(RNG.standard_normal((N, 3))).float()


def normal(*shape: int) -> Tensor:
    return torch.from_numpy(RNG.standard_normal(shape)).float()


def measured(loss: str, output: Tensor, y: Tensor, *names: str, classes: int = K) -> dict[str, Any]:
    """In batches of 16 samples, the last one smaller."""
    of = measures(OBJECTIVES[loss], Data("", Split(X, y), Split(X, y), classes), [(n, {}) for n in names])
    tally, batches = Tally(of, -(-len(y) // 16), len(y)), torch.arange(len(y)).split(16)
    for b, rows in enumerate(batches):
        tally.add(b, rows, output[rows], y[rows])
    return tally.values()


def test_metrics_of_classes_are_scikit_learns() -> None:
    y, logits = torch.from_numpy(RNG.integers(0, K - 1, N)), normal(N, K)
    logits[:, -1] -= 9  # a class that is neither there nor predicted
    logits[3] = logits[3, 0]  # ties
    y[[4, 20, 21]] = IGNORE
    found = measured("cross_entropy", logits, y, "macro_f1", "iou", "auc", "top5")
    kept = y != IGNORE
    y, logits = y[kept], logits[kept]
    best, p, true = logits.argmax(1), logits.double().softmax(1), y.numpy()
    areas = [sklearn.roc_auc_score(true == k, p[:, k]) for k in range(K - 1)]
    assert list(found) == ["accuracy", "macro_f1", "iou", "auc", "top5", "test_loss"]
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(true, best))
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(true, best, average="macro"))
    assert found["iou"] == pytest.approx(sklearn.jaccard_score(true, best, average="macro"))
    assert found["auc"] == pytest.approx(np.mean(areas))
    assert found["top5"] == pytest.approx(
        sklearn.top_k_accuracy_score(true, logits.numpy(), k=5, labels=range(K)), abs=1 / N
    )
    assert found["test_loss"] == pytest.approx(F.cross_entropy(logits, y).item())


@pytest.mark.parametrize("shape", [(N, L), (N,)])
def test_metrics_of_labels_are_scikit_learns(shape: tuple[int, ...]) -> None:
    y = torch.from_numpy(RNG.integers(0, 2, shape)).float()
    logits = normal(N, *shape[1:] or (1,))
    found = measured("binary_cross_entropy", logits, y, "macro_f1", "iou", "auc")
    true, best = y.view(N, -1).numpy(), (logits > 0).numpy()
    each = [(true[:, label], best[:, label], logits[:, label].numpy()) for label in range(true.shape[1])]
    assert found["accuracy"] == pytest.approx(np.mean(true == best))
    assert found["macro_f1"] == pytest.approx(np.mean([sklearn.f1_score(t, b) for t, b, _ in each]))
    assert found["iou"] == pytest.approx(np.mean([sklearn.jaccard_score(t, b) for t, b, _ in each]))
    assert found["auc"] == pytest.approx(np.mean([sklearn.roc_auc_score(t, s) for t, _, s in each]))
    assert found["test_loss"] == pytest.approx(
        sklearn.log_loss(true.ravel(), logits.sigmoid().numpy().ravel())
    )


@pytest.mark.parametrize(
    ("of_y", "of_output"), [((N, 2), (N, 2)), ((N,), (N, 1)), ((N, 1), (N,)), ((N,), (N,))]
)
def test_metrics_of_values_are_scikit_learns(of_y: tuple[int, ...], of_output: tuple[int, ...]) -> None:
    """Far from 0, where sums of squares would cancel."""
    y, output = 1000 + normal(*of_y), 1000.2 + normal(*of_output)
    true, got = y.view(N, -1).double().numpy(), output.view(N, -1).double().numpy()
    for loss, power in (("squared_error", 2), ("absolute_error", 1)):
        found = measured(loss, output, y, "mse", "mae", "near")
        assert list(found) == ["r2", "mse", "mae", "near", "test_loss"]
        assert found["r2"] == pytest.approx(sklearn.r2_score(true, got))
        assert found["mse"] == pytest.approx(sklearn.mean_squared_error(true, got))
        assert found["mae"] == pytest.approx(sklearn.mean_absolute_error(true, got))
        assert found["near"] == pytest.approx(np.mean(np.abs(true - got) <= 0.02), abs=1e-9)
        assert found["test_loss"] == pytest.approx(np.mean(np.abs(true - got) ** power), rel=1e-4)


def test_metrics_of_pixels_and_tokens() -> None:
    y, logits = torch.from_numpy(RNG.integers(0, K, (N, 4, 5))), normal(N, K, 4, 5)
    y[:, 2] = IGNORE
    found = measured("pixels", logits, y, "iou", "macro_f1")
    kept = y != IGNORE
    true, best = y[kept], logits.argmax(1)[kept]
    assert found["iou"] == pytest.approx(sklearn.jaccard_score(true, best, average="macro"))
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(true, best))

    tokens, words = torch.from_numpy(RNG.integers(0, K, (N, 6))), normal(N, 6, K)
    tokens[:, 4:] = IGNORE
    found = measured("next_token", words, tokens, "perplexity", "top5")
    loss = F.cross_entropy(words[:, :3].flatten(0, 1), tokens[:, 1:4].flatten())
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert found["test_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["accuracy"] == pytest.approx(
        float((words[:, :3].argmax(-1) == tokens[:, 1:4]).float().mean())
    )


def test_what_is_not_defined_is_none() -> None:
    y = torch.zeros(N, dtype=torch.int64)
    assert measured("cross_entropy", normal(N, K), y, "auc")["auc"] is None, "no negative sample"
    assert measured("squared_error", normal(N), torch.ones(N))["r2"] is None, "no variance"
    broken = measured("cross_entropy", normal(N, K) * torch.nan, y, "auc")
    assert (broken["auc"], broken["test_loss"]) == (None, None)


MODULE = """
import torch
from fedmpi.tasks.data import Data, Split

g = torch.Generator().manual_seed(1)
x = torch.randn(90, 5, generator=g)
labels = (x[:, :3] + 0.3 * torch.randn(90, 3, generator=g) > 0).float()
values = x @ torch.arange(5.0) + 0.1 * torch.randn(90, generator=g)

def load(folder, of="labels"):
    y, n = {"labels": (labels, 3), "values": (values, 1), "classes": (labels[:, 0].long(), 2)}[of]
    return Data(of, Split(x[:60], y[:60]), Split(x[60:], y[60:]), n)

def quantile(output, y, q=0.5):
    error = y - output
    return torch.maximum(q * error, (q - 1) * error).mean()

def unmapped(output, y):
    return quantile(output, y) if float(output.detach().sum()) > 1e9 else (output - y).abs().mean()

def noisy(output, y):
    return ((output - y) * (1 + torch.rand(1))).square().mean()

def within(output, y, of=1.0):
    return ((output - y).abs() < of).float().mean()

def each(output, y):
    return (output - y).abs()

def cut(output, y):
    return (output - y).detach().abs().mean()

def failing(output, y):
    raise KeyError("missing")

def late(output, y, calls=[]):
    calls.append(1)
    if len(calls) > 6:
        raise KeyError("late")
    return (output - y).abs().mean()
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine_of_metrics.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield "mine_of_metrics"


def values(mine: str, of: str, **changes: Any) -> dict[str, Any]:
    base = {**SMALL, "data": {"name": f"{mine}:load", "of": of}, "partition": "iid", "test_batch": 7}
    return {**base, "rounds": 3, "evaluate_every": 1, "clients": 4, "reproducible": True, **changes}


def trained(values: dict[str, Any], comm: Comm) -> tuple[dict[str, Any], Tensor]:
    simulation = Simulation(config.parse(values), comm)
    simulation.set_threads()
    for t in range(simulation.config.rounds):
        simulation.round(t)
    return simulation.measures, simulation.replica.parameters()


@pytest.mark.parametrize(
    "changes",
    [
        {"of": "labels", "loss": "binary_cross_entropy", "metrics": ["auc", "macro_f1"], "client_test": 0.3},
        {"of": "values", "loss": "squared_error", "metrics": ["mae"], "client_test": 0.3, "personal": True},
    ],
    ids=["labels", "values"],
)
def test_a_metric_is_the_same_at_any_number_of_ranks(mine: str, changes: dict[str, Any]) -> None:
    changes = dict(changes)
    if changes.pop("personal", False):
        changes |= {"parts": [{"match": "*bias", "travels": "local"}]}
    run = values(mine, changes.pop("of"), **changes)
    alone, theta = trained(run, solo())
    assert None not in alone.values()
    for found, other in run_ranks(3, lambda comm: trained(run, comm)):
        assert found == alone
        assert torch.equal(other, theta)


@pytest.mark.parametrize("loss", ["quantile", "unmapped", "noisy"])
def test_an_own_loss_trains_as_in_plain_torch(mine: str, loss: str) -> None:
    """Targets (N,) and an output (B, 1); mapped or not; with random numbers of its client and step."""
    module = __import__(mine)
    run = values(
        mine,
        "values",
        loss={"name": f"{mine}:{loss}", **({"q": 0.8} if loss == "quantile" else {})},
        metrics=[{"name": f"{mine}:within", "of": 2.0}, "r2"],
        local={"lr": 0.1, "steps": 1},
        rounds=1,
        clients=1,
        cohort=1,
    )
    simulation = Simulation(config.parse(run), solo())
    assert simulation.trainer.pools == (loss == "quantile")
    model = simulation.trainer.load(start := simulation.replica.parameters().clone())
    x, y = module.x[:60], module.values[:60, None]
    seed_all(random.key(run["seed"], 0, 0, "draws 0"))
    output = model(x)
    options = {"q": 0.8} if loss == "quantile" else {}
    grads = torch.autograd.grad(getattr(module, loss)(output, y, **options), list(model.parameters()))
    step = torch.cat([g.flatten() for g in grads])
    simulation.round(0)
    moved = start - simulation.replica.parameters()
    torch.testing.assert_close(moved, 0.1 * step, rtol=1e-5, atol=1e-6)
    assert list(simulation.measures) == [f"{mine}:within", "r2", "test_loss"]
    with torch.no_grad():
        error = (
            simulation.trainer.load(simulation.replica.parameters())(module.x[60:])[:, 0] - module.values[60:]
        )
    assert simulation.measures[f"{mine}:within"] == pytest.approx(float((error.abs() < 2).double().mean()))
    if loss == "noisy":
        run |= {"clients": 4, "cohort": 4}
        one, two = trained(run, solo())[1], run_ranks(2, lambda comm: trained(run, comm))[0][1]
        assert torch.equal(one, two)


def test_torchs_own_losses_are_import_paths_too(mine: str) -> None:
    for of, loss, first in (
        ("values", {"name": "torch.nn.functional:huber_loss", "delta": 0.5}, "r2"),
        ("classes", {"name": "torch.nn.functional:cross_entropy", "label_smoothing": 0.1}, "accuracy"),
    ):
        parsed = config.parse(values(mine, of, loss=loss))
        assert config.parse(parsed.plain()) == parsed
        found = trained(parsed.plain(), solo())[0]
        assert list(found) == [first, "test_loss"]


@pytest.mark.parametrize(
    ("of", "changes", "message"),
    [
        ("classes", {"metrics": ["r2"]}, r"metrics: r2 does not go with the loss cross_entropy .*valid: acc"),
        ("classes", {"metrics": ["f1"]}, r"metrics\.name: unknown 'f1'; .*macro_f1"),
        ("classes", {"metrics": ["top5"]}, "metrics: top5: expected more than 5 classes, got 2"),
        ("classes", {"loss": "binary_cross_entropy"}, r"loss: binary_cross_entropy expects targets of float32"),
        ("classes", {"best": "r2"}, r"best: expected one of what this run measures, accuracy, test_loss \(metrics"),
        ("classes", {"stop": {"metric": "client_worst", "patience": 2}}, r"stop\.metric: expected one of"),
        ("classes", {"stop": {"metric": "accuracy"}}, r"stop: expected a target .* or patience"),
        ("values", {"loss": "{mine}:nothing"}, "loss: cannot import '{mine}:nothing'"),
        ("values", {"loss": {"name": "{mine}:quantile", "p": 1}}, "loss: {mine}:quantile does not take .*'p'"),
        ("values", {"loss": "{mine}:each"}, r"loss: expected loss\(.*shape \(\), got a tensor of shape \(4, 1\)"),
        ("values", {"loss": "{mine}:cut"}, "loss: no gradient comes out of {mine}:cut; leave out detach"),
        ("values", {"loss": "{mine}:failing"}, r"loss: {mine}:failing failed on .* KeyError: 'missing' \(.*{mine}.py:"),
        ("values", {"loss": "squared_error", "metrics": ["{mine}:failing"]}, "metrics: {mine}:failing failed on"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(mine: str, of: str, changes: dict[str, Any], message: str) -> None:
    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(one) for key, one in value.items()}
        if isinstance(value, list):
            return [named(one) for one in value]
        return value.replace("{mine}", mine) if isinstance(value, str) else value

    with pytest.raises(ConfigError, match=message.replace("{mine}", mine)):
        trained(values(mine, of, **named(changes)), solo())


def test_an_own_metric_that_fails_on_one_rank_ends_all(mine: str) -> None:
    run = values(mine, "values", loss="squared_error", metrics=[f"{mine}:late"])

    def ends(
        comm: Comm,
    ) -> None:  # with its own error, or with the other's: threads decide whose call is late
        with pytest.raises(FedMPIError, match=f"metrics: {mine}:late failed on .*late"):
            trained(run, comm)

    run_ranks(2, ends, timeout=30)


def test_labels_lie_between_0_and_1() -> None:
    split = Split(X, torch.full((N, 2), 1.5))
    with pytest.raises(DataError, match=r"train\.y: expected labels from 0 to 1, got 1\.5"):
        objectives.check_data(OBJECTIVES["binary_cross_entropy"], Data("mine", split, split, 2))


def test_a_run_and_its_report_name_what_they_measure(
    mine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = values(mine, "values", loss="squared_error", metrics=["mae"], client_test=0.3)
    folders = []
    for seed in (0, 1):
        folders.append(str(tmp_path / f"run{seed}"))
        assert not main(["train", write_config(tmp_path, run | {"seed": seed}), "--out", folders[-1]])
    said = capsys.readouterr()
    assert "dense: r2 0." in said.out
    assert " r2 0." in said.err
    assert " mae " in said.err
    assert metrics(Path(folders[0]))[-1].keys() >= {"r2", "mae", "client_r2", "client_worst"}
    assert not main(["report", *folders])
    table = capsys.readouterr().out
    assert {"r2", "mae", "clients' mean"} <= {word.strip() for word in table.splitlines()[0].split("  ")}
    assert " %" not in table
    assert "![R2 by round" in (tmp_path / "report" / "report.md").read_text()
