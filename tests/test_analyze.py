"""The analyses' numbers against direct computations and cases made by hand, and their command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmpi import config as configuration
from fedmpi.analysis import subspace
from fedmpi.analysis.watch import Watched
from fedmpi.cli import main
from fedmpi.spec import Spec

CENTRAL: dict[str, Any] = {
    "data": {"name": "digits"},
    "model": {"name": "fcn", "hidden": 8},
    "clients": 1,
    "rounds": 4,
    "local": {"lr": 0.05, "steps": 3, "batch": 50},
    "method": {"name": "dense"},
}


def gradients(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Rows of falling size that share a direction, as gradients do."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return (g + torch.randn(columns, generator=generator)) * 0.7 ** torch.arange(rows)[:, None]


def direct(g_TD: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors of the gradients themselves."""
    _, s, v = torch.linalg.svd(g_TD - g_TD.mean(0) if center else g_TD, full_matrices=False)
    return s, v


@given(
    rows=st.integers(1, 12),
    seed=st.integers(0, 99),
    share=st.floats(0.05, 0.999),
    measure=st.sampled_from(subspace.MEASURES),
    center=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_components_are_those_of_a_direct_svd(
    rows: int, seed: int, share: float, measure: subspace.Measure, center: bool
) -> None:
    g_TD = gradients(rows, 30, seed)
    s, _ = direct(g_TD, center)
    weight = s**2 if measure == "variance" else s
    total = float(weight.sum())
    if rows > 1 and min(abs(float(x) - share * total) for x in weight.cumsum(0)) < 1e-7 * total:
        return  # on the edge: either count is right
    expected = next(n for n in range(1, rows + 1) if n == rows or float(weight[:n].sum()) >= share * total)
    values, _ = subspace.eigen(g_TD @ g_TD.T, center)
    assert subspace.components(values, share, measure) == (1 if center and rows == 1 else expected)


def test_components_of_known_spectra() -> None:
    def count(*values: float, share: float, measure: subspace.Measure) -> int:
        return subspace.components(torch.tensor(values, dtype=torch.float64), share, measure)

    # Eigenvalues 100, 4, 1 are singular values 10, 2, 1: 95.2 % of the variance, 76.9 % of the sum.
    assert count(100, 4, 1, share=0.95, measure="variance") == 1
    assert count(100, 4, 1, share=0.99, measure="variance") == 2
    assert count(100, 4, 1, share=0.95, measure="singular") == 3
    assert count(100, 4, 1, share=0.90, measure="singular") == 2
    assert count(95, 5, share=0.95, measure="variance") == 1  # exactly
    assert count(0, 0, share=0.95, measure="variance") == 1


@pytest.mark.parametrize("center", [False, True])
def test_overlap_is_the_cosine_with_the_principal_directions(center: bool) -> None:
    g_TD = gradients(9, 40)
    g_TD[4] = 0
    _, v_PD = direct(g_TD, center)
    found = subspace.overlap(g_TD @ g_TD.T, 0.99, "variance", center)
    norm = g_TD.norm(dim=1, keepdim=True).where(torch.arange(9)[:, None] != 4, 1.0)
    expected = (g_TD / norm) @ v_PD[: found.shape[1]].T
    assert 1 < found.shape[1] < 9
    torch.testing.assert_close(found.abs(), expected.abs(), atol=1e-6, rtol=0)
    assert (found.max(0).values >= -found.min(0).values).all()  # signs: the largest is positive
    assert not found[4].any()


def test_cosines() -> None:
    g_TD = torch.tensor([[1.0, 0], [1, 1], [-2, 0], [0, 0]], dtype=torch.float64)
    half = 0.5**0.5
    expected = [[1, half, -1, 0], [half, 1, -half, 0], [-1, -half, 1, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(subspace.cosines(g_TD @ g_TD.T), torch.tensor(expected, dtype=torch.float64))


def test_grams_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace, "_BLOCK", 7)  # blocks that end inside a layer
    spec = Spec(("a.weight", "a.bias", "b.weight", "c"), ((3, 4), (3,), (5,), (2,)))
    assert subspace.layers(spec) == {"a": slice(0, 15), "b": slice(15, 20), "c": slice(20, 22)}
    g_TD = gradients(6, spec.size).float()
    for file in (None, tmp_path / "g"):
        kept = subspace.Gradients(spec, 8, file)  # fewer rounds came than there is room for
        for g_D in g_TD:
            kept.add(g_D)
        wide = g_TD.double()
        for name, gram_TT in kept.grams().items():
            part = wide[:, subspace.layers(spec).get(name, slice(None))]
            torch.testing.assert_close(gram_TT, part @ part.T)
        assert list(kept.grams()) == [subspace.WHOLE, "a", "b", "c"]


def test_a_round_of_one_client_is_an_epoch_of_algorithm_2() -> None:
    """The gradient kept of a round is the sum of the steps' gradients: (θ before − θ after) / η."""
    seen: list[Tensor] = []
    run = Watched(configuration.parse(CENTRAL), lambda sent: seen.append(sent.update.g_CD[0].clone()))
    thetas = [run.simulation.topology.parameters().clone()]
    run.train("", True, after=lambda t: thetas.append(run.simulation.topology.parameters().clone()))
    assert len(seen) == 4
    for g_D, before, after in zip(seen, thetas, thetas[1:], strict=False):
        torch.testing.assert_close(g_D, (before - after) / 0.05, atol=1e-5, rtol=0)


def test_schedules_change_both_rates() -> None:
    local: list[float] = []
    server: list[float] = []
    run = Watched(configuration.parse({**CENTRAL, "rounds": 6}), lambda sent: None, "steps")

    def note(t: int) -> None:
        local.append(run.simulation.trainer.local.lr)
        server.append(run.simulation.config.server_lr)

    run.train("", True, after=note)
    assert local == server == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005])


def write_config(folder: Path, **values: Any) -> str:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_subspace_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, **CENTRAL)
    out, results = tmp_path / "out", tmp_path / "r" / "s.json"
    command = ["analyze", "subspace", path, "--out", str(out), "--results", str(results), "--quiet"]
    assert main([*command, "--memmap", "rounds=6"]) == 0
    assert {f.name for f in out.iterdir()} == {
        "subspace.md", "subspace.html", "subspace.json", "pca.png", "overlap.png", "cosine.png"
    }  # and no file of gradients  # fmt: skip
    numbers = json.loads((out / "subspace.json").read_text())
    assert json.loads(results.read_text()) == numbers["summary"]
    assert numbers["summary"]["rounds"] == 6
    npca = numbers["npca"]
    assert npca.keys() == {f"{m}, {c}" for m in subspace.MEASURES for c in ("centred", "not centred")}
    cosine = torch.tensor(numbers["cosine"][subspace.WHOLE])
    assert cosine.shape == (6, 6)
    assert float(cosine.diagonal(1).mean()) == pytest.approx(
        numbers["summary"]["consecutive_cosine"], abs=1e-4
    )
    assert "N99 (variance, centred)" in capsys.readouterr().out
    page = (out / "subspace.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    in_memory = tmp_path / "again"
    assert main([*command[:3], "--out", str(in_memory), "--quiet", "rounds=6"]) == 0
    assert (in_memory / "subspace.json").read_bytes() == (out / "subspace.json").read_bytes()
