"""Drop-in modules on llmkern's kernels.

`Linear, LayerNorm, RMSNorm, MultiheadAttention, TransformerEncoderLayer, CrossEntropyLoss,
LinearCrossEntropyLoss, Embedding, Dropout, Softmax, LogSoftmax` are subclasses of torch's modules of the
same name, with their arguments, parameters and state_dict keys.
`CausalSelfAttention, MLP, GatedMLP, Block` are the parts of a GPT; `llmkern.nn.plain` has them in
PyTorch alone.  `LlamaAttention, LlamaMLP, LlamaBlock` are those of a Llama, `RotaryEmbedding` is what it has
for positions; `KVCache` keeps the keys and values of an attention layer for generation, `KVCaches` those of
all layers; `QuantLinear` has a weight in 8 or 4 bits.
"""

from . import plain
from .attention import CausalSelfAttention, MultiheadAttention
from .caches import KVCaches
from .decode import KVCache
from .dropout import Dropout
from .embedding import Embedding
from .ffn import MLP, GatedMLP, SequentialFFN
from .linear import Linear
from .linear_loss import LinearCrossEntropyLoss
from .llama import LlamaAttention, LlamaBlock, LlamaMLP
from .loss import CrossEntropyLoss
from .norm import LayerNorm, RMSNorm
from .quant import QuantLinear
from .rope import RotaryEmbedding
from .softmax import LogSoftmax, Softmax
from .transformer import Block, TransformerEncoderLayer

__all__ = [
    "MLP",
    "Block",
    "CausalSelfAttention",
    "CrossEntropyLoss",
    "Dropout",
    "Embedding",
    "GatedMLP",
    "KVCache",
    "KVCaches",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LlamaAttention",
    "LlamaBlock",
    "LlamaMLP",
    "LogSoftmax",
    "MultiheadAttention",
    "QuantLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "SequentialFFN",
    "Softmax",
    "TransformerEncoderLayer",
    "plain",
]
