"""What a checkpoint of this run can hold: names, dtypes, shapes and values of every entry, checked before any is taken.

A state's schema is what the method itself starts with: each entry of ``init`` has its name, dtype and shape for good,
but for histories, which start without rows and get some.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedmpi.engine.manifest import BEST, MANIFEST, Manifest
from fedmpi.errors import CheckpointError, FedMPIError
from fedmpi.message import is_position, row_nbytes
from fedmpi.method import Method, Server, State

if TYPE_CHECKING:
    from fedmpi.engine.rounds import Simulation

_NEAR = 1e-3  # another machine's last bits may differ, of what a view makes anew


def check_manifest(folder: Path, described: Manifest, simulation: Simulation) -> None:
    """The totals, and whose states the files hold.

    Raises:
      CheckpointError: this run could not have written them after so many rounds.
    """
    path, totals, config = folder / MANIFEST, described.totals, simulation.config
    for name, ours in (("bytes", simulation.bytes), ("counts", simulation.counts)):
        got: dict[str, int] = getattr(totals, name)
        if got.keys() != ours.keys():
            raise CheckpointError(f"{path}: totals.{name}: expected {', '.join(ours)}, got {', '.join(got)}")
        if negative := [key for key, value in got.items() if not 0 <= value < 2**63]:
            raise CheckpointError(
                f"{path}: totals.{name}.{negative[0]}: expected 0 or more, got {got[negative[0]]}"
            )
    for way in ("upload", "download"):
        if totals.bytes[f"{way}_values"] > totals.bytes[way]:
            raise CheckpointError(
                f"{path}: totals.bytes.{way}_values: expected at most {totals.bytes[way]}, the bytes in all, got "
                f"{totals.bytes[f'{way}_values']}"
            )
    trained, most = sum(rank.trained for rank in described.ranks), described.round * config.largest_cohort
    for name, value, limit in (
        ("totals.called", totals.called, most),
        ("totals.participations", totals.participations, totals.called),
        ("ranks.trained", trained, totals.called),
        ("ranks.sent", sum(rank.sent for rank in described.ranks), 2**62),
    ):
        if value > limit:
            raise CheckpointError(f"{path}: {name}: expected at most {limit}, got {value}")
    numbers = {"seconds": described.seconds, "totals.simulated_seconds": totals.simulated_seconds}
    for name, number in numbers.items():
        if not 0 <= number < math.inf:
            raise CheckpointError(f"{path}: {name}: expected a finite number of at least 0, got {number}")
    if totals.measures.keys() != simulation.measures.keys():
        expected, got_names = ", ".join(simulation.measures) or "none", ", ".join(totals.measures) or "none"
        raise CheckpointError(f"{path}: totals.measures: expected {expected}, got {got_names}")
    peaks = {name: peak.value for name, peak in totals.peaks.items()}
    for key, values in (("measures", totals.measures), ("peaks", peaks)):
        for measure, found in values.items():
            low, high = simulation.goals.bounds(measure)
            if found is not None and not (low <= found <= high and math.isfinite(found)):
                expected = "a finite number" if math.isinf(high) else "0 to 1"
                raise CheckpointError(f"{path}: totals.{key}.{measure}: expected {expected}, got {found}")
    _check_goals(path, described, simulation)
    if not described.ranks:
        raise CheckpointError(f"{path}: ranks: expected at least one, got none")
    seen: dict[str, set[int]] = {}
    stores = simulation.kept()
    for file_name, file in described.files.items():
        if not file.store:
            continue
        if file.store not in stores:
            raise CheckpointError(f"{path}: expected a store of {', '.join(stores)}, got {file.store!r}")
        before = seen.setdefault(file.store, set())
        wrong = [client for client in file.clients if client >= config.clients]
        if wrong:
            raise CheckpointError(
                f"{path}: files.{file_name}: expected clients below {config.clients}, got {wrong[0]}"
            )
        if len(set(file.clients)) < len(file.clients) or before & set(file.clients):
            raise CheckpointError(f"{path}: files.{file_name}: expected each client once, got one twice")
        before.update(file.clients)


def _check_goals(path: Path, described: Manifest, simulation: Simulation) -> None:
    """The best values so far, and whether the run is over."""
    goals, totals = simulation.goals, described.totals
    if foreign := totals.peaks.keys() - goals.watched:
        raise CheckpointError(
            f"{path}: totals.peaks: expected {', '.join(sorted(goals.watched)) or 'none'}, got {min(foreign)!r:.100}"
        )
    for name, peak in totals.peaks.items():
        if peak.round >= described.round:
            raise CheckpointError(
                f"{path}: totals.peaks.{name}.round: expected less than {described.round}, got {peak.round}"
            )
    if totals.ended and (goals.stop is None or goals.stop.metric not in totals.peaks):
        raise CheckpointError(
            f"{path}: totals.ended: expected none without a best value, got {totals.ended!r:.100}"
        )
    if (goals.best in totals.peaks) != (BEST in described.files):
        raise CheckpointError(
            f"{path}: expected a file {BEST} with the best value of {goals.best}, and only with it"
        )


def check_best(path: Path, tensors: State, theta_X: Tensor) -> None:
    """The best model so far; ``theta_X`` is the one that the run began with.

    Raises:
      CheckpointError: it is no model of this run.
    """
    _check_names(path, "best", tensors, {"x": theta_X})
    _check_shape(path, "x", tensors["x"], tuple(theta_X.shape))
    if not bool(tensors["x"].isfinite().all()):
        raise CheckpointError(f"{path}: x: expected finite numbers, got a NaN or an infinity")


def _values_of(way: str, total: int, method: Method) -> tuple[int, int]:
    """How many of ``total`` bytes can be of values, not of positions: the least and the most."""
    rule = method.server.downloads()
    if way == "download":
        return (0 if rule is None or any(map(is_position, rule)) else total), total
    layouts = [codec.layout() for codec in method.passes]
    if not any(is_position(name) for layout in layouts for name in layout):
        return total, total
    row = row_nbytes(layouts[0]) if len(layouts) == 1 else None
    if not row:
        return 0, total
    values = row_nbytes({name: field for name, field in layouts[0].items() if not is_position(name)})
    assert values is not None, "no array of the layout is ragged"
    return total // row * values, total // row * values


def check_metrics(path: Path, data: bytes, described: Manifest, simulation: Simulation) -> None:
    """The lines of metrics: each round once, with the fields that this run writes, which add up to the totals.

    Raises:
      CheckpointError: they are others.
    """
    counted = {
        "clients": described.totals.participations,
        "upload_bytes": described.totals.bytes["upload"],
        "download_bytes": described.totals.bytes["download"],
        **described.totals.counts,
    }
    measured = {"loss", *simulation.measures}
    fields = {"round", "seconds", *counted, *measured}
    fields |= set() if simulation.clock is None else {"simulated_seconds"}
    lines, sums = data.splitlines(), dict.fromkeys(counted, 0)
    shown: dict[str, float | None] = dict.fromkeys(simulation.measures)  # by the last evaluation
    if len(lines) != described.round or not data.endswith(b"\n"):
        raise CheckpointError(f"{path}: expected {described.round} lines, one a round, got {len(lines)}")
    for t, text in enumerate(lines):
        try:
            line: Any = json.loads(text)
        except (ValueError, RecursionError):
            raise CheckpointError(f"{path}, line {t + 1}: expected JSON, got {text[:40]!r}") from None
        if not isinstance(line, dict) or line.keys() != fields:
            got = ", ".join(sorted(line)) if isinstance(line, dict) else type(line).__name__
            raise CheckpointError(
                f"{path}, line {t + 1}: expected {', '.join(sorted(fields))}, got {got:.300}"
            )
        for name, value in line.items():
            whole = name in counted or name == "round"
            fits = type(value) is int and value >= 0 if whole else type(value) in (int, float)
            if name.endswith("seconds"):
                fits = fits and 0 <= value < math.inf
            if not (fits or (value is None and name in measured)):
                expected = "a whole number of at least 0" if whole else "a number"
                raise CheckpointError(f"{path}, line {t + 1}: {name}: expected {expected}, got {value!r:.40}")
        if line["round"] != t:
            raise CheckpointError(f"{path}, line {t + 1}: expected round {t}, got {line['round']}")
        if any(line[name] is not None for name in shown):
            shown = {name: line[name] for name in shown}
        sums = {name: n + line[name] for name, n in sums.items()}
    for name, total in counted.items():
        if sums[name] != total:
            raise CheckpointError(
                f"{path}: {name}: expected {total} in all, by the manifest, got {sums[name]}"
            )
    if described.totals.measures != shown:
        raise CheckpointError(
            f"{path.parent / MANIFEST}: totals.measures: expected {shown}, of the last evaluation in {path.name}, got "
            f"{described.totals.measures}"
        )
    for way in ("upload", "download"):
        total, got_values = described.totals.bytes[way], described.totals.bytes[f"{way}_values"]
        least, most = _values_of(way, total, simulation.method)
        if not least <= got_values <= most:
            raise CheckpointError(
                f"{path.parent / MANIFEST}: totals.bytes.{way}_values: expected "
                f"{least if least == most else f'{least} to {most}'} of {total} bytes in all, got {got_values}"
            )


def check_state(
    path: Path, server: State, ledger: State, described: Manifest, simulation: Simulation, theta_D: Tensor
) -> None:
    """The server's state and the ledger; ``theta_D`` are the parameters that the run began with.

    Raises:
      CheckpointError: this run's method and number of clients cannot have come to them in so many rounds.
    """
    rule, totals = simulation.method.server, described.totals
    fresh = rule.init(theta_D)
    _check_names(path, "server", server, fresh)
    check_ledger(path, ledger, simulation)
    most = max(described.round + 2, len(theta_D))  # rows of a history, or numbers of parameters
    shapes = rule.shapes(theta_D, server)
    for name, value in server.items():
        _check_shape(path, f"server.{name}", value, shapes[name])
        if value.ndim and len(value) > max(most, len(fresh[name])):
            raise CheckpointError(f"{path}: server.{name}: expected at most {most} rows, got {len(value)}")
        _check_values(path, f"server.{name}", value, most)
    version, seen = int(server["version"]), int(ledger["seen"].max())
    if version > described.round + 1:
        raise CheckpointError(
            f"{path}: server.version: expected at most {described.round + 1}, as rounds allow, got {version}"
        )
    if seen > version:
        raise CheckpointError(f"{path}: ledger.seen: expected at most the version {version}, got {seen}")
    for way in ("upload", "download"):
        counted, total = sum(ledger[way].tolist()), totals.bytes[way]
        if counted > total or (counted < total and not described.lost_ranks):
            raise CheckpointError(
                f"{path}: ledger.{way}: expected {total} bytes in all, by the manifest, got {counted}"
            )
    sent = set(ledger["upload"].nonzero()[:, 0].tolist())
    for name in (name for name, kept in simulation.kept().items() if not kept.store.empty):
        came = {c for file in described.files.values() if file.store == name for c in file.clients}
        if sent - came and not described.lost_ranks:
            raise CheckpointError(
                f"{path}: expected the state of client {min(sent - came)}, which sent messages, got none ({name})"
            )
    _check_history(path, rule, server, theta_D, ledger["seen"].unique().tolist())


def check_ledger(path: Path, ledger: State, simulation: Simulation) -> None:
    """Raises CheckpointError when it is not one of this run's clients."""
    expected = dict(vars(simulation.ledger))
    _check_names(path, "ledger", ledger, expected)
    for name, value in ledger.items():
        _check_shape(path, f"ledger.{name}", value, tuple(expected[name].shape))
        _check_values(path, f"ledger.{name}", value, 2**62)


