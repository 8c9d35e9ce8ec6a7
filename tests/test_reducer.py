"""What every drop-in shares, on ranks that are threads: exact limits, steps that do not count, state that is saved."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmpi.comm import run_ranks, solo
from fedmpi.comm.base import Comm
from fedmpi.errors import CommError, ConfigError
from fedmpi.integrations.reducer import Reducer
from fedmpi.methods import METHODS

SHAPES = {"conv": (8, 3, 3, 3), "norm": (8,), "fc": (30, 40), "bias": (30,), "out": (10, 30)}
SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}
D = 8 * 27 + 30 * 40 + 300  # what is compressed with exact_below: 200
LOSSLESS = {
    "dense": {"name": "dense"},
    "topk": {"name": "topk", "ratio": 1.0, "feedback": True},
    "topk of the whole model": {"name": "topk", "k": D},
    "randomk": {"name": "randomk", "ratio": 1.0},
    "rtopk": {"name": "rtopk", "ratio": 1.0},
    "intrinsic": {"name": "intrinsic", "dim": D, "matrix": "dense", "orthonormal": True},
    "intrinsic, time-varying": {
        "name": "intrinsic",
        "dim": D,
        "matrix": "dense",
        "orthonormal": True,
        "schedule": "time_varying",
    },
    "lookback": {"name": "lookback", "threshold": 0.0},
    "lookback that keeps messages": {"name": "lookback", "threshold": 0.0, "keep": "message"},
    "lookback per tensor": {"name": "lookback", "threshold": 0.0, "scope": "tensor"},
    "powersgd": {"name": "powersgd", "rank": 40},
    "atomo": {"name": "atomo", "rank": 40},
}


def gradients(rank: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    slow = torch.Generator().manual_seed(rank)
    return {
        name: torch.randn(shape, generator=slow) + 0.1 * torch.randn(shape, generator=generator)
        for name, shape in SHAPES.items()
    }


def average(reducer: Reducer, mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """One step: what every rank gets."""
    parameters = {name: torch.zeros_like(g, requires_grad=True) for name, g in mine.items()}
    for name, p in parameters.items():
        p.grad = mine[name].clone()
    reducer.average(parameters)
    kept = [
        v
        for group in reducer.groups
        for part in (group.state, group.memory, group.peers.state)
        for v in part.values()
    ]
    got = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    ours = {
        v.untyped_storage().data_ptr() for v in (*got.values(), *(group.flat_D for group in reducer.groups))
    }
    assert not ours & {v.untyped_storage().data_ptr() for v in kept if v.numel()}, (
        "what is kept lies by itself"
    )
    return got


def train(
    comm: Comm, method: Any, steps: range, bad: tuple[int, ...] = (), saved: Any = None, **settings: Any
) -> tuple[list[dict[str, Tensor]], Any, dict[str, float]]:
    reducer = Reducer(SHAPES, method, comm, **{"exact_below": 200, **settings})
    if saved is not None:
        reducer.load_state_dict(saved[comm.rank])
    got = []
    for t in steps:
        if t in bad:
            poisoned = gradients(comm.rank, 1000)
            if comm.rank == 1:
                poisoned["out"][0, 0] = math.inf
            answer = average(reducer, poisoned)
            # NaN wherever its gradients went, on every rank: a GradScaler skips the step everywhere.
            assert bool(answer["out"].isnan().all())
        got.append(average(reducer, gradients(comm.rank, t)))
    return got, copy.deepcopy(reducer.state_dict()), reducer.stats()


def suitable() -> list[str]:
    return [name for name in METHODS if name != "prune"]


def example(name: str) -> dict[str, Any]:
    return {"name": name, **METHODS[name].example}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", LOSSLESS)
def test_a_lossless_setting_is_the_plain_mean(name: str, ranks: int) -> None:
    results = run_ranks(ranks, lambda comm: train(comm, LOSSLESS[name], range(4))[0])
    for t in range(4):
        mine = [gradients(rank, t) for rank in range(ranks)]
        for parameter in SHAPES:
            mean = sum(g[parameter] for g in mine) / ranks
            for got in results:
                # Products with D × D matrices and singular vectors add up D roundings; the others have one or two.
                loose = name.startswith(("intrinsic", "powersgd", "atomo")) and parameter in (
                    "conv",
                    "fc",
                    "out",
                )
                assert torch.allclose(got[t][parameter], mean, rtol=0, atol=1e-4 if loose else 1e-6), (
                    parameter
                )
                assert torch.equal(got[t][parameter], results[0][t][parameter]), "all ranks get the same bits"


@pytest.mark.parametrize("name", suitable())
def test_a_step_that_is_not_finite_leaves_no_trace(name: str) -> None:
    calm = run_ranks(2, lambda comm: train(comm, example(name), range(5)))
    stormy = run_ranks(2, lambda comm: train(comm, example(name), range(5), bad=(0, 2, 3)))
    for (expected, _, stats), (got, _, other) in zip(calm, stormy, strict=True):
        assert all(torch.equal(e[n], g[n]) for e, g in zip(expected, got, strict=True) for n in SHAPES)
        assert (stats["skipped"], other["skipped"], other["steps"]) == (0, 3, 5)


@pytest.mark.parametrize("name", suitable())
def test_interrupted_is_uninterrupted(name: str) -> None:
    options = example(name)
    if "feedback" in METHODS[name].options.model_fields and name != "signsgd":
        options["feedback"] = True
    whole = run_ranks(3, lambda comm: train(comm, options, range(6))[0])
    saved = [state for _, state, _ in run_ranks(3, lambda comm: train(comm, options, range(3)))]
    rest = run_ranks(3, lambda comm: train(comm, options, range(3, 6), saved=saved)[0])
    for expected, got in zip(whole, rest, strict=True):
        assert all(torch.equal(e[n], g[n]) for e, g in zip(expected[3:], got, strict=True) for n in SHAPES)


def test_another_number_of_ranks_starts_afresh_with_a_warning() -> None:
    method = {"name": "topk", "ratio": 0.1, "feedback": True}
    saved = [state for _, state, _ in run_ranks(2, lambda comm: train(comm, method, range(3)))]
    with pytest.warns(UserWarning, match=r"rank 0 of 2 is loaded by rank 0 of 3"):
        again = run_ranks(3, lambda comm: train(comm, method, range(3, 4), saved=[*saved, saved[0]]))
    fresh = run_ranks(3, lambda comm: train(comm, method, range(3, 4)))
    for (got, state, _), (expected, _, _) in zip(again, fresh, strict=True):
        assert state["step"] == 4
        assert torch.equal(got[0]["fc"], expected[0]["fc"]), "without residuals"


def test_state_of_another_method_is_refused() -> None:
    saved = [state for _, state, _ in run_ranks(2, lambda comm: train(comm, "signsgd", range(1)))]
    with pytest.raises(ConfigError, match=r"state_dict: method: expected .*bf16.*, got .*signsgd"):
        run_ranks(2, lambda comm: train(comm, "bf16", range(1), saved=saved))


def test_small_and_flat_tensors_are_exact_unless_asked_otherwise() -> None:
    def exact(settings: dict[str, Any]) -> set[str]:
        got = run_ranks(2, lambda comm: train(comm, "signsgd", range(1), **settings)[0])[0][0]
        mean = {n: (gradients(0, 0)[n] + gradients(1, 0)[n]) / 2 for n in SHAPES}
        return {n for n in SHAPES if torch.allclose(got[n], mean[n])}

    assert exact({}) == {"norm", "bias"}
    assert exact({"exact_below": 250}) == {"norm", "bias", "conv"}
    assert exact({"exact_below": 0}) == set()


def test_compression_starts_after_so_many_steps() -> None:
    got = run_ranks(2, lambda comm: train(comm, "signsgd", range(4), start_after=2)[0])[0]
    assert [bool((g["fc"].abs() == 1).all()) for g in got] == [False, False, True, True]


def test_elementwise_methods_go_in_groups_and_the_others_whole() -> None:
    def groups(comm: Comm, method: Any) -> list[tuple[str, ...]]:
        return [g.names for g in Reducer(SHAPES, method, comm, exact_below=200, group_mb=0.005).groups]

    apart = [("out",), ("fc",), ("conv",), ("norm", "bias")]
    whole = [("conv", "fc", "out"), ("norm", "bias")]
    for method, expected in (
        ({"name": "topk", "ratio": 0.1}, apart),
        ({"name": "topk", "k": 50}, whole),
        ({"name": "lookback", "scope": "tensor"}, apart),
        ({"name": "lookback"}, whole),
    ):
        assert run_ranks(2, lambda comm, method=method: groups(comm, method)) == [expected] * 2


def test_a_large_parameter_goes_alone_and_the_small_ones_around_it_together() -> None:
    shapes = {"a": (30, 40), "b": (300, 40), "c": (10, 40), "d": (20, 40)}

    def groups(comm: Comm, mb: float) -> list[tuple[str, ...]]:
        return [g.names for g in Reducer(shapes, "signsgd", comm, exact_below=0, group_mb=mb).groups]

    # A group comes when its last gradient does, from the last parameter to the first.
    for numbers, expected in (
        (12000, [("b",), ("d", "c", "a")]),
        (1200, [("d", "c"), ("b",), ("a",)]),
        (1600, [("d", "c"), ("b",), ("a",)]),
        (12001, [("d", "c"), ("b",), ("a",)]),
        (12400, [("d", "c"), ("b",), ("a",)]),
        (13200, [("d", "c", "b"), ("a",)]),
        (20000, [("d", "c", "b", "a")]),
    ):
        mb = numbers * 4 / 2**20
        assert run_ranks(2, lambda comm, mb=mb: groups(comm, mb)) == [expected] * 2, numbers


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("method", ["signsgd", {"name": "topk", "ratio": 0.1, "feedback": True}], ids=str)
def test_a_gradient_that_is_all_of_a_group_is_averaged_where_it_lies(method: Any, scale: float) -> None:
    """With the same result as from a group's own memory, whose place it then takes; others are copied."""

    def train(comm: Comm, where: str) -> tuple[list[Tensor], list[bool]]:
        reducer, got, there = Reducer({"w": (30, 40)}, method, comm), [], []
        (group,) = reducer.groups
        for t in range(4):
            gradient = gradients(comm.rank, t)["fc"] * scale
            if where == "strided":
                gradient = torch.stack([gradient, gradient], -1)[..., 0]
            if where == "double":
                gradient = gradient.double()
            group.fill("w", gradient, scale)
            there.append(group.flat_D.data_ptr() == gradient.data_ptr())
            reducer.reduce(0)
            group.answer("w", gradient, scale)
            got.append(gradient.float() / scale)
        return got, there

    for ways in zip(
        *(run_ranks(2, lambda comm, w=w: train(comm, w)) for w in ("whole", "strided", "double")), strict=True
    ):
        (whole, there), (strided, copied), (double, converted) = ways
        assert all(there)
        assert not any(copied + converted)
        for a, b, c in zip(whole, strided, double, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


def test_a_gradient_of_another_kind_is_not_copied_into_the_one_before() -> None:
    def train(comm: Comm) -> None:
        reducer = Reducer({"w": (30, 40)}, "signsgd", comm)
        (group,) = reducer.groups
        first = gradients(comm.rank, 0)["fc"]
        group.fill("w", first, 1.0)
        reducer.reduce(0)
        group.answer("w", first, 1.0)
        kept = first.clone()
        second = gradients(comm.rank, 1)["fc"].double()
        group.fill("w", second, 1.0)
        assert torch.equal(first, kept)
        reducer.reduce(0)
        group.answer("w", second, 1.0)
        assert torch.equal(first, kept)
        assert bool((second.abs() == 1).all())

    run_ranks(2, train)


def test_equal_groups_draw_different_numbers() -> None:
    shapes = {"a": (40, 40), "b": (40, 40)}

    def chosen(comm: Comm) -> list[Tensor]:
        reducer = Reducer(shapes, {"name": "randomk", "ratio": 0.1}, comm, group_mb=0.01)
        for group in reducer.groups:
            group.flat_D.fill_(1)
        for index in range(len(reducer.groups)):
            reducer.reduce(index)
        return [group.flat_D != 0 for group in reducer.groups]

    a, b = run_ranks(2, chosen)[0]
    assert not torch.equal(a, b)


def test_look_back_parts_have_owners_that_alone_keep_them() -> None:
    method = {"name": "lookback", "scope": "tensor", "threshold": 0.5}
    gathered = run_ranks(2, lambda comm: train(comm, method, range(5), exchange="gather"))
    owned = run_ranks(2, lambda comm: train(comm, method, range(5), exchange="owner"))
    for (expected, _, stats), (got, _, other) in zip(gathered, owned, strict=True):
        for e, g in zip(expected, got, strict=True):
            assert all(torch.allclose(e[n], g[n], atol=1e-6) for n in SHAPES)
        assert other["kept_bytes"] < stats["kept_bytes"]
    with pytest.raises(ConfigError, match="exchange: owner averages parts"):
        run_ranks(2, lambda comm: train(comm, "lookback", range(1), exchange="owner"))


def test_agreeing_look_back_steps_cost_scalars() -> None:
    def bytes_of_steps(comm: Comm) -> list[float]:
        reducer = Reducer(SHAPES, {"name": "lookback", "threshold": 0.9}, comm, exact_below=200)
        totals = []
        for _ in range(3):
            before = reducer.groups[0].payload
            average(reducer, gradients(comm.rank, 0))
            totals.append(reducer.groups[0].payload - before)
        return totals

    assert run_ranks(3, bytes_of_steps) == [[4 * D + 1, 5, 5]] * 3


def test_what_cannot_be_a_hook_names_the_way_out() -> None:
    for method in (
        {"name": "prune", **METHODS["prune"].example},
        {"name": "lookback", "keep": "clustered"},
    ):
        with pytest.raises(ConfigError, match="this one changes parameters itself; train with it through"):
            run_ranks(2, lambda comm, method=method: Reducer(SHAPES, method, comm))


def test_ranks_that_disagree_find_out_at_once() -> None:
    cases: list[tuple[Any, dict[str, Any], dict[str, tuple[int, ...]], str]] = [
        ("topk", {}, SHAPES, r"method\.name: rank 0 has 'signsgd', rank 1 has 'topk'"),
        ("signsgd", {"seed": 3}, SHAPES, r"seed: rank 0 has 0, rank 1 has 3"),
        ("signsgd", {}, {**SHAPES, "fc": (40, 30)}, r"parameters\.fc: rank 0 has \[30, 40\]"),
    ]
    for method, settings, shapes, message in cases:

        def start(comm: Comm, method: Any = method, settings: Any = settings, shapes: Any = shapes) -> None:
            if comm.rank == 0:
                Reducer(SHAPES, "signsgd", comm)
            else:
                Reducer(shapes, method, comm, **settings)

        with pytest.raises(CommError, match=message):
            run_ranks(2, start)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"group_mbs: unknown key; .*group_mb"):
        run_ranks(1, lambda comm: Reducer(SHAPES, "bf16", comm, group_mbs=3))
    with pytest.raises(ConfigError, match="exact_below: expected greater than or equal to 0"):
        run_ranks(1, lambda comm: Reducer(SHAPES, "bf16", comm, exact_below=-1))


