"""A model placed on a mesh, and what a training step does differently there."""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from . import norm, savers, tensor
from .mesh import Sizes
from .outer import Outer, OuterSteps
from .pipeline import Pipeline
from .spine import layers_of
from .stage import Stage
from .vocabulary import IGNORED

Batch = tuple[Tensor, Tensor]  # inputs and targets, (rows, block)


class Parallel:
    """One of our models on a mesh.  All processes make it, from equal weights.

    Called with (B, T) inputs and targets it gives (None, mean loss over the rows of all processes).

    Args:
        model: its parameters are replaced by this process's parts, in place.
        mesh: as `start` gives it.
        dtype: of matrix products; FSDP gathers weights in it.
        saver: how gradients of dp are sent: "none", "bf16" or "powersgd".
        micro_batch: rows that go through a pipeline together.
        outer: how replicas of dp agree where each trains by itself; None exchanges gradients in every step.

    Attributes:
        model: what was given.
        sizes: of the mesh.
        replica: which of dp this is.
        data_rank, data_world: which part of the rows of each batch is this process's.
        packed: name -> heads of parameters in the order of `tensor.by_heads`.
        copy: the head of a last stage that is also the embedding of the first; None elsewhere.
        outer: of replicas that train apart; None elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        dtype: torch.dtype = torch.float32,
        saver: str = "none",
        micro_batch: int = 1,
        outer: Outer | None = None,
    ) -> None:
        self.model, self.mesh, self.micro_batch = model, mesh, micro_batch
        self.sizes = s = Sizes(**dict(zip(mesh.mesh_dim_names, mesh.shape)))
        coordinate = dict(zip(mesh.mesh_dim_names, mesh.get_coordinate()))
        self.replica = coordinate["dp"]
        self.data_rank, self.data_world = coordinate["dp"] * s.fsdp + coordinate["fsdp"], s.data
        self.seen = mesh["dp", "fsdp", "cp"]._flatten("data").get_group()  # its members see other tokens
        self.apart = outer is not None
        # whose gradients are averaged, and whose are clipped together
        self.averaged = mesh["fsdp", "cp"]._flatten("shard").get_group() if self.apart else self.seen
        self.clipped = mesh["pp", "fsdp", "cp", "tp"]._flatten("replica").get_group() if self.apart else None
        model.loss.reduction = "sum"  # processes may see other numbers of tokens
        low = None if dtype == torch.float32 else dtype
        self._divide(low)
        self.packed = tensor.packed(model) if s.tp > 1 else {}
        self.module: nn.Module = model
        if s.fsdp == s.tp == s.pp == 1 and not self.apart:
            self.module = DistributedDataParallel(model, process_group=self.averaged)
            savers.register(self.module, saver, self.averaged)
        elif dist.get_world_size(self.averaged) > 1:
            self._shard(low)
        self.outer = OuterSteps(model.parameters(), outer, mesh["dp"].get_group()) if self.apart else None

    def _divide(self, low: torch.dtype | None) -> None:
        """Layers to stages, heads and columns to processes of tp, sequences to those of cp."""
        s, model = self.sizes, self.model
        first_of = {p: name for name, p in model.named_parameters()}
        self.names = {name: first_of[p] for name, p in model.named_parameters(remove_duplicate=False)}
        self.pipeline, self.copy = None, None
        if s.tp * s.cp * s.pp == 1:
            return
        count, first, last = len(layers_of(model)), True, True
        mine = range(count)
        if s.pp > 1:
            width = model.lm_head.in_features
            between = low if low and dist.get_world_size(self.averaged) > 1 else torch.float32
            self.pipeline = Pipeline(model, self.mesh, width, between)
            mine, first, last = self.pipeline.layers(count), self.pipeline.first, self.pipeline.last
        Stage(model, self.mesh, mine, first, last)
        if last and not first and self.names["lm_head.weight"] != "lm_head.weight":
            self.copy = model.lm_head.weight

    def _shard(self, low: torch.dtype | None) -> None:
        """FSDP2: each layer is gathered by itself, and what is outside of layers with the model."""
        # a kernel's output may be a view of its memory; nothing here writes into one
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        shard = self.mesh["fsdp", "cp"]._flatten("shard")  # processes of cp see other tokens, too
        copied = self.sizes.dp > 1 and not self.apart
        options: dict[str, Any] = {"mesh": self.mesh["dp", "shard"] if copied else shard}
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        between = self.pipeline is None  # micro-batches find all gathered
        for layer in layers_of(self.model):
            fully_shard(layer, reshard_after_forward=between, **options)
        fully_shard(self.model, **options)
        if self.copy is not None:
            self.copy = self.model.lm_head.weight

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those of this process, by the names that they have in the undivided model."""
        return {self.names[name]: p for name, p in self.model.named_parameters()}

    @property
    def training(self) -> bool:
        return self.module.training

    def train(self, mode: bool = True) -> None:
        self.module.train(mode)

    def eval(self) -> None:
        self.module.eval()

    def __call__(self, inputs: Tensor, targets: Tensor) -> tuple[None, Tensor]:
        if self.pipeline is None:
            loss = self.module(inputs, targets)[1]
        else:
            loss = self.pipeline.evaluate(inputs, targets, len(inputs) // self._each([len(inputs)]))
        both = torch.stack((loss.detach().double(), (targets != IGNORED).sum() / self.sizes.cp))
        dist.all_reduce(both, group=self.seen)
        return None, both[0] / both[1]

    def backward(self, batches: Sequence[Batch], loss_of: Callable[..., Tensor]) -> float:
        """Gradients of the mean loss over all batches and all processes.

        Args:
            batches: of this process, one for each accumulation.
            loss_of: (module, inputs, targets) to the sum of the losses of this process.

        Returns:
            That loss, the same on all processes; of replicas apart the mean.
        """
        shares = self.shares([targets for _, targets in batches])
        if self.pipeline is None:
            loss = sum(self._backward_of(n, batches, loss_of, shares[n]) for n in range(len(batches)))
        else:
            rows = [len(inputs) for inputs, _ in batches]
            loss = loss_of(
                lambda *joined: (None, self._pipelined(*joined, shares, rows)), *map(torch.cat, zip(*batches))
            )
            self.pipeline.sum_ends(self._tied())
        if self.sizes.tp > 1:
            tensor.sum_replicated(self.model, self.mesh["tp"])
        return self.mean(float(loss))

    def _backward_of(
        self, n: int, batches: Sequence[Batch], loss_of: Callable[..., Tensor], share: float
    ) -> Tensor:
        """Backward of one batch.

        Replicas exchange gradients in that of the last alone, FSDP in each: else it had to hold them whole.
        """
        replicas = isinstance(self.module, DistributedDataParallel)
        with self.module.no_sync() if replicas and n < len(batches) - 1 else nullcontext():
            loss = loss_of(self.module, *batches[n]) * share
            loss.backward()
        return loss.detach()

    def _pipelined(self, inputs: Tensor, targets: Tensor, shares: list[float], rows: list[int]) -> Tensor:
        """All batches of a step, one behind the other; `rows` of each."""
        each = self._each(rows)
        factors = [share for share, count in zip(shares, rows) for _ in range(count // each)]
        return self.pipeline.train(inputs, targets, torch.tensor(factors, device=targets.device))

    def _each(self, rows: Sequence[int]) -> int:
        """Rows that go through the pipeline together: fewer where a batch is short."""
        return math.gcd(self.micro_batch, *rows)

    def _tied(self) -> nn.Parameter | None:
        """The embedding, on the first and last stage, if it is the head too."""
        tied = self.names["lm_head.weight"]
        return self.parameters().get(tied) if tied != "lm_head.weight" else None

    def shares(self, targets: Sequence[Tensor]) -> list[float]:
        """Factors of the summed losses of this process's batches, whose mean over processes is of all.

        Rows and ignored targets may be other in number on each process.
        """
        kept = torch.tensor([float((t != IGNORED).sum()) for t in targets], dtype=torch.float64)
        kept = kept.to(self.mesh.device_type) / self.sizes.cp  # all of cp count the same rows
        dist.all_reduce(kept, group=self.averaged)
        world = dist.get_world_size(self.averaged)
        return [world / (count * len(targets)) if count else math.nan for count in kept.tolist()]

    def mean(self, value: float) -> float:
        """The mean of a number over processes that see other tokens."""
        total = torch.tensor(value, dtype=torch.float64, device=self.mesh.device_type)
        dist.all_reduce(total, group=self.seen)
        return total.item() / dist.get_world_size(self.seen)

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scale gradients so that the norm of all together is at most `max_norm`; returns it as it was.

        Replicas apart clip their own, and the mean of their norms is returned.
        """
        ranks = dist.get_world_size(self.clipped) // self.sizes.pp
        found = norm.clip_grad_norm_(self.model.parameters(), max_norm, ranks, self.copy, self.clipped).item()
        return self.mean(found) if self.apart else found

    def agree(self, done: int) -> None:
        """Behind the optimizer's step number `done`: replicas apart take an outer step, if it is time."""
        if self.outer is not None:
            self.outer.step(done)
