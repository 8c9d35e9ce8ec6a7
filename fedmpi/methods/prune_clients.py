"""Prune-m with a mask for each client, chosen by itself.

Source: "Stationarity of Crucial Gradients in Deep Neural Networks", section 5.2 and the conclusion: where clients
hold different data, their crucial gradients lie elsewhere, and it is not best to prune the same ones for
all. The alternative that the paper names is the union of the clients' crucial sets; it has no algorithm.

Readings:

- A client's first epoch is the first round that its message comes from: its mask is the m entries of largest
  magnitude of that round's own gradient, ties as in :mod:`fedmpi.methods.prune`. It uploads the mask once,
  with that message, as m indices or as a bit map of D bits, whichever is smaller.
- From that message on, it sends what the inner method chooses among its own m (the gradients beside its mask are
  dropped, and no error feedback keeps them), with indices that count among them.
- The model keeps the union of the masks that came in the run's first epoch. Who comes later chooses from that.
- Local training starts from the global model (Algorithm 1's last line), not from a model cut down to the client's
  own mask: where each client held one or two labels, the latter learned little.

Shape suffixes: C clients, N of them with a new mask, D parameters, M in a client's mask, U in the union.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmpi import random
from fedmpi.errors import MessageError
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, State, nest, unnest
from fedmpi.ops import bits
from fedmpi.ops.select import top_k
from fedmpi.spec import Spec


def as_indices(m: int, size: int) -> bool:
    """Whether ``m`` of ``size`` positions are smaller as indices than as a bit map."""
    return bits.nbytes(m, bits.index_width(size)) < bits.nbytes(size)


class ClientMasks(Compressor):
    """``inner`` codes the m numbers of a client's own mask, which both ends keep as D bits; all 0: none yet.

    The masks' union is the server's to find: what sums is the gradient, and for each parameter who has just
    put it into a mask, 2·D numbers.
    """

    replayable = False  # a message is decoded with the client's mask

    def __init__(self, spec: Spec, inner: Compressor, key: int) -> None:
        super().__init__(spec, 2 * spec.size)
        self.inner, self.key, self.m, self.params = inner, key, inner.spec.size, spec.size
        self.width = bits.index_width(spec.size)
        self.form = "mask.index" if as_indices(self.m, spec.size) else "mask.map"

    def init(self) -> State:
        return self.init_peer() | nest(self.inner.init())

    def init_peer(self) -> State:
        return {"mask": torch.zeros(bits.nbytes(self.params), dtype=torch.uint8)}

    def layout(self) -> Layout:
        row = bits.nbytes(self.m, self.width) if self.form == "mask.index" else bits.nbytes(self.params)
        inner = {f"inner.{name}": field for name, field in self.inner.layout().items()}
        return inner | {self.form: Field(torch.uint8, (row,), ragged=True)}

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        new, new_N = self._new(state)
        chosen_NM = self._choose(g_CD[new_N], ctx.shared["kept"])
        map_NB = bits.pack(torch.zeros_like(g_CD[new_N], dtype=torch.bool).scatter_(1, chosen_NM, True))
        mask_CB = state["mask"].index_copy(0, new_N, map_NB)
        g_CM = g_CD.gather(1, self._kept(mask_CB))
        message, after = self.inner.compress(g_CM, unnest(state), ctx)
        sent = bits.pack_integers(chosen_NM, self.width) if self.form == "mask.index" else map_NB
        rows_C = torch.zeros(len(g_CD), dtype=torch.int64, device="cpu").index_fill_(0, new, 1)
        arrays = nest(message.arrays) | {self.form: sent}
        return Message(arrays, {self.form: rows_C}), {"mask": mask_CB, **nest(after)}

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        (new, new_N), rows_C = self._new(peer), message.lengths[self.form]
        expected_C = torch.zeros_like(rows_C).index_fill_(0, new, 1)
        if not torch.equal(rows_C, expected_C):
            raise MessageError(
                f"message: {rows_C.tolist()} masks of clients {ctx.clients_C.tolist()}, expected {expected_C.tolist()}"
            )
        mask_ND = self._read(message.arrays[self.form], ctx.shared["kept"])
        mask_CB = peer["mask"].index_copy(0, new_N, bits.pack(mask_ND))
        v_CM, _ = self.inner.decompress(Message(unnest(message.arrays)), {}, ctx)
        v_CS = v_CM.new_zeros(len(v_CM), self.size).scatter_(1, self._kept(mask_CB), v_CM)
        v_CS[new_N, self.params :] = mask_ND.to(v_CS.dtype)
        return v_CS, {"mask": mask_CB}

    def lift(self, v_CS: Tensor, ctx: Context) -> Tensor:
        return v_CS[:, : self.params]

    def _new(self, state: State) -> tuple[Tensor, Tensor]:
        """Rows of the clients that have no mask, int64 ``(N,)``: on the CPU, and where the masks lie."""
        new = (state["mask"] == 0).all(1).cpu().nonzero()[:, 0]
        return new, new.to(state["mask"].device)

    def _kept(self, mask_CB: Tensor) -> Tensor:
        """The positions in each client's mask, int64 ``(C, M)``, increasing."""
        return bits.unpack(mask_CB, self.params).nonzero()[:, 1].view(len(mask_CB), self.m)

    def _choose(self, g_ND: Tensor, kept_U: Tensor) -> Tensor:
        """Masks from gradients, among the union where there is one: positions, int64 ``(N, M)``, increasing."""
        order = random.permutation(self.key, self.params, g_ND.device)  # top_k takes the first of equals
        if len(kept_U):
            order = order[torch.isin(order, kept_U)]
        return order[top_k(g_ND[:, order], self.m)].sort(1).values

    def _read(self, sent: Tensor, kept_U: Tensor) -> Tensor:
        """Uploaded masks, bool ``(N, D)``.

        Raises:
          MessageError: one that has not m different positions, or some beside the union.
        """
        if self.form == "mask.map":
            mask_ND = bits.unpack(sent, self.params)
        else:
            index_NM = bits.unpack_integers(sent, self.m, self.width)
            if index_NM.numel() and int(index_NM.max()) >= self.params:
                raise MessageError(
                    f"message: a mask with {int(index_NM.max())}, expected less than {self.params}"
                )
            mask_ND = sent.new_zeros(len(sent), self.params, dtype=torch.bool).scatter_(1, index_NM, True)
        valid_ND = mask_ND[:, kept_U] if len(kept_U) else mask_ND
        if bool((mask_ND.sum(1) != self.m).any()) or bool((valid_ND.sum(1) != self.m).any()):
            raise MessageError(
                f"message: masks of {valid_ND.sum(1).tolist()} parameters that the model keeps, expected {self.m}"
            )
        return mask_ND
