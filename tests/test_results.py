"""The committed results can be had again: of each family of experiments one that is fast, with the command that made it
(``--full``). The same seed gives the same bits on one machine only, hence the bands: they are stated with each check.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmpi.analysis import grid
from fedmpi.cli import main
from fedmpi.comm import solo
from fedmpi.engine.run import run
from fedmpi.errors import DataError
from fedmpi.tasks import data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parent.parent
POINTS = 0.02  # of accuracy: two points; seeds differ by up to ten


@pytest.fixture(autouse=True)
def fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    try:
        data.load("fashion-mnist")
    except DataError:
        if main(["data", "fetch", "fashion-mnist"]):
            pytest.skip("Fashion-MNIST can not be had here")


def committed(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(Path(f"configs/results/{name}.json").read_text())
    return results


def command(name: str) -> list[str]:
    """The words of the command that made a result file."""
    claims = yaml.safe_load(Path("configs/claims/claims.yaml").read_text())
    return shlex.split(claims["experiments"][name]["command"])


def again(name: str, label: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The summary of a sweep's point, run again with its first seed, and what is committed of that."""
    words = command(name)
    assert words[:2] == ["fedmpi", "sweep"]
    overrides = [word for word in words[4:] if "=" in word]
    jobs = grid.jobs(words[2], grid.read(Path(words[3])), overrides, folder)
    job = next(job for job in jobs if job.label == label)
    point = next(point for point in committed(name)["points"] if point["label"] == label)
    assert point["seeds"][0] == job.seed
    kept = {key: values[0] for key, values in point.items() if isinstance(values, list)}
    return run(job.config, solo(), quiet=True), kept


@pytest.mark.parametrize("label", ["static 100", "K-varying 100"])  # 15 points apart
def test_intrinsic(label: str, tmp_path: Path) -> None:
    """Accuracy within two points; bytes exactly."""
    summary, kept = again("intrinsic-k", label, tmp_path)
    assert summary["accuracy"] == pytest.approx(kept["accuracy"], abs=POINTS)
    for name in ("upload_bytes", "download_bytes", "messages"):
        assert summary[name] == kept[name], name


def test_lbgm(tmp_path: Path) -> None:
    """Accuracy within two points; which messages are scalars hangs on a threshold, so bytes to a twentieth."""
    summary, kept = again("lbgm-fcn-sampled", "δ = 0.2", tmp_path)
    assert summary["accuracy"] == pytest.approx(kept["accuracy"], abs=POINTS)
    assert summary["messages"] == kept["messages"]
    for name in ("scalars", "upload_bytes"):
        assert summary[name] == pytest.approx(kept[name], rel=0.05), name


def test_crucial(tmp_path: Path) -> None:
    """The first ten epochs: overlap scores within three points. Two of a hundred positions are ever chosen."""
    words = [
        word
        for word in command("positions-iid-0")[1:]
        if not word.startswith(("--results", "configs/results"))
    ]
    assert main([*words, "rounds=10", "--quiet", "--out", str(tmp_path)]) == 0
    summary, kept = summary_of(tmp_path / "positions.json"), committed("positions-iid-0")
    for name in ("score", "own score"):
        assert summary[f"{name}, epoch 1"] == kept[f"{name}, epoch 1"] == 100
        assert summary[f"{name}, epoch 10"] == pytest.approx(kept[f"{name}, epoch 10"], abs=3)
    for name in ("top-k", "rTop-k"):
        assert 0.95 < summary[f"{name}: never chosen"] < 1


def summary_of(path: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(path.read_text())["summary"]
    return summary


def test_analysis(tmp_path: Path) -> None:
    """Inversion: what a full gradient and compressed ones give away, SSIM within 0.05; seeds differ by 0.1."""
    path, *overrides = [
        word for word in command("inversion-0")[3:] if "=" in word or word.startswith("configs/int")
    ]
    chosen = ["--methods", "dense; intrinsic; signsgd", "--iterations", "100"]
    assert main(["analyze", "inversion", path, *overrides, *chosen, "--quiet", "--out", str(tmp_path)]) == 0
    summary, kept = summary_of(tmp_path / "inversion.json"), committed("inversion-0")
    for name in ("dense", "intrinsic, d=341", "intrinsic, d=1058", "signsgd"):
        assert summary[f"{name}: ssim"] == pytest.approx(kept[f"{name}: ssim"], abs=0.05), name
