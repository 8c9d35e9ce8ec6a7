"""The analyses' numbers against direct computations and cases made by hand, and their command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmpi import config as configuration
from fedmpi import methods
from fedmpi.analysis import inversion, leak, positions, subspace
from fedmpi.analysis.watch import Watched
from fedmpi.cli import main
from fedmpi.comm import solo
from fedmpi.engine.passes import Sent
from fedmpi.engine.rounds import Simulation
from fedmpi.methods import METHODS
from fedmpi.methods.base import Setup
from fedmpi.spec import Spec
from fedmpi.tasks import data

from .conftest import write_config

DIGITS = data.load("digits")
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
    thetas = [run.simulation.replica.parameters().clone()]
    run.train("", True, after=lambda t: thetas.append(run.simulation.replica.parameters().clone()))
    assert len(seen) == 4
    for g_D, before, after in zip(seen, thetas, thetas[1:], strict=False):
        torch.testing.assert_close(g_D, (before - after) / 0.05, atol=1e-5, rtol=0)


def test_schedules_change_both_rates() -> None:
    local: list[float] = []
    server: list[float] = []
    run = Watched(configuration.parse({**CENTRAL, "rounds": 5}), lambda sent: None, "linear")

    def note(t: int) -> None:
        local.append(run.simulation.trainer.local.lr)
        server.append(run.simulation.config.server_lr(t))

    run.train("", True, after=note)
    assert local == server == pytest.approx([0.05, 0.04, 0.03, 0.02, 0.01])


def test_subspace_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path, CENTRAL)
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


def test_overlap_scores_by_hand() -> None:
    g_WD = torch.tensor([[9.0, -8, 1, 0], [0, 1, -8, 9], [0, 0, 0, 0], [5, 1, 1, 9]])
    kept = torch.tensor([[True, True, False, False]])
    assert positions.score(g_WD, kept, 2).tolist()[:2] == [100, 0]
    assert positions.score(g_WD, kept, 2)[2].isnan()
    assert positions.score(g_WD, kept, 2)[3] == 50
    own = torch.tensor([[True, False, False, False], [False, False, True, True]])
    assert positions.score(g_WD[:2], own, 2).tolist() == [50, 100]


def test_positions_of_a_run_are_those_of_its_gradients() -> None:
    """Against the same run watched by hand: sent positions counted, the first epoch's aggregate, each score."""
    values = {**CENTRAL, "clients": 4, "cohort": 2, "sampling": "epoch_shuffle", "rounds": 6}
    config = configuration.parse({**values, "method": {"name": "topk", "k": 9, "feedback": True}})
    seen = positions.watch(config, 9, 60, (1, 3), per_epoch=2, quiet=True)
    sums = torch.zeros(3, 4, seen.frequency_D.numel())
    chosen = torch.zeros_like(seen.frequency_D)

    def see(sent: Sent) -> None:
        sums[sent.ctx.round.t // 2].index_add_(0, sent.ctx.clients_C, sent.update.g_CD)
        p_CD = sent.update.g_CD + sent.before["residual"]
        for p_D in p_CD:
            chosen[p_D.abs().topk(9).indices] += 1

    run = Watched(config, see)
    run.train("", True)
    assert torch.equal(seen.frequency_D, chosen)
    weights = run.simulation.partition.sizes / 1437
    first = (sums[0] * weights[:, None]).sum(0).abs().topk(60).indices.tolist()
    assert set(seen.kept_D.nonzero()[:, 0].tolist()) == set(first)
    for epoch in range(3):
        for w in range(4):
            top = sums[epoch, w].abs().topk(9).indices.tolist()
            own = sums[0, w].abs().topk(60).indices.tolist()
            for reference, kept in (("aggregate", first), ("worker", own)):
                expected = 100 * len(set(top) & set(kept)) / 9
                assert float(seen.scores_WE[reference][w, epoch]) == pytest.approx(expected)
    torch.testing.assert_close(seen.mean_ED[3], (sums[2] * weights[:, None]).sum(0))
    assert seen.mean_ED.keys() == {1, 3}


def test_positions_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = {"name": "topk", "k": 9}
    path = write_config(tmp_path, {**CENTRAL, "clients": 3, "method": method})
    out, results = tmp_path / "out", tmp_path / "s.json"
    command = ["analyze", "positions", path, "--out", str(out), "--quiet"]
    assert main([*command, "--results", str(results), "--m", "60", "--r", "20", "--epochs", "1,4,9"]) == 0
    assert {f.name for f in out.iterdir()} == {
        "positions.md", "positions.html", "positions.json", "overlap.png", "drift.png", "frequency.png"
    }  # fmt: skip
    numbers, summary = json.loads((out / "positions.json").read_text()), json.loads(results.read_text())
    for name in ("top-k", "rTop-k"):
        times = {int(n): count for n, count in numbers["times chosen"][name].items()}
        assert sum(times.values()) == summary["parameters"]
        assert sum(n * count for n, count in times.items()) == 4 * 3 * 9  # rounds, clients, k
        assert summary[f"{name}: never chosen"] == pytest.approx(times[0] / summary["parameters"], rel=1e-5)
    for called in ("score", "own score"):
        scores = torch.tensor(numbers[f"{called}s"]["top-k"])
        assert scores.shape == (3, 4)
        assert summary[f"{called}, epoch 4"] == pytest.approx(float(scores[:, 3].mean()), rel=1e-4)
    assert summary["own score, epoch 1"] == 100
    assert "score, epoch 9" not in summary  # the run has no ninth
    capsys.readouterr()
    for wrong, message in {
        "method=dense": "method: expected topk, whose k this looks at, got dense",
        "--m=8": "--m: expected at least k = 9, got 8",
        "--rounds-per-epoch=5": "rounds: expected at least an epoch, 5 rounds, got 4",
    }.items():
        assert main([*command, wrong]) == 2
        assert message in capsys.readouterr().err


def test_image_measures() -> None:
    a, b = torch.zeros(1, 20, 16), torch.full((1, 20, 16), 0.5)
    assert inversion.mse(a, b) == pytest.approx(0.25)
    assert inversion.psnr(a, b) == pytest.approx(6.0206, abs=1e-4)  # 10 log10 4
    assert inversion.psnr(a, a) == float("inf")
    # Of constant images only the means differ: (2 μν + c₁) / (μ² + ν² + c₁).
    assert inversion.ssim(a + 0.3, b) == pytest.approx((0.3 + 1e-4) / (0.09 + 0.25 + 1e-4))
    image = torch.rand(3, 9, 8, generator=torch.Generator().manual_seed(0))
    assert inversion.ssim(image, image) == pytest.approx(1)
    assert inversion.ssim(image, 1 - image) < -0.5
    # On a window's own size there is one place: the definition, with weighted moments.
    x, y = image[0, :7, :7].double(), image[1, :7, :7].double()
    line = torch.exp(-(torch.arange(-3.0, 4.0, dtype=torch.float64) ** 2) / 4.5)
    w = torch.outer(line, line) / line.sum() ** 2
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, cov = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
    expected = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert inversion.ssim(image[:1, :7, :7], image[1:2, :7, :7]) == pytest.approx(float(expected))


def victim_of(model: dict[str, Any]) -> leak.Victim:
    return leak.Victim(Simulation(configuration.parse({**CENTRAL, "model": model}), solo()))


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_is_observed(name: str) -> None:
    """The truth matches what the attacker saw better than another image; linear codecs match in their space."""
    victim = victim_of({"name": "fcn", "hidden": 20})
    alike = (DIGITS.train.y == 3).nonzero()[:2, 0]  # so that the second points the first one's way, ρ > 0
    x, y = DIGITS.train.x[alike], DIGITS.train.y[alike]

    def gradient(theta_D: Tensor, t: int) -> Tensor:
        return victim.gradient(theta_D, x[t], int(y[t])).float()

    for options in inversion.options_for(name, victim.spec.size, 64).values():
        method = methods.build({"name": name, **options}, victim.spec, Setup(0))
        theta_D, seen = leak.observe(method, victim.spec, victim.theta_D, gradient, seed=0)
        assert seen.nbytes <= 4 * victim.spec.size + 1
        payload = name in ("dense", "intrinsic", "fetchsgd", "powersgd")
        assert seen.how == ("payload" if payload else "decoded")
        scalar = options.get("threshold") == 1.0
        truth, other = (0, 1) if scalar else (1, 0)  # a scalar says which way the image before pointed
        misses = [float(seen.mismatch(victim.gradient(theta_D, x[i], int(y[i])))) for i in (truth, other)]
        assert misses[0] < misses[1]
        if payload or scalar or name in ("fp16", "topk", "rtopk", "randomk", "prune"):
            assert misses[0] < 1e-6  # values arrive as they are
        guess = x[other].double().requires_grad_()
        (slope,) = torch.autograd.grad(
            seen.mismatch(victim.gradient(theta_D, guess, int(y[truth]), graph=True)), guess
        )
        assert slope.isfinite().all()
        assert slope.any()


def test_gradients_of_linear_payloads_are_right() -> None:
    """The adjoint that stands in for autograd, against a difference quotient."""
    victim = victim_of({"name": "linear"})
    x = DIGITS.train.x
    linear = ({"name": "intrinsic", "dim": 40}, {"name": "fetchsgd", "columns": 30, "k": 9})
    for options in (options for options in linear if options["name"] in methods.METHODS):
        method = methods.build(options, victim.spec, Setup(0))
        _, seen = leak.observe(
            method, victim.spec, victim.theta_D, lambda th, t: victim.gradient(th, x[t], 3).float(), 0
        )
        assert seen.how == "payload"
        g_D = victim.gradient(victim.theta_D, x[5], 3).requires_grad_()
        (slope_D,) = torch.autograd.grad(seen.mismatch(g_D), g_D)
        step_D = gradients(1, len(g_D))[0]
        step_D *= 0.1 * g_D.detach().norm() / step_D.norm()
        ends = [float(seen.mismatch(g_D.detach() + sign * step_D)) for sign in (1, -1)]
        assert (ends[0] - ends[1]) / 2 == pytest.approx(float(slope_D @ step_D), rel=1e-2)


def test_the_defence_clips_and_adds_noise() -> None:
    g_D = gradients(1, 5000)[0].float()
    long = float(g_D.norm())
    assert torch.equal(leak.Defence(2 * long, 0.0)(g_D, 1), g_D)
    torch.testing.assert_close(leak.Defence(0.5, 0.0)(g_D, 1), g_D * 0.5 / long)
    noise_D = leak.Defence(0.5, 0.1)(g_D, 1) - g_D * 0.5 / long
    assert float(noise_D.std()) == pytest.approx(0.05, rel=0.05)


def test_what_cannot_be_done_is_said_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, {**CENTRAL, "method": {"name": "topk"}})
    (tmp_path / "file").write_text("")
    for analysis in ("subspace", "positions", "inversion"):
        assert main(["analyze", analysis, path, "--out", str(tmp_path / "file"), "rounds=1000000"]) == 2
        said = capsys.readouterr().err
        assert said == f"fedmpi: --out: cannot write to {tmp_path / 'file'}: File exists\n"
    inversion = ["analyze", "inversion", path, "--out", str(tmp_path / "out")]
    for wrong, message in {
        "--noise=0.1": "--noise: expected at least 0, and with it a --clip above 0, got 0.1 and None",
        "--clip=0": "got 0 and 0.0",
        "--methods=dense; tokp": "METHOD.name: unknown 'tokp'; did you mean 'topk'?",
        "--methods={name": "--methods: expected YAML, got",
    }.items():
        assert main([*inversion, wrong]) == 2
        assert message in capsys.readouterr().err


def test_inversion_command(tmp_path: Path) -> None:
    """A full gradient gives the image away; one that is clipped and noised does so less."""
    path = write_config(tmp_path, {**CENTRAL, "model": {"name": "fcn", "hidden": 20}})
    out = tmp_path / "out"
    command = ["analyze", "inversion", path, "--out", str(out), "--quiet", "--images", "1"]
    chosen = ["--methods", "dense; {name: signsgd}", "--clip", "1", "--noise", "0.1"]
    assert main([*command, *chosen, "--iterations", "60"]) == 0
    summary = json.loads((out / "inversion.json").read_text())["summary"]
    assert summary["dense: ssim"] > 0.95
    assert summary["dense: psnr"] > 25
    assert summary["dense, clipped + noise: ssim"] < 0.8
    assert {f.name for f in out.iterdir()} == {
        "inversion.md", "inversion.html", "inversion.json", "images.png"
    }  # fmt: skip
    assert (out / "inversion.md").read_text().count("| payload |") == 2
