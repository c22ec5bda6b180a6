"""The keys of a training: of its steps, and of a whole run."""

from dataclasses import dataclass

import torch

from ..models import PRESETS
from ..text.batches import ORDERS
from .keys import Settings, key
from .schedule import SCHEDULES

SAVERS = ("none", "bf16", "powersgd")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How to train.  Parameters with fewer than two dimensions (biases, norms) do not decay."""

    steps: int = key(2000, "steps of the optimizer", least=1)
    learning_rate: float = key(1e-3, "at the end of the warm-up", least=0)
    min_learning_rate: float = key(1e-4, "at the last step", least=0)
    warmup_steps: int = key(100, "in which the learning rate rises", least=0)
    schedule: str = key("cosine", "after the warm-up", SCHEDULES)
    decay_steps: int | None = key(None, "of schedule wsd, in which it falls; by default a fifth", least=0)
    weight_decay: float = key(0.1, "of matrices and embeddings", least=0)
    betas: tuple[float, float] = key((0.9, 0.95), "of AdamW", least=0, below=1)
    grad_clip: float = key(1.0, "greatest norm of all gradients together; 0 is no limit", least=0)
    accumulate: int = key(1, "batches whose gradients make one step", least=1)
    dtype: str = key("float32", "of matrix products, under autocast; parameters stay float32", DTYPES)
    activation_checkpointing: bool = key(False, "compute each layer again in backward, for less memory")
    nonfinite: str = key("stop", "what a loss or gradient that is not finite does", ("stop", "skip"))

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class RunConfig(TrainConfig):
    """A whole run: what a file of `llmkern train` may hold."""

    data: str = key("", "folder that `llmkern data prepare` made")
    out: str = key("runs/train", "folder of the run; the same command goes on where it stopped")
    objective: str = key("causal", "predict the next token, or masked ones", ("causal", "masked"))
    init: str = key("", "run or checkpoint whose weights to start from")

    preset: str = key("nano", "model whose sizes hold where no key below says otherwise", PRESETS)
    n_layer: int | None = key(None, "layers", least=0)
    n_head: int | None = key(None, "attention heads", least=1)
    n_embd: int | None = key(None, "width", least=1)
    block_size: int | None = key(None, "tokens in a window", least=1)
    dropout: float | None = key(None, "probability", least=0, below=1)
    bias: bool | None = key(None, "whether linears and norms have biases; by default those of the preset")
    kernels: bool = key(True, "llmkern's kernels; false is PyTorch alone")

    batch_size: int = key(12, "windows in a batch", least=1)
    order: str = key("epochs", "each window once in an epoch, or windows anywhere at random", ORDERS)
    mask_share: float = key(0.15, "of the places that objective masked predicts", least=0, below=1)
    seed: int = key(1337, "of weights, data order and dropout", least=0)
    device: str = key("auto", "auto, cpu or cuda", ("auto", "cpu", "cuda"))
    parallel: str = key("", "mesh of processes that torchrun started, as dp=2,fsdp=2,tp=2,pp=1,cp=1")
    saver: str = key("none", "how dp sends gradients: whole, in bfloat16, or of low rank", SAVERS)
    outer_every: int = key(
        0, "steps after which replicas of dp, each alone until then, agree; 0: never alone", least=0
    )
    outer_learning_rate: float = key(0.7, "of the outer optimizer, DiLoCo's; 1 averages weights", least=0)
    outer_momentum: float = key(0.9, "of the outer optimizer, Nesterov's", least=0, below=1)
    micro_batch: int = key(1, "windows that go through the stages of pp together", least=1)
    timeout: float = key(600.0, "seconds after which an exchange between processes is given up", least=1)
    verify_data: bool = key(True, "compare every byte of the data with its checksum at the start")

    eval_every: int = key(250, "steps between validations; 0 is at the end alone", least=0)
    eval_batches: int = key(20, "batches of a validation", least=1)
    save_every: int = key(250, "steps between checkpoints; 0 is at the end alone", least=0)
    keep: int = key(2, "checkpoints to keep; 0 keeps all", least=0)
    log_every: int = key(1, "steps between lines of log.jsonl", least=1)
    tensorboard: bool = key(False, "write TensorBoard events too")
    plot: bool = key(True, "draw loss.png at the end")


# keys that leave the losses as they are, so that a run may go on with other values
FREE = {
    "steps", "data", "out", "device", "verify_data", "eval_every", "eval_batches", "save_every", "keep",
    "log_every", "tensorboard", "plot", "activation_checkpointing", "parallel", "timeout",
    "micro_batch",
}  # fmt: skip
