"""Compressed gradients in a job that we did not write: a hook for DistributedDataParallel.

    ddp = DistributedDataParallel(model)
    state = fedmpi.ddp.attach(ddp, {"name": "signsgd", "feedback": True})

What goes together is decided by parameter names, not by DDP's buckets: those change after the first backward
pass, and a resumed job starts with other ones than it had. So a bucket's gradients are copied into the groups of
:class:`fedmpi.integrations.reducer.Reducer`, a group is averaged when its last gradient has come, and a bucket
is answered when its groups are done.

All collectives of a rank go out from one thread, in the order in which groups become complete, which is that of
DDP's buckets and so the same on all ranks; none is launched from a future's callback, whose order differs.
They use a process group of their own, of exactly the module's ranks, so that the job's own collectives may go on
beside them.

For plain bf16, chosen or where ``auto`` stays with it, nothing of this is worth its time: each bucket goes whole,
small tensors too, rounded to bf16, into one all-reduce of the job's own group, as torch's ``bf16_compress_hook`` does
it. With a setting that says how tensors travel (``exact_below``, ``parts``, ``start_after``, ``exchange``), with
feedback or over another ``comm`` it goes as every method does, and is summed in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fedmpi.comm.base import Comm, together
from fedmpi.errors import ConfigError
from fedmpi.integrations.job import AnyMethod, Job
from fedmpi.integrations.modules import Same, device_of, hookable, shapes_of, trained, watch
from fedmpi.integrations.ranks import among
from fedmpi.integrations.scaling import look_for_scaler, warn_of_scaler

T = TypeVar("T")


class Scaler(Protocol):
    """A :class:`torch.amp.GradScaler`."""

    def get_scale(self) -> float: ...


class _Bucket:
    """A bucket that DDP waits for."""

    def __init__(self, gradients: dict[str, Tensor], buffer: Tensor, groups: set[int]) -> None:
        self.gradients, self.buffer, self.groups = gradients, buffer, groups
        self.future = _future(buffer)
        self.ready = torch.cuda.Event() if buffer.is_cuda else None
        if self.ready is not None:
            self.ready.record()


def _future(buffer: Tensor) -> torch.futures.Future[Tensor]:
    return torch.futures.Future(devices=[] if buffer.device.type == "cpu" else [buffer.device])


class State:
    """What :func:`attach` returns: the job's view of its compression."""

    def __init__(
        self, job: Job, names: Mapping[Tensor, str], scaler: Scaler | None, group: dist.ProcessGroup | None
    ) -> None:
        """Args: group: the job's, if buckets may go through it as they are."""
        self._job, self._names, self._scaler, self._group = job, names, scaler, group
        self._halves: dict[int, Tensor] = {}  # by bucket
        self._passing = False
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="fedmpi")
        self._left: list[set[str]] = []
        self._waiting: list[_Bucket] = []
        self._sent: list[int] = []  # groups that are to be decoded
        self._error: BaseException | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """None: DDP's copies, in memory (an average's) or in a file, have no hook, whatever they were made from."""
        return type(None), ()

    def _begin(self) -> None:
        if not self._job.settled:  # its collectives go out from the one thread, too
            self._worker.submit(self._job.between_steps).result()
        self._reducer = self._job.reducer
        self._passing = self._group is not None and self._job.plain
        groups = self._reducer.groups
        self._left = (
            [set().union(*(g.names for g in groups))] if self._passing else [set(g.names) for g in groups]
        )

    def stats(self) -> dict[str, Any]:
        """Steps, bytes and seconds so far on this rank (:meth:`Reducer.stats`)."""
        return self._worker.submit(self._job.stats).result()

    def table(self) -> str:
        """A line a message: its tensors, method, bytes."""
        return self._worker.submit(self._job.table).result()

    def state_dict(self) -> dict[str, Any]:
        """This rank's state between two steps: tensors and plain values; every rank saves its own."""
        return self._worker.submit(self._job.state_dict).result()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` stood. Called by all ranks between two steps, each with its own.

        Saved by another number of ranks, steps and the server's memory are taken over, and what each rank kept
        (residuals, look-back gradients) starts afresh, with a warning.

        Raises:
          ConfigError: on all ranks, and nothing has changed: it is no such state, or that of another method, model or
            setting, or the ranks' do not belong together.
        """
        self._worker.submit(self._job.load_state_dict, saved).result()

    def run(self, task: Callable[[Job], T]) -> T:
        """``task`` of the job, between two steps, in the thread that communicates."""
        return self._worker.submit(task, self._job).result()

    def averages(self, other: State) -> bool:
        """Both are for the same parameters, by the same names."""
        return dict(self._names) == dict(other._names)

    def fail(self, error: BaseException) -> None:
        """No step can be finished here any more: the other ranks are told."""
        self._worker.submit(self._break, error)

    def scaled_by(self, scaler: Scaler, optimizer: torch.optim.Optimizer) -> None:
        """A GradScaler that was not given made the first step, on all ranks."""
        warn_of_scaler("fedmpi.ddp.attach")
        self._worker.submit(self._job.forget).result()
        self._scaler = scaler

    def hook(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Called by DDP in each backward pass, in the same order on all ranks."""
        try:
            return self._hook(bucket)
        except BaseException as error:  # after what is under way, which the others take part in
            self.fail(error)
            raise

    def _hook(self, bucket: Any) -> torch.futures.Future[Tensor]:
        if self._job.alone:
            return self._keep(bucket)
        if bucket.index() == 0:
            self._begin()
        names = [self._names[p] for p in bucket.parameters()]
        if self._passing:
            self._left[0].difference_update(names)
            self._look_for_missing(bucket)
            return self._pass(bucket)
        waiting = _Bucket(
            dict(zip(names, bucket.gradients(), strict=True)),
            bucket.buffer(),
            {self._reducer.group_of[name] for name in names},
        )
        complete = []
        for name in names:
            index = self._reducer.group_of[name]
            self._left[index].discard(name)
            if not self._left[index]:
                complete.append(index)
        self._look_for_missing(bucket)
        self._worker.submit(self._work, waiting, sorted(set(complete)), bucket.is_last())
        return waiting.future

    def _look_for_missing(self, bucket: Any) -> None:
        if bucket.is_last() and (missing := sorted(set().union(*self._left))):
            raise ConfigError(
                f"ddp: no bucket has {', '.join(missing)}; a parameter that requires a gradient only since the module "
                "was wrapped is averaged by nobody: wrap it after all parameters are as they will be trained"
            )

    def _keep(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """The bucket as it is: the mean of one rank."""
        self._job.reducer.passed(0, last=bucket.is_last())
        future = _future(bucket.buffer())
        future.set_result(bucket.buffer())
        return future

    def _pass(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """The bucket's mean in bf16: launched here, in DDP's order, and only copied by the callback."""
        assert self._group is not None
        buffer: Tensor = bucket.buffer()
        half = self._halves.get(bucket.index())
        if half is None or half.shape != buffer.shape:
            half = self._halves[bucket.index()] = torch.empty_like(buffer, dtype=torch.bfloat16)
        half.copy_(buffer).div_(self._group.size())
        self._reducer.passed(half.nbytes, last=bucket.is_last())
        future = dist.all_reduce(half, group=self._group, async_op=True).get_future()
        answer: torch.futures.Future[Tensor] = future.then(lambda done: buffer.copy_(done.value()[0]))
        return answer

    def _work(self, bucket: _Bucket, complete: list[int], last: bool) -> None:
        """In the one thread that communicates. What a bucket completes is sent at once, and decoded when the next
        bucket's has been sent: then it had time to come."""
        self._waiting.append(bucket)
        try:
            if self._error is not None:
                raise self._error
            self._enter(bucket.buffer.device)
            self._fill(bucket)
            self._reducer.start(*complete)
            due, self._sent = (self._sent + complete, []) if last else (self._sent, complete)
            for index in due:
                self._reducer.decode(index)
                for waiting in list(self._waiting):
                    waiting.groups.discard(index)
                    if not waiting.groups:
                        self._answer(waiting)
            self._reducer.settle()  # may wait for a device, which goes on with the answers meanwhile
        except Exception as error:
            self._break(error)

    def _break(self, error: BaseException) -> None:
        """The pass cannot be finished: whoever waits gets the error, the other ranks as well, and backward() raises it.
        Nor can another one: ranks may have stopped at different places."""
        self._error = self._error or error
        self._sent.clear()
        for waiting in self._waiting:
            waiting.future.set_exception(error)  # type: ignore[arg-type]
        self._waiting.clear()
        self._job.failed(error)

    def _fill(self, bucket: _Bucket) -> None:
        scale = self._scaler.get_scale() if self._scaler else 1.0
        if bucket.ready is not None:
            bucket.ready.wait()
        for name, gradient in bucket.gradients.items():
            self._reducer.group(name).fill(name, gradient, scale)

    def _answer(self, bucket: _Bucket) -> None:
        scale = self._scaler.get_scale() if self._scaler else 1.0
        for name, gradient in bucket.gradients.items():
            self._reducer.group(name).answer(name, gradient, scale)
        self._waiting.remove(bucket)
        bucket.future.set_result(bucket.buffer)

    def _enter(self, device: torch.device) -> None:
        """From here on this thread has a GPU's stream of its own, beside the backward pass's: for all that it does,
        since what is kept between steps is read by the next one, and saved."""
        if device.type == "cuda" and device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
            torch.cuda.set_stream(self._streams[device])


def _hook(state: State, bucket: Any) -> torch.futures.Future[Tensor]:
    return state.hook(bucket)


_hook.__annotations__.clear()  # DDP compares them with classes, and they are strings here


def init_process_group(backend: str = "auto") -> None:
    """``torch.distributed.init_process_group`` for a process that torchrun, mpirun, mpiexec or srun started.

    Args:
      backend: ``"gloo"``, ``"nccl"``, or ``"auto"``: NCCL where every rank has a GPU of its own.

    Raises:
      CommError: no launcher, a rank that did not come in time, or NCCL where it cannot work.
    """
    from fedmpi.comm.torch import TorchComm

    TorchComm.start(backend)


def attach(
    ddp: DistributedDataParallel,
    method: AnyMethod,
    *,
    comm: Comm | str = "group",
    scaler: Scaler | None = None,
    **settings: Any,
) -> State:
    """Compress the gradients that ``ddp`` averages. Called by all ranks of its process group, once for a module.

    A deep copy of the module, or one from a file, has no hook, as DDP's copies have none: attach anew to train it.

    Args:
      ddp: the job's module, compiled or not, over all ranks or a part of them. Its optimizer, ``no_sync``, gradient
        accumulation and mixed precision stay as they are; a step whose gradient is not finite on any rank leaves what
        is kept between steps alone.
      method: as in a configuration: ``"signsgd"`` or ``{"name": "topk", "ratio": 0.01, "feedback": True}``; or
        ``"auto"``, which tries some in the first steps and keeps the fastest (:mod:`fedmpi.integrations.auto`).
      comm: ``"group"``: messages go through a Gloo group of the same ranks (of one
        rank: gradients stay as they are); ``"mpi"``: through MPI, if the job was started by an MPI launcher; or a
        :class:`fedmpi.comm.Comm`.
      scaler: the job's GradScaler, if it has one: what is kept from step to step must not change with its scale.
      settings: fields of :class:`fedmpi.integrations.settings.Settings`: ``seed``, ``exact_below``, ``start_after``,
        ``steps_per_epoch``, ``group_mb``, ``exchange``.

    Raises:
      ConfigError: options or settings are wrong, or the method cannot work as a hook, or there is one already.
      CommError: the ranks disagree on any of this, or are not those of MPI.
    """
    ddp = hookable(ddp)
    if getattr(ddp, "_fedmpi", None) is not None:
        raise ConfigError("ddp: it has a fedmpi hook already; attach one once, after wrapping the model")
    ranks = among(ddp.process_group, comm)
    with together(ranks, "looking at its parameters"):
        parameters = trained(ddp.module, set(ddp.parameters_to_ignore))
    job = Job(shapes_of(parameters), method, ranks, settings, device_of(parameters))
    group = (ddp.process_group or dist.group.WORLD) if comm == "group" else None
    state = State(job, {p: name for name, p in parameters.items()}, scaler, group)
    try:
        ddp.register_comm_hook(state, _hook)
    except RuntimeError as error:
        raise ConfigError(f"ddp: it has another communication hook already ({error})") from None
    ddp._fedmpi = state  # type: ignore[assignment]
    if scaler is None and not job.alone:
        look_for_scaler(state, parameters.values(), State.scaled_by)
    watch(ddp, Same(ddp.module, parameters, "DistributedDataParallel, and fedmpi.ddp.attach,", state.fail))
    return state


def attach_anew(
    before: State | None, ddp: DistributedDataParallel, method: AnyMethod, who: str, **settings: Any
) -> State:
    """:func:`attach`, to a module that ``who`` has wrapped again: what the last wrapper's hook kept is taken over, if
    it is for the same parameters."""
    state = attach(ddp, method, **settings)
    if before is not None and before.averages(state):
        try:
            state.load_state_dict(before.state_dict())
            state.run(lambda job: job.follow(before._job))
        except ConfigError as error:  # on all ranks
            warnings.warn(
                f"fedmpi: {who} has wrapped its model anew, and what the method kept starts afresh: {error}",
                stacklevel=2,
            )
    return state
