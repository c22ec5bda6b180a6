"""A model placed on a mesh, and what a training step does differently there."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from . import norm, savers, tensor
from .mesh import Sizes
from .spine import layers_of
from .stage import Stage

IGNORED = -100  # a target that does not count

Batch = tuple[Tensor, Tensor]  # inputs and targets, (rows, block)


class Parallel:
    """One of our models on a mesh.  All processes make it, from equal weights; it is called like the model.

    Args:
        model: its parameters are replaced by this process's parts, in place.
        mesh: as `start` gives it.
        dtype: of matrix products; FSDP gathers weights in it.
        saver: how gradients of dp are sent: "none", "bf16" or "powersgd".

    Attributes:
        model: what was given.
        sizes: of the mesh.
        data_rank, data_world: which part of the rows of each batch is this process's.
        packed: name -> heads of parameters in the order of `tensor.by_heads`.
    """

    def __init__(
        self, model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype = torch.float32, saver: str = "none"
    ) -> None:
        self.model, self.mesh = model, mesh
        self.sizes = s = Sizes(**dict(zip(mesh.mesh_dim_names, mesh.shape)))
        coordinate = dict(zip(mesh.mesh_dim_names, mesh.get_coordinate()))
        self.data_rank, self.data_world = coordinate["dp"] * s.fsdp + coordinate["fsdp"], s.data
        self.averaged = mesh["dp", "fsdp", "cp"]._flatten("data").get_group()  # its members see other tokens
        self.packed = tensor.packed(model) if s.tp > 1 else {}
        model.loss.reduction = "sum"  # processes may see other numbers of tokens
        if s.tp * s.cp * s.pp > 1:
            Stage(model, mesh, range(len(layers_of(model))))
        if s.fsdp == s.tp == s.pp == 1:
            self.module: nn.Module = DistributedDataParallel(model, process_group=self.averaged)
            savers.register(self.module, saver, self.averaged)
        else:
            self.module = model
            if s.data * s.cp > 1:
                self._shard(dtype)

    def _shard(self, dtype: torch.dtype) -> None:
        """FSDP2: each layer is gathered by itself, and what is outside of layers with the model."""
        # a kernel's output may be a view of its memory; nothing here writes into one
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        low = None if dtype == torch.float32 else dtype
        shard = self.mesh["fsdp", "cp"]._flatten("shard")  # processes of cp see other tokens, too
        options: dict[str, Any] = {"mesh": self.mesh["dp", "shard"] if self.sizes.dp > 1 else shard}
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        for layer in layers_of(self.model):
            fully_shard(layer, **options)
        fully_shard(self.model, **options)

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor | None, Tensor]:
        """(None, mean loss of the rows of all processes); its gradient is not that of all."""
        loss = self.module(inputs, targets)[1].detach()
        both = torch.stack((loss.double(), (targets != IGNORED).sum() / self.sizes.cp))
        dist.all_reduce(both, group=self.averaged)
        return None, both[0] / both[1]

    @property
    def training(self) -> bool:
        return self.module.training

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def eval(self) -> None:
        self.module.eval()

    def backward(
        self, batches: Sequence[Batch], loss_of: Callable[..., Tensor], scale: Callable[[Tensor], Tensor]
    ) -> float:
        """Gradients of the mean loss over all batches and all processes.

        Args:
            batches: of this process, one for each accumulation.
            loss_of: (module, inputs, targets) to the sum of the losses of this process.
            scale: of a gradient scaler.

        Returns:
            That loss, the same on all processes.
        """
        shares = self.shares([targets for _, targets in batches])
        total = torch.zeros(())
        for n, (inputs, targets) in enumerate(batches):
            with self._reduced_at(n == len(batches) - 1):
                loss = loss_of(self.module, inputs, targets) * shares[n]
                scale(loss).backward()
            total += loss.detach().float().cpu()
        if self.sizes.tp > 1:
            tensor.sum_replicated(self.model, self.mesh["tp"])
        return self.mean(total.item())

    def _reduced_at(self, last: bool) -> Any:
        """Gradients are exchanged in the backward of the last batch alone."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(last)
        elif isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return nullcontext()

    def shares(self, targets: Sequence[Tensor]) -> list[float]:
        """Factors of the summed losses of this process's batches, so that the mean over processes is of all.

        Rows and ignored targets may be other in number on each process.
        """
        kept = torch.tensor([float((t != IGNORED).sum()) for t in targets], dtype=torch.float64)
        kept = kept.to(self.mesh.device_type) / self.sizes.cp  # all of cp count the same rows
        dist.all_reduce(kept, group=self.averaged)
        world = dist.get_world_size(self.averaged)
        return [world / (count * len(targets)) for count in kept.tolist()]

    def mean(self, value: float) -> float:
        """The mean of a number over processes that see other tokens."""
        total = torch.tensor(value, dtype=torch.float64, device=self.mesh.device_type)
        dist.all_reduce(total, group=self.averaged)
        return total.item() / dist.get_world_size(self.averaged)

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scale gradients so that the norm of all together is at most `max_norm`; returns it as it was."""
        ranks = self.mesh.size() // self.sizes.pp
        return norm.clip_grad_norm_(self.model.parameters(), max_norm, ranks).item()
