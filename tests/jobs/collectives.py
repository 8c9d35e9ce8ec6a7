"""Every collective of a Comm against what it must give, on the ranks of one launch: ``collectives.py CASE ...``.

A CASE is what ``connect`` takes; ``wrap``: a group that the job itself has started; ``cuda``: tensors on a GPU
over MPI; ``die``: the last rank is killed in the midst of it. Also the suite itself, for threads: :func:`check`.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from fedmpi.comm import Comm, connect
from fedmpi.comm.base import LostError
from fedmpi.errors import CommError

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
)
SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (0,), (7,), (3, 0), (5, 3), (1000,))


device = torch.device("cpu")  # where the tensors lie


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Small whole numbers, exact in every type, other ones on each rank and at each place."""
    n = int(torch.Size(shape).numel())
    return ((torch.arange(n, device=device) * 7 + 3 * rank + 1) % 11).to(dtype).view(shape)


def part(source: int, target: int) -> bytes:
    """A part of its own length for each pair of ranks, some of them empty."""
    length = (0, 1, 300, 5)[(source + 2 * target) % 4]
    return bytes((source * 16 + target + i) % 256 for i in range(length))


def same(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert torch.equal(got, expected)


class Counted:
    """The wire bytes of the calls inside."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def __enter__(self) -> Counted:
        self.before = self.comm.sent, self.comm.received
        return self

    def __exit__(self, *_: object) -> None:
        self.sent, self.received = self.comm.sent - self.before[0], self.comm.received - self.before[1]


def check(comm: Comm) -> None:
    tensors(comm)
    layouts(comm)
    begun(comm)
    frames(comm)
    mistakes(comm)


def tensors(comm: Comm) -> None:
    ranks, others = range(comm.size), comm.size - 1
    for dtype in DTYPES:
        for shape in SHAPES:
            x, rows = values(comm.rank, shape, dtype), values(comm.rank, (comm.size, *shape), dtype)
            with Counted(comm) as sums:
                total = x.clone()
                comm.sum([total])
            same(total, sum(values(r, shape, torch.int64) for r in ranks).to(dtype))
            with Counted(comm) as gathered:
                same(comm.allgather_tensor(x), torch.stack([values(r, shape, dtype) for r in ranks]))
            with Counted(comm) as swapped:
                back = comm.alltoall_tensor(rows)
            expected = [values(r, (comm.size, *shape), dtype)[comm.rank] for r in ranks]
            same(back, torch.stack(expected))
            widened = x.numel() * max(4, x.itemsize)  # small types travel wider where they cannot be added up
            assert sums.sent == sums.received
            assert sums.sent in ((x.nbytes, widened) if others else (0,))
            assert gathered.sent == gathered.received == others * x.nbytes
            assert swapped.sent == swapped.received == others * x.nbytes
            same(x, values(comm.rank, shape, dtype))  # what was given is left alone
            same(rows, values(comm.rank, (comm.size, *shape), dtype))


def layouts(comm: Comm) -> None:
    """Not contiguous, or with a gradient: the same."""
    full = values(comm.rank, (4, 6), torch.float32)
    alls = [values(r, (4, 6), torch.float32) for r in range(comm.size)]
    same(comm.allgather_tensor(full.t()), torch.stack([a.t() for a in alls]))
    same(comm.allgather_tensor(full.clone().requires_grad_()), torch.stack(alls))
    strided = values(comm.rank, (3, comm.size), torch.float32).t()
    expected = [values(r, (3, comm.size), torch.float32).t()[comm.rank] for r in range(comm.size)]
    same(comm.alltoall_tensor(strided), torch.stack(expected))
    total = full.clone()
    comm.sum([total[:, ::2], total.t()[1]])
    wanted = full.clone()
    wanted[:, ::2] = torch.stack(alls).sum(0)[:, ::2]
    wanted[:, 1] = torch.stack(alls).sum(0)[:, 1]
    same(total, wanted)
    result = comm.allgather_tensor(full)
    result += 1  # a result is the caller's own
    same(full, values(comm.rank, (4, 6), torch.float32))


def begun(comm: Comm) -> None:
    """Between a sum's begin and its end other collectives, also another sum, may go out."""
    for dtype in (torch.float32, torch.int16, torch.bfloat16):
        alls = [values(r, (5, 200), dtype) for r in range(comm.size)]
        whole, view = alls[comm.rank].clone(), alls[comm.rank].clone()
        with Counted(comm) as sums:
            finish = comm.start_sum(whole)
            other = comm.start_sum(view[:, ::2])
        gathered = comm.start_allgather_tensor(alls[comm.rank])
        same(comm.allgather_tensor(view[:, 1::2]), torch.stack([a[:, 1::2] for a in alls]))
        other()
        same(gathered(), torch.stack(alls))
        assert comm.allgather(part(comm.rank, 1)) == [part(r, 1) for r in range(comm.size)]
        finish()
        total = sum(a.to(torch.int64) for a in alls).to(dtype)
        same(whole, total)
        same(view[:, ::2], total[:, ::2])
        same(view[:, 1::2], alls[comm.rank][:, 1::2])
        assert (sums.sent > 0) == (comm.size > 1)


def frames(comm: Comm) -> None:
    me, ranks = comm.rank, range(comm.size)
    for root in {0, comm.size - 1}:
        for length in (0, 1, 1000):
            data = bytes(i % 251 for i in range(length))
            with Counted(comm) as bytes_of:
                assert comm.broadcast(data if me == root else b"other", root) == data
            got = (0, 0) if comm.size == 1 else (length, 0) if me == root else (0, length)
            assert (bytes_of.sent, bytes_of.received) == got
        parts = comm.gather(part(me, root), root)
        assert parts == ([part(r, root) for r in ranks] if me == root else [])
    assert comm.allgather(part(me, 1)) == [part(r, 1) for r in ranks]
    assert comm.allgather(b"") == [b""] * comm.size
    with Counted(comm) as swapped:
        assert comm.alltoall([part(me, r) for r in ranks]) == [part(r, me) for r in ranks]
    assert swapped.sent == sum(len(part(me, r)) for r in ranks if r != me)
    assert swapped.received == sum(len(part(r, me)) for r in ranks if r != me)
    assert comm.alltoall([b""] * comm.size) == [b""] * comm.size


def mistakes(comm: Comm) -> None:
    refused(
        lambda: comm.alltoall([b"x"] * (comm.size + 1)), f"expected {comm.size} parts, got {comm.size + 1}"
    )
    rows = comm.size + 1
    refused(
        lambda: comm.alltoall_tensor(torch.zeros(rows, 2)), rf"of {comm.size} rows, got shape \({rows}, 2\)"
    )
    refused(lambda: comm.alltoall_tensor(torch.zeros(())), r"got shape \(\)")
    if comm.name in ("gloo", "nccl"):
        refused(lambda: comm.sum([torch.zeros(2, dtype=torch.complex64)]), "can add, got torch.complex64")


def refused(call: Callable[[], object], message: str) -> None:
    said = "nothing"
    try:
        call()
    except CommError as error:
        said = str(error)
    assert re.search(message, said), said


def beside(comm: Comm, other: Comm) -> None:
    """A thread of its own may use one end while this one uses the other."""
    totals = []

    def work(end: Comm, step: int) -> None:
        for i in range(50):
            total = torch.full((1000,), float(i * step), device=device)
            end.sum([total])
            assert end.alltoall([bytes([i])] * end.size) == [bytes([i])] * end.size
            totals.append((step, i, total[-1].item()))

    thread = threading.Thread(target=work, args=(other, 2))
    thread.start()
    work(comm, 1)
    thread.join()
    assert sorted(totals) == [(step, i, float(i * step * comm.size)) for step in (1, 2) for i in range(50)]


def wrapped() -> Comm:
    """A job's own group and a part of it, which go on after what is done with them here."""
    from fedmpi.comm.torch import TorchComm

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    half = dist.new_group(list(range(dist.get_world_size() // 2)))
    if dist.get_rank() < dist.get_world_size() // 2:
        check(TorchComm(half))
    comm = connect("gloo")  # takes the group that is there
    total = torch.ones(3)
    dist.all_reduce(total)
    assert total.tolist() == [comm.size] * 3
    return comm


def die(comm: Comm) -> None:
    """The last rank ends, in a group of its own with two others; these tell of it, then all do."""
    from fedmpi.comm.torch import TorchComm

    few = dist.new_group([2, 3, 4])
    if comm.rank >= 2:
        sums(TorchComm(few), dies=comm.rank == 4)
        dist.distributed_c10d._get_default_store().set(f"told {comm.rank}", "")
    else:
        dist.distributed_c10d._get_default_store().wait(["told 2", "told 3"])
    sums(comm)
    sys.exit(3)


def sums(comm: Comm, dies: bool = False) -> None:
    try:
        for i in range(10**6):
            if i == 20 and dies:
                os.kill(os.getpid(), signal.SIGKILL)
            others = [comm.start_sum(torch.ones(10)), comm.start_sum(torch.ones(10))]
            comm.sum([torch.ones(1000)])
            for finish in others:
                finish()
    except LostError as error:
        refused(lambda: comm.allgather(b"x"), re.escape(str(error)))  # and stays lost, at once
        print(f"lost: {error}", flush=True)


def main(case: str) -> None:
    global device
    comm = (
        wrapped()
        if case == "wrap"
        else connect("mpi" if case == "cuda" else "gloo" if case == "die" else case)
    )
    if case in ("cuda", "nccl"):
        device = torch.device("cuda", comm.local_rank % torch.cuda.device_count())
    check(comm)
    if "MPI" in comm.name:
        from fedmpi.comm import mpi

        chunk, mpi._CHUNK = mpi._CHUNK, 64  # every message in several pieces, as above 2^30 elements
        check(comm)
        mpi._CHUNK = chunk
        beside(comm, mpi.MPIComm())
    elif case != "nccl":  # whose groups must not be used side by side on one GPU
        from fedmpi.comm.torch import TorchComm

        beside(comm, TorchComm())
    ends = f"{comm.rank} of {comm.size}, {comm.local_rank} of {comm.local_size} here"
    for line in comm.gather(f"{comm.name}: {ends}".encode()):
        print(line.decode(), flush=True)
    if case == "die":
        die(comm)


if __name__ == "__main__":
    for case in sys.argv[1:]:
        main(case)
