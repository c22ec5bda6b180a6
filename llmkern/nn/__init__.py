"""Drop-in modules on llmkern's kernels.

`Linear, LayerNorm, RMSNorm, MultiheadAttention, TransformerEncoderLayer, CrossEntropyLoss,
LinearCrossEntropyLoss` are subclasses of torch's modules of the same name, with their arguments,
parameters and state_dict keys.
`CausalSelfAttention, MLP, GatedMLP, Block` are the parts of a GPT; `llmkern.nn.plain` has them in
PyTorch alone.  `KVCache` keeps the keys and values of an attention layer for generation.
"""

from . import plain
from .attention import CausalSelfAttention, MultiheadAttention
from .decode import KVCache
from .ffn import MLP, GatedMLP, SequentialFFN
from .linear import Linear
from .linear_loss import LinearCrossEntropyLoss
from .loss import CrossEntropyLoss
from .norm import LayerNorm, RMSNorm
from .transformer import Block, TransformerEncoderLayer

__all__ = [
    "MLP",
    "Block",
    "CausalSelfAttention",
    "CrossEntropyLoss",
    "GatedMLP",
    "KVCache",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "RMSNorm",
    "SequentialFFN",
    "TransformerEncoderLayer",
    "plain",
]