def _check_history(path: Path, rule: Server, server: State, theta_D: Tensor, seen: list[int]) -> None:
    """Whoever knows θ₀ and catches up with the state has its parameters: so do its histories fit, and one another."""
    expected_D = rule.parameters(server)
    try:
        version = int(server["version"])
        view = rule.view(theta_D)
        if version:
            view = rule.reconcile(view, rule.download(server, 0), version)
        got_D = rule.parameters(view)
        far = float((got_D.double() - expected_D).norm()) > _NEAR * float(expected_D.double().norm() + 1)
        for old in [old for old in seen if old < version]:
            rule.download(server, old)
    except (FedMPIError, RuntimeError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"{path}: expected a server state that clients can catch up with, got entries that do not fit together "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"[:500]
        ) from None
    if far:
        raise CheckpointError(
            f"{path}: server.theta: expected the parameters that the other entries of the state lead to, got others"
        )


def check_rows(path: Path, clients: int, got: State, template: State) -> None:
    """The states of so many clients, a row each.

    Raises:
      CheckpointError: names, dtypes or shapes are not the ``template``'s, or a number is none.
    """
    expected = {n: (v.dtype, (clients, *v.shape)) for n, v in template.items()}
    layout = {n: (v.dtype, tuple(v.shape)) for n, v in got.items()}
    if layout != expected:
        raise CheckpointError(f"{path}: expected client states {expected}, got {layout}")
    for name, value in got.items():
        _check_values(path, name, value, 2**62)


