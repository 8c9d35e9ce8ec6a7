"""LBGM with clustered look-back gradients (Azam et al. 2022, appendix C.1, "LBG Clustering").

Readings: the paper names the idea only. Here a client sends the number of the centroid with its message in full
(a byte), and centroids follow the vectors of the round, half the way, as in online k-means.

Shape suffixes: C clients, F those that sent in full, K centroids, S numbers that the inner method sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmpi.errors import MessageError
from fedmpi.message import Field, Layout, Message
from fedmpi.method import Compressor, Context, Round, Server, State, believed, unnest
from fedmpi.methods.lookback_codec import LookBack, LookBackOptions, put_rows


class ClusteredLookBack(LookBack):
    """Look-back gradients as centroids (appendix C.1, LBG clustering): a client keeps a number, not a vector.

    The c centroids are the server's and come with the download when they have changed. A client that sends in
    full says which centroid is nearest (by cosine; one that is still empty is seeded by the clients whose
    id is its number modulo c), and the server moves that one. What sums is the inner vector, and for
    each centroid the vectors that moved it and their weight: (1 + c)·S + c numbers.
    """

    def __init__(self, inner: Compressor, options: LookBackOptions) -> None:
        super().__init__(inner, options)
        self.clusters, self.width = options.clusters, inner.size
        self.size = (1 + self.clusters) * self.width + self.clusters
        self.presence = 0  # it is within the width

    def _own(self) -> State:
        return {"cluster": torch.tensor(-1)}

    def _load(self, state: State, ctx: Context) -> Tensor:
        cluster_C = state["cluster"]
        centroid_CS: Tensor = ctx.shared["centroids"][cluster_C.clamp(min=0)]
        return centroid_CS * (cluster_C >= 0)[:, None]

    def _store(self, state: State, full: Tensor, v_CS: Tensor, inner: Message, *used: Tensor) -> State:
        return {"cluster": state["cluster"]}  # set in compress and decompress, where the choice is known

    def layout(self) -> Layout:
        return super().layout() | {"cluster": Field(torch.uint8, (), ragged=True)}

    def compress(self, g_CD: Tensor, state: State, ctx: Context) -> tuple[Message, State]:
        message, new = super().compress(g_CD, state, ctx)
        full = (message.lengths["rho"] == 0).nonzero()[:, 0]
        there_F = full.to(g_CD.device)
        before = {name: value[there_F] for name, value in unnest(state).items()}
        v_FS, _ = self.inner.decompress(
            self._sent(message, full), believed(self.inner, before), ctx.select(full)
        )
        n = self._vector
        centroids_KS = ctx.shared["centroids"][:, :n].double()
        nearest_F = self._nearest(v_FS[:, :n].double(), ctx.clients_C[full], centroids_KS)
        arrays = message.arrays | {"cluster": nearest_F.to(torch.uint8)}
        lengths = {**message.lengths, "cluster": 1 - message.lengths["rho"]}
        return Message(arrays, lengths), new | put_rows(state, full, {"cluster": nearest_F})

    def _nearest(self, v_FS: Tensor, clients_F: Tensor, centroids_KS: Tensor) -> Tensor:
        norms_K = centroids_KS.norm(dim=1)
        cosine_FK = (v_FS @ centroids_KS.T) / norms_K.clamp(min=torch.finfo(torch.float64).tiny)
        seed_F = clients_F.to(v_FS.device) % self.clusters
        nearest_F = cosine_FK.masked_fill(norms_K == 0, -torch.inf).argmax(1)
        return torch.where(norms_K[seed_F] == 0, seed_F, nearest_F)

    def decompress(self, message: Message, peer: State, ctx: Context) -> tuple[Tensor, State]:
        cluster_F = message.arrays["cluster"].long()
        if len(cluster_F) and int(cluster_F.max()) >= self.clusters:
            raise MessageError(f"message: centroid {int(cluster_F.max())}, expected 0 to {self.clusters - 1}")
        v_CS, new = super().decompress(message, peer, ctx)
        full = (message.lengths["rho"] == 0).nonzero()[:, 0]
        there_F = full.to(v_CS.device)
        moved_CKS = v_CS.new_zeros(len(v_CS), self.clusters, self.width)
        moved_CKS[there_F, cluster_F] = v_CS[there_F]
        weight_CK = v_CS.new_zeros(len(v_CS), self.clusters)
        weight_CK[there_F, cluster_F] = 1
        summed = torch.cat([v_CS, moved_CKS.flatten(1), weight_CK], 1)
        return summed, new | put_rows(peer, full, {"cluster": cluster_F})

    def lift(self, v_CS: Tensor, ctx: Context) -> Tensor:
        return self.inner.lift(v_CS[:, : self.width], ctx)


class ClusterServer(Server):
    """The inner server, and the centroids: one that got vectors moves half the way to their mean (a new one all
    the way). Clients download the centroids that have moved since they last came, and their numbers."""

    def __init__(self, inner: Server, width: int, clusters: int) -> None:
        self.inner, self.width, self.clusters = inner, width, clusters
        self.weighted, self.samples = inner.weighted, inner.samples

    def _with(self, state: State, centroids_KS: Tensor, moved_K: Tensor) -> State:
        return state | {"clusters.centroids": centroids_KS, "clusters.moved": moved_K}

    def init(self, theta_D: Tensor) -> State:
        state = self.inner.init(theta_D)
        moved_K = theta_D.new_zeros(self.clusters, dtype=torch.int64)
        return self._with(state, theta_D.new_zeros(self.clusters, self.width), moved_K)

    def view(self, theta_D: Tensor) -> State:
        centroids_KS = theta_D.new_zeros(self.clusters, self.width)
        return self.inner.view(theta_D) | {"clusters.centroids": centroids_KS}

    def shapes(self, theta_D: Tensor, state: State) -> dict[str, tuple[int, ...]]:
        return super().shapes(theta_D, state) | self.inner.shapes(theta_D, state)

    def finish(self, state: State, mean_S: Tensor, round: Round) -> State:
        v_S, moved, weight_K = mean_S.split([self.width, self.clusters * self.width, self.clusters])
        old_KS, hit_K = state["clusters.centroids"], weight_K > 0
        mean_KS = moved.view(self.clusters, self.width) / weight_K[:, None]
        both_KS = old_KS + mean_KS
        half_KS = torch.where(both_KS.isfinite(), both_KS / 2, old_KS / 2 + mean_KS / 2)
        target_KS = torch.where((old_KS == 0).all(1, keepdim=True), mean_KS, half_KS)
        moved_K = torch.where(hit_K, state["version"] + 1, state["clusters.moved"])
        new = self.inner.finish(self._inner(state), v_S, round)
        return self._with(new, torch.where(hit_K[:, None], target_KS, old_KS), moved_K)

    def skip(self, state: State, round: Round) -> State:
        return state | self.inner.skip(self._inner(state), round)

    @staticmethod
    def _inner(state: State) -> State:
        return {name: value for name, value in state.items() if not name.startswith("clusters.")}

    def download(self, state: State, seen: int) -> Message:
        arrays = dict(self.inner.download(self._inner(state), seen).arrays)
        which_M = (state["clusters.moved"] > seen).nonzero()[:, 0]
        if len(which_M):
            arrays |= {
                "clusters.which": which_M.to(torch.uint8)[None],
                "clusters.centroids": state["clusters.centroids"][which_M][None],
            }
        return Message(arrays)

    def downloads(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]] | None:
        inner = self.inner.downloads()
        which = {"clusters.which": (torch.uint8, (-1,))}
        centroids = {"clusters.centroids": (torch.float32, (-1, self.width))}
        return None if inner is None else {**inner, **which, **centroids}

    def reconcile(self, view: State, message: Message, version: int) -> State:
        centroids_KS = view["clusters.centroids"]
        if "clusters.which" in message.arrays:
            which_M = message.arrays["clusters.which"][0].long()
            centroids_KS = centroids_KS.index_copy(0, which_M, message.arrays["clusters.centroids"][0])
        new = self.inner.reconcile(self._inner(view), Message(self._inner(message.arrays)), version)
        return new | {"clusters.centroids": centroids_KS}

    def parameters(self, state: State) -> Tensor:
        return self.inner.parameters(state)

    def shared(self, state: State) -> State:
        return self.inner.shared(self._inner(state)) | {"centroids": state["clusters.centroids"]}
