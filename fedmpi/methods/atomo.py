"""ATOMO with singular vectors ("Spectral-ATOMO"): a few rank-one terms of each layer's gradient.

Source: Wang et al., "ATOMO: Communication-efficient Learning via Atomic Sparsification", NeurIPS 2018:
the estimator of section 2 over the singular value decomposition (section 4), and Algorithm 1 for the
probabilities.

With M = Σ σ_i u_i v_iᵀ an atom is u_i v_iᵀ, and its probability p_i solves: Σp = s, p ≤ 1, least variance
(Σ σ_i²/p_i). Kept atoms are scaled by 1/p_i, so that the expectation of what arrives is M; ``truncated``
keeps the s largest as they are (biased; LBGM's experiments, Azam et al. 2022).

Reproducible: a client's decomposition is LAPACK's, so its last bits (and, among equal singular values,
the atoms) belong to the library and the processor, as those of its gradient do. What travels are the
atoms themselves: whoever decodes them, anywhere, gets the same bits, and neither the signs nor the order
of the vectors that LAPACK chose can matter to anyone but the sender.

Shape suffixes: C clients, D parameters, L layers, N rows and M columns of a layer, R = min(N, M), A atoms
sent by all C clients.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field as Option
from torch import Tensor

from fedmpi import random
from fedmpi.errors import MessageError
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Method, State
from fedmpi.methods.base import Entry, Mean, MeanServer, Options, Setup
from fedmpi.methods.lowrank import Layers, add_outer
from fedmpi.spec import Spec


class AtomoOptions(Options):
    rank: int = Option(
        2, ge=1, description="s, the atoms of a layer: expected (bernoulli) or at most (truncated)"
    )
    sampling: Literal["bernoulli", "truncated"] = Option(
        "bernoulli",
        description="bernoulli: atom i with probability p_i, scaled by 1/p_i (unbiased); truncated: the s "
        "largest",
    )

    @property
    def separable(self) -> bool:
        return True


class Atomo(Compressor):
    """Sends atoms of the layers where s of them take fewer numbers than the layer has; the rest is dense.

    An atom is a row of N + M numbers: a unit vector and the other side with σ/p in it. Each layer's number
    of atoms differs from client to client and round to round; ``counts`` (one or two bytes a layer) says it.
    """

    counters = ("atoms",)

    def __init__(self, spec: Spec, rank: int, sampling: str) -> None:
        super().__init__(spec)
        self.rank, self.bernoulli = rank, sampling == "bernoulli"
        self.layers = Layers(spec, rank)
        # A factored layer's rank is above s, so s needs no clamping here.
        self.most = [min(f.rows, f.columns) if self.bernoulli else rank for f in self.layers.factored]
        self.count_dtype = next(
            t
            for t in (torch.uint8, torch.int16, torch.int32)
            if max(self.most, default=0) <= torch.iinfo(t).max
        )

    def layout(self) -> Layout:
        layout = {"counts": Field(self.count_dtype, (len(self.layers.factored),))}
        for layer in self.layers.factored:
            layout[f"{layer.name}.atoms"] = Field(torch.float32, (layer.rows + layer.columns,), ragged=True)
        return layout | {"dense": Field(torch.float32, (self.layers.dense_size,))}

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        counts_CL = torch.zeros(len(g_CD), len(self.layers.factored), dtype=torch.int64, device="cpu")
        arrays, lengths = {"counts": counts_CL}, {}
        for index, layer in enumerate(self.layers.factored):
            left_CRN, right_CRM, sigma_CR = decompose(layer.of(g_CD).double())
            if self.bernoulli:
                p_CR = probabilities(sigma_CR, self.rank)
                keys_C = ctx.keys(f"atoms {layer.name}")
                keep_CR = random.uniform(keys_C, sigma_CR.shape[1], g_CD.device) < p_CR
            else:
                p_CR = torch.ones_like(sigma_CR)
                places_R = torch.arange(sigma_CR.shape[1], device=g_CD.device)
                keep_CR = (places_R < self.rank) & (sigma_CR > 0)
            keep_CR = keep_CR.cpu()  # whose atoms are how many: the host wants to know
            rows_A, atoms_A = keep_CR.nonzero().to(g_CD.device).unbind(1)
            scaled_AM = right_CRM[rows_A, atoms_A] / p_CR[rows_A, atoms_A][:, None]
            arrays[f"{layer.name}.atoms"] = torch.cat([left_CRN[rows_A, atoms_A], scaled_AM], dim=1).float()
            counts_CL[:, index] = lengths[f"{layer.name}.atoms"] = keep_CR.sum(1)
        counts = counts_CL.to(self.count_dtype).to(g_CD.device)
        arrays |= {"counts": counts, "dense": self.layers.dense(g_CD)}
        return Message(arrays, lengths), state

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        """The sum of the atoms.

        Raises:
          MessageError: ``counts`` do not match the atoms that came, or exceed what the sampling can give.
        """
        counts_CL = message.arrays["counts"].cpu().long()
        for index, (layer, most) in enumerate(zip(self.layers.factored, self.most, strict=True)):
            name, count_C = f"{layer.name}.atoms", counts_CL[:, index]
            if not torch.equal(count_C, message.lengths[name]):
                raise MessageError(f"message: {name!r} has other rows than 'counts' says")
            if len(count_C) and int(count_C.max()) > most:
                raise MessageError(f"message: {int(count_C.max())} {name!r}, expected at most {most}")
        v_CD = self.layers.with_dense(message.arrays["dense"])
        for index, layer in enumerate(self.layers.factored):
            atoms_A, count_C = message.arrays[f"{layer.name}.atoms"], counts_CL[:, index]
            start_C, v_CNM = count_C.cumsum(0) - count_C, layer.of(v_CD)
            for turn in range(int(count_C.max()) if len(count_C) else 0):
                more = (count_C > turn).nonzero()[:, 0]
                atoms = atoms_A[(start_C[more] + turn).to(atoms_A.device)]
                left, right = atoms.split((layer.rows, layer.columns), dim=1)
                more = more.to(atoms_A.device)
                partial = v_CNM[more]
                add_outer(partial, left, right)
                v_CNM[more] = partial
        return v_CD, peer

    def count(self, message: Message) -> dict[str, int]:
        return {"atoms": int(message.arrays["counts"].sum())}


def decompose(m_CNM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition as atoms: ``(C, R, N)``, ``(C, R, M)`` and σ ``(C, R)``, decreasing.

    One of the two sides is of unit length, the other carries σ. By the eigenvectors U of the smaller
    Gram matrix in float64: on a layer of 512 × 4608 nine times as fast as LAPACK's SVD, and exact where
    it matters: M = Σ u_i (Mᵀu_i)ᵀ holds for every orthonormal U, so the estimate is unbiased however well
    the small σ, which the Gram matrix squares, are separated.
    """
    if m_CNM.shape[1] > m_CNM.shape[2]:
        right, left, sigma_CR = decompose(m_CNM.mT)
        return left, right, sigma_CR
    unit_CRN = torch.linalg.eigh(m_CNM @ m_CNM.mT).eigenvectors.mT
    other_CRM = unit_CRN @ m_CNM
    sigma_CR, order_CR = other_CRM.norm(dim=2).sort(dim=1, descending=True, stable=True)
    return _rows(unit_CRN, order_CR), _rows(other_CRM, order_CR), sigma_CR