def _check_names(path: Path, what: str, got: State, expected: State) -> None:
    fits = got.keys() == expected.keys() and all(
        got[n].dtype == expected[n].dtype and got[n].ndim == expected[n].ndim for n in got
    )
    if not fits:
        raise CheckpointError(f"{path}: expected {what} state {_layout(expected)}, got {_layout(got)}")


def _check_shape(path: Path, name: str, got: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(got.shape) != shape:
        raise CheckpointError(f"{path}: {name}: expected {shape}, got {tuple(got.shape)}")


def _check_values(path: Path, name: str, value: Tensor, most: int) -> None:
    if value.is_floating_point():
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{path}: {name}: expected finite numbers, got NaN or infinity")
        if name.endswith("optimizer.variance") and bool((value < 0).any()):
            raise CheckpointError(f"{path}: {name}: expected squares, got a negative number")
    elif value.dtype in (torch.int32, torch.int64) and value.numel():
        least, largest = int(value.min()), int(value.max())
        if least < 0 or largest > most:
            wrong = least if least < 0 else largest
            raise CheckpointError(f"{path}: {name}: expected whole numbers from 0 to {most}, got {wrong}")


def _layout(state: State) -> str:
    return ", ".join(
        f"{name} {str(value.dtype).removeprefix('torch.')}" for name, value in sorted(state.items())
    )
