"""``fedmpi bench``: what it prints, and when --check fails. No time is asserted."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch

from fedmpi import cli
from fedmpi.bench import kernels, rounds, timing
from fedmpi.bench.commands import BENCHES
from fedmpi.bench.timing import Row, Spread, Table, measure
from fedmpi.errors import ConfigError
from fedmpi.methods import METHODS


def row(name: str, ratio: float, target: float | None) -> Row:
    one = Spread(1.0, 1.0, 1.0)
    return Row(name, one, one, Spread(ratio, ratio, ratio), target)


def table(*rows: Row) -> Table:
    return Table("kernels", {"numbers": "2^17"}, "memcpy", list(rows))


def test_verdicts() -> None:
    found = table(row("at it", 5, 5), row("above", 5.01, 5), row("free", 99, None))
    assert [found.verdict(r) for r in found.rows] == ["met", "MISSED", ""]
    assert found.missed() == ["above"]


@pytest.mark.parametrize(("ratio", "code"), [(1.0, 0), (3.0, 1)])
def test_check_sets_the_exit_code(
    ratio: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "run", lambda *_: table(row("FWHT", ratio, 2.0)))
    assert cli.main(["bench", "kernels", "--check"]) == code
    assert ("missed: FWHT" in capsys.readouterr().err) == bool(code)
    assert cli.main(["bench", "kernels"]) == 0


def test_all_benches_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with its own defaults; one that cannot be measured here is missed, and the others are measured."""
    sizes = []

    def fast(arguments: Any) -> Any:
        sizes.append(arguments.size)
        return table(row("FWHT", 1.0, 2.0))

    def here_not(arguments: Any) -> Any:
        raise ConfigError("needs root")

    rows = {"kernels": fast, "methods": lambda _: table(row("cnn", 3.0, 2.0)), "rounds": here_not}
    for name in BENCHES:
        found = rows.get(name, lambda _: table(row("free", 9.0, None)))
        monkeypatch.setitem(BENCHES, name, BENCHES[name]._replace(run=found))
    assert cli.main(["bench", "--check"]) == 1
    said = capsys.readouterr()
    assert sizes == [27]
    assert said.out.count("\n## ") == len(BENCHES)
    assert "rounds is not measured: needs root" in said.err
    assert said.err.rstrip().endswith("missed: methods/cnn, rounds")
    assert cli.main(["bench"]) == 0


