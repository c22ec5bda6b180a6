"""The device mesh: how many ways each axis divides the work, checked before any process waits for another."""

import os
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import UserError

ORDER = ("pp", "dp", "fsdp", "cp", "tp")  # the last varies fastest: neighbours talk most
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun gives to each process


@dataclass(frozen=True)
class Sizes:
    """Sizes of the axes of a mesh.

    Attributes:
        dp: replicas of the model, each with its own part of a batch (DDP).
        fsdp: the same, but each holds a part of weights, gradients and optimizer (FSDP2, ZeRO-3).
        tp: parts of each matrix, and of the sequence between them (arXiv:1909.08053, arXiv:2205.05198).
        pp: stages of a pipeline of layers (arXiv:2104.04473).
        cp: parts of each sequence in attention (ring attention, arXiv:2310.01889).
    """

    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1

    @classmethod
    def parse(cls, text: str) -> "Sizes":
        """From "dp=2,tp=4"; an axis that is not named is 1.

        Raises:
            UserError: an unknown or repeated axis, or a size that is not a whole number of at least 1.
        """
        known, values = [f.name for f in fields(cls)], {}
        for part in text.split(","):
            name, _, size = (word.strip() for word in part.partition("="))
            if name not in known or name in values:
                how = "twice" if name in values else "unknown"
                raise UserError(f"parallel {text!r}: {name!r} is {how}, expected {','.join(known)} once each")
            if not size.isascii() or not size.isdigit() or int(size) < 1:
                raise UserError(
                    f"parallel {text!r}: {name} is {size!r}, expected a whole number of at least 1"
                )
            values[name] = int(size)
        return cls(**values)

    @property
    def world(self) -> int:
        """Processes in all."""
        return prod(asdict(self).values())

    @property
    def data(self) -> int:
        """Parts of a batch."""
        return self.dp * self.fsdp

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in asdict(self).items() if size > 1) or "dp=1"

    def check(self, world: int, batch: int, block: int, shape: dict[str, int]) -> None:
        """Raise unless these sizes divide everything.

        Args:
            world: processes there are.
            batch: windows of a batch.
            block: tokens of a window.
            shape: of the model, as `shape_of` gives it.

        Raises:
            UserError: what does not divide what.
        """
        if self.world != world:
            product = " x ".join(str(getattr(self, axis)) for axis in ORDER)
            raise UserError(
                f"parallel {self} is a mesh of {product} = {self.world} processes ({', '.join(ORDER)}), and "
                f"{world} run; start it with `torchrun --nproc-per-node {self.world}`, or on several nodes"
            )
        rules = [("dp x fsdp", self.data, "batch_size", batch)]
        rules += [("tp", self.tp, what, shape[what]) for what in ("heads", "key heads", "inner width")]
        rules += [("2 cp" if self.cp > 1 else "cp", 2 * self.cp if self.cp > 1 else 1, "block_size", block)]
        rules += [("cp x tp", self.cp * self.tp, "block_size", block)]
        if self.tp > 1 and self.data * self.cp > 1:
            rules += [("tp", self.tp, "vocab_size", shape["vocab_size"])]  # FSDP wants equal parts
        for name, ways, what, size in rules:
            if size % ways:
                raise UserError(f"parallel {self}: {name} is {ways}, which does not divide {what} {size:,}")
        if self.cp > 1 and shape["window"]:
            raise UserError(f"parallel {self}: cp takes no model with a sliding window, expected cp=1")
        if self.pp > shape["layers"]:
            raise UserError(
                f"parallel {self}: pp is {self.pp}, expected at most the {shape['layers']} layers"
            )


def launched() -> tuple[int, int]:
    """(rank, world size) that torchrun, or another launcher, gave this process.

    Raises:
        UserError: there is no such environment, or it makes no sense.
    """
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if missing:
        raise UserError(
            f"parallel needs the environment of a launcher, and {missing[0]} is not set; start it with "
            "`torchrun --nproc-per-node N -m llmkern train ...`"
        )
    rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        raise UserError(f"RANK is {rank!r} and WORLD_SIZE {world!r}, expected 0 <= RANK < WORLD_SIZE")
    port = os.environ["MASTER_PORT"]
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT is {port!r}, expected a number from 1 to {2**16 - 1}")
    return int(rank), int(world)


def start(sizes: Sizes, device: str, timeout: float = 600.0) -> DeviceMesh:
    """Join the processes of the launcher and lay the mesh over them; call `Sizes.check` before.

    Args:
        sizes: of the axes.
        device: "cpu" (gloo) or "cuda" (NCCL; the GPU is that of LOCAL_RANK).
        timeout: seconds after which an exchange that does not end is an error.

    Raises:
        UserError: the others were not met in that time.
    """
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        _join("nccl" if device == "cuda" else "gloo", timedelta(seconds=timeout))
    return init_device_mesh(device, [getattr(sizes, axis) for axis in ORDER], mesh_dim_names=ORDER)


def _join(backend: str, timeout: timedelta) -> None:
    """Join the group.

    torchrun keeps one store for all its restarts, and torch (2.13) uses the same names in it each time: a
    process then may find the addresses of those that died before.  So each start has names of its own.
    """
    rank, world = launched()
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"llmkern/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{world}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except RuntimeError as error:  # torch's errors of stores and networks are
        why = str(error).strip().splitlines()[0]
        raise UserError(
            f"rank {rank} of {world} did not meet the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {timeout.total_seconds():g} s; see that all {world} were "
            f"started, and that this is the address of the first ({why})"
        ) from None


def shape_of(config: Any) -> dict[str, int]:
    """What has to be divided in a model with this config, of a GPT, BERT or Llama."""
    if hasattr(config, "n_embd"):
        heads, layers, inner = config.n_head, config.n_layer, 4 * config.n_embd
        key_heads = heads
    else:
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        layers, inner = config.num_hidden_layers, config.intermediate_size
    sizes = {"heads": heads, "key heads": key_heads, "inner width": inner, "layers": layers}
    window = getattr(config, "sliding_window", None) or 0
    return {**sizes, "vocab_size": config.vocab_size, "window": window}