def test_parts_go_by_methods_of_their_own() -> None:
    """Each as it goes alone: from equal gradients of the others nothing changes."""
    names = sorted(SHAPES)
    rules = [
        {"match": names[0], "travels": "exact"},
        {"match": names[-1], "travels": {"name": "topk", "ratio": 0.1, "feedback": True}},
    ]

    def job(comm: Comm, parts: Any) -> Any:
        reducer = Reducer(SHAPES, "signsgd", comm, exact_below=0, parts=parts)
        got = [average(reducer, gradients(comm.rank, t)) for t in range(3)]
        return got, [(g.names, type(g.method.up).__name__) for g in reducer.groups], reducer.state_dict()

    with_rules = run_ranks(2, lambda comm: job(comm, rules))
    groups = {name: kind for names_, kind in with_rules[0][1] for name in names_}
    assert groups[names[0]] == "Dense"
    assert groups[names[-1]] == "Feedback"
    assert {groups[name] for name in names[1:-1]} == {groups[names[1]]} != {"Dense"}

    def alone(comm: Comm) -> Any:
        one = {names[-1]: SHAPES[names[-1]]}
        reducer = Reducer(one, rules[1]["travels"], comm, exact_below=0)
        return [average(reducer, {names[-1]: gradients(comm.rank, t)[names[-1]]}) for t in range(3)]

    for got, expected in zip(with_rules[0][0], run_ranks(2, alone)[0], strict=True):
        assert torch.equal(got[names[-1]], expected[names[-1]])
    for t, got in enumerate(with_rules[0][0]):
        mean = (gradients(0, t)[names[0]] + gradients(1, t)[names[0]]) / 2
        torch.testing.assert_close(got[names[0]], mean)
    saved = with_rules[0][2]
    with pytest.raises(ConfigError, match="settings"):
        Reducer(SHAPES, "signsgd", solo(), exact_below=0).load_state_dict(saved)
    for wrong, message in (
        ([{"match": "nothing", "travels": "exact"}], "fits none of the parameters"),
        ([{"match": "*", "travels": "local"}], "expected exact or a method, got local"),
    ):
        with pytest.raises(ConfigError, match=message):
            Reducer(SHAPES, "signsgd", solo(), parts=wrong)