def test_measure_takes_turns_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every turn is compared with the mean of the references before and after it; the first turns do not count."""
    order: list[str] = []
    seconds = iter([1.0, 6.0, 3.0, 8.0, 1.0])

    def clock(work: Any, device: Any) -> float:
        work()
        return next(seconds)

    monkeypatch.setattr(timing, "clock", clock)
    found = measure("x", partial(order.append, "work"), partial(order.append, "copy"), 2.0, 2)
    assert order == ["work", "copy", "copy", "work", "copy", "work", "copy"]
    assert (found.ratio.low, found.ratio.median, found.ratio.high) == (3.25, 3.5, 3.75)  # of 6/2 and 8/2
    assert found.seconds.median == 7.0
    assert found.reference.median == 1.0
    assert not found.met


def test_bench_kernels_for_real(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        command = ["bench", "kernels", "--size", "17", "--repeats", "1", "--threads", "2"]
        assert cli.main([*command, "--json"]) == 0
    finally:
        torch.set_num_threads(threads)
    answer = json.loads(capsys.readouterr().out)
    assert (answer["bench"], answer["numbers"], answer["threads"]) == ("kernels", "2^17", 2)
    assert [r["case"] for r in answer["rows"]] == list(kernels.CASES)
    assert {r["case"]: r["target"] for r in answer["rows"] if r["target"]} == {
        "FWHT": 15,
        "Fastfood project": 40,
        "Fastfood lift": 40,
        "hashed project": 8,
        "hashed lift": 8,
        "sign pack": 1,
        "sign unpack": 1,
        "top 0.1 %": 5,
    }
    assert all(r["seconds"]["median"] > 0 and r["ratio"]["median"] > 0 for r in answer["rows"])


@pytest.mark.parametrize("size", ["16", "33", "many", "-3"])
def test_a_wrong_size_is_named(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "kernels", f"--size={size}"])
    assert f"expected the power of two, from 17 to 32, got '{size}'" in capsys.readouterr().err


def test_more_than_the_memory_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.os, "sysconf", lambda name: 1 << 10)
    assert cli.main(["bench", "kernels", "--size", "20"]) == 2
    assert "--size: 2^20 numbers need 24 MiB of memory, there are 1" in capsys.readouterr().err


def test_bench_methods_for_real(capsys: pytest.CaptureFixture[str]) -> None:
    """A row a method, with the bytes that a client's message has; no target, so that --check passes."""
    command = ["bench", "methods", "--size", "17", "--clients", "2", "--repeats", "1", "--check"]
    assert cli.main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["bench"], answer["parameters"], answer["clients"]) == ("methods", "2^17", 2)
    assert [r["method"]["name"] for r in answer["rows"]] == list(METHODS)
    size = {r["method"]["name"]: r["bytes"] for r in answer["rows"]}
    matrix = 4 * (256 + 512) * METHODS["powersgd"].example["rank"]
    assert (size["dense"], size["bf16"], size["signsgd"], size["intrinsic"], size["powersgd"]) == (
        4 << 17,
        2 << 17,
        (1 << 17) // 8 + 1,  # a bit says that no row is without gradient
        4 * METHODS["intrinsic"].example["dim"],
        matrix,  # both passes
    )
    assert size["lookback"] < 10, "the third message of the same gradient is a scalar"
    assert all(r["compression"] == (4 << 17) / r["bytes"] for r in answer["rows"])
    parts = [
        r[part]["ratio"]["median"] for r in answer["rows"] for part in ("compress", "decompress", "finish")
    ]
    assert all(ratio > 0 for ratio in parts)


def test_bench_methods_of_your_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "methods", "--size", "17", "--clients", "1", "--repeats", "1"]
    assert cli.main([*command, "{name: topk, ratio: 0.2}", "dense"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["method", "bytes", "smaller", "compress", "decompress", "finish"]
    assert lines[2].startswith("{name: topk, ratio: 0.2}")
    assert "1.0x" in lines[3]
    assert len(lines) == 4


def test_bench_on_a_device(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--repeats", "1", "--device", "pretend", "--json"]
    assert cli.main(["bench", "methods", "--size", "17", "--clients", "1", *few, "topk", "lookback"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "PRETEND"
    assert cli.main(["bench", "kernels", "--size", "17", *few]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["kernels"]) == ("PRETEND", "torch")
    assert [r["case"] for r in found["rows"]] == list(kernels.CASES)


@pytest.mark.parametrize("bench", ["kernels", "methods", "rounds"])
def test_a_device_that_is_not_here_is_named(bench: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", bench, "--device", "cuda:77"]) == 2
    assert "device: expected auto, cpu, cuda or cuda:N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{name: topq}", "METHOD.name: unknown 'topq'; did you mean 'topk'?"),
        ("{name: topk", "METHOD: expected YAML, got '{name: topk'"),
        ("[1]", "METHOD: expected a name or {name: …}, got [1]"),
        ("{name: topk, k: 200000}", "expected 1 to 131072"),
    ],
)
def test_a_wrong_method_is_named(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "methods", given, "--size", "17", "--clients", "1"]) == 2
    assert said in capsys.readouterr().err


def test_the_bare_loop_does_the_engine_s_mathematics() -> None:
    """With all clients in all rounds, and a batch of all their samples, no order is left to chance."""
    local = {"epochs": 1, "batch": 5}
    like = rounds.simulation(6, 5, 6, local, model="fcn", method="dense")
    engine, bare = rounds.Engine(like), rounds.Bare(like)
    start = like.replica.parameters().clone()
    engine.rounds(3)
    bare.rounds(3)
    theta_D = torch.cat([value.flatten() for value in bare.theta])
    torch.testing.assert_close(like.replica.parameters(), theta_D, rtol=1e-4, atol=1e-6)
    assert float((theta_D - start).abs().max()) > 1e-3