def _rows(x: Tensor, order_CR: Tensor) -> Tensor:
    return x.gather(1, order_CR[:, :, None].expand(-1, -1, x.shape[2]))


def probabilities(sigma_CR: Tensor, budget: int) -> Tensor:
    """p with Σp = s and p ≤ 1 (Algorithm 1: water-filling); σ decreasing, s ≤ R.

    The largest atoms get p = 1 as long as σ_i (s − i) > Σ_{j ≥ i} σ_j (i from 0); those after them share the
    rest of the budget in proportion to σ. Zero atoms get 0: Σp < s when fewer than s are left. p is
    rounded up to a multiple of 2^-24, which is the chance that a uniform draw of 24 bits lies below it.
    """
    tail_CR = sigma_CR.flip(1).cumsum(1).flip(1)
    places_R = torch.arange(sigma_CR.shape[1], device=sigma_CR.device)
    left_R = (budget - places_R).clamp(min=1)
    # With one atom left to give, σ_i ≤ Σ_{j ≥ i} σ_j is always true: the first such i exists.
    first_C1 = (sigma_CR * left_R <= tail_CR).int().argmax(1, keepdim=True)
    share_C1 = left_R[first_C1] / tail_CR.gather(1, first_C1)
    p_CR = torch.where(places_R < first_C1, 1.0, sigma_CR * share_C1)
    rounded_CR = (p_CR * 2.0**24).ceil() * 2.0**-24
    return torch.where(sigma_CR > 0, rounded_CR.clamp(max=1.0), 0.0)


def build(options: AtomoOptions, spec: Spec, setup: Setup) -> Method:
    return Method((Atomo(spec, options.rank, options.sampling),), MeanServer(spec, setup.optimizer), Mean())


ENTRY = Entry(
    AtomoOptions,
    build,
    summary="a few singular vectors of each layer, drawn without bias",
    keeps="nothing",
    sums="D",
    source="Wang et al. 2018, Algorithm 1",
    example={"rank": 2},
    variants={"truncated": {"sampling": "truncated"}},
)
