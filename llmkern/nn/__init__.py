"""Drop-in modules on llmkern's kernels.

`LayerNorm, RMSNorm, MultiheadAttention, TransformerEncoderLayer, CrossEntropyLoss` are subclasses of
torch's modules of the same name, with their arguments, parameters and state_dict keys.
`CausalSelfAttention, MLP, GatedMLP, Block` are the parts of a GPT; `llmkern.nn.plain` has them in
PyTorch alone.  `KVCache` keeps the keys and values of an attention layer for generation.
"""

from . import plain
from .attention import CausalSelfAttention, MultiheadAttention
from .decode import KVCache
from .ffn import MLP, GatedMLP, SequentialFFN
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
    "MultiheadAttention",
    "RMSNorm",
    "SequentialFFN",
    "TransformerEncoderLayer",
    "plain",
]
