"""Data parallelism for models whose weights fit on one GPU: every rank computes with all of them and steps its share.

A rank holds the matrices in the precision that it computes in, fp32 gradients that its GEMMs add to, and, of the fp32
parameters and Adam's moments, the rows that are its own: 6 + 12/S bytes a parameter in bf16, S ranks sharing. Once an
optimizer step, not once a micro-batch, gradients are summed onto their owners and the new weights collected from them
(ZeRO stage 1: Rajbhandari et al. 2020, arXiv:1910.02054). The ranks are a grid:

    mesh (replicate, shard)      each row of ranks shares one copy of parameters and moments; rows repeat it
    (1, W)                       one copy in all
    (nodes, GPUs of a node)      shards travel inside a node only; between nodes, sums of 1/S of the gradients
    (W, 1)                       every rank steps everything: plain data parallelism

    weights = ShardedWeights(model, torch.bfloat16, mesh)
    optimizer = AdamW(param_groups(weights, 0.1), fused=True)
    ...                          # forward and backward of all micro-batches; a forward collects new weights first
    weights.reduce_gradients()
    optimizer.step()
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from lit_gpt.kernels import ComputeWeights

# torch 2.13 renamed both.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class ShardedWeights:
    """Takes over the parameters of `model`, whose values must be the same on all ranks.

    From here on the model's own matrices hold nothing but their shape and their gradient; what an optimizer steps and a
    checkpoint holds are `parameters()`, fp32 DTensors of the same names and global shapes.

    Args:
        dtype: of the matrices in the model's forward and backward.
        mesh: two dimensions, see above.
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, mesh: DeviceMesh) -> None:
        self.replicas, self.sharers = mesh.get_group(0), mesh.get_group(1)
        self.mesh = mesh
        self.n, self.rank = mesh.size(1), mesh.get_local_rank(1)
        names = {p: name for name, p in model.named_parameters()}
        self.aliases = {name: names[p] for name, p in model.named_parameters(remove_duplicate=False)}
        matrices = ComputeWeights(model, dtype)
        matrices.refresh()
        computed = dict(zip(matrices.parameters, matrices.copies, strict=True))
        self.wholes = [(p, computed.get(p, p.data)) for p in names]
        self.shards: dict[str, torch.nn.Parameter] = {}
        for p, name in names.items():
            own = self._rows(p.data).clone()
            self.shards[name] = torch.nn.Parameter(self._distributed(own, p), requires_grad=p.requires_grad)
            if p in computed:
                p.data = p.data.new_zeros(()).expand(p.shape)
        self.stale = False
        """Whether the matrices that the model computes with are older than the shards; set it after loading these."""
        model.compute_in(dtype, self)

    def named_parameters(self, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """As torch.nn.Module's."""
        if remove_duplicate:
            return iter(self.shards.items())
        return ((alias, self.shards[name]) for alias, name in self.aliases.items())

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return iter(self.shards.values())

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sum the model's gradients over all ranks into those of `parameters()`. Call it before each step."""
        work, sums = [], []
        for p, _ in self.wholes:
            rows = None
            if p.grad is not None:
                grad = self._padded(p.grad)
                rows = grad.chunk(self.n)[self.rank]  # in place: the sum of the rows that are its own
                work.append(reduce_scatter(rows, grad, group=self.sharers, async_op=True))
            sums.append(rows)
            p.grad = None
        for w in work:
            w.wait()
        if self.mesh.size(0) > 1:
            for rows in sums:
                if rows is not None:
                    dist.all_reduce(rows, group=self.replicas)
        for (p, _), shard, rows in zip(self.wholes, self.shards.values(), sums, strict=True):
            if rows is not None:
                shard.grad = self._distributed(rows[: shard.to_local().size(0)], p)
        self.stale = True  # when the step that follows is done

    @torch.no_grad()
    def refresh(self) -> bool:
        """Collect the weights from their owners if they were stepped or loaded since; called by the model's forward.
        Returns whether they were."""
        if not self.stale:
            return False
        work, uneven = [], []
        for (_, whole), shard in zip(self.wholes, self.shards.values(), strict=True):
            everyones = self._padded(whole)
            own = everyones.chunk(self.n)[self.rank]
            own[: shard.to_local().size(0)] = shard.to_local()
            work.append(all_gather(everyones, own, group=self.sharers, async_op=True))
            if everyones is not whole:
                uneven.append((whole, everyones))
        for w in work:
            w.wait()
        for whole, everyones in uneven:
            whole.copy_(everyones[: len(whole)])
        self.stale = False
        return True

    def _rows(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's rows; none where there are fewer pieces than ranks. As torch.chunk, so that DTensor agrees."""
        chunks = whole.chunk(self.n)
        return chunks[self.rank] if self.rank < len(chunks) else whole[:0]

    def _padded(self, whole: torch.Tensor) -> torch.Tensor:
        """The tensor itself, or a copy with more rows where they cannot be shared out evenly."""
        if len(whole) % self.n == 0:
            return whole
        rows = -(-len(whole) // self.n) * self.n
        return torch.cat((whole, whole.new_zeros(rows - len(whole), *whole.shape[1:])))

    def _distributed(self, rows: torch.Tensor, whole: torch.Tensor) -> DTensor:
        stride = torch.empty(whole.shape, device="meta").stride()
        where = (Replicate(), Shard(0))
        return DTensor.from_local(rows, self.mesh, where, run_check=False, shape=whole.shape, stride=stride)
