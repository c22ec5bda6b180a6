"""Drop-in modules on llmkern's kernels.

`LayerNorm, RMSNorm, MultiheadAttention, TransformerEncoderLayer, CrossEntropyLoss, Embedding, Dropout,
Softmax, LogSoftmax` are subclasses of torch's modules of the same name, with their arguments, parameters
and state_dict keys.
`CausalSelfAttention, MLP, GatedMLP, Block` are the parts of a GPT; `llmkern.nn.plain` has them in
PyTorch alone.  `RotaryEmbedding` is what Llama has for positions.
"""

from . import plain
from .attention import CausalSelfAttention, MultiheadAttention
from .dropout import Dropout
from .embedding import Embedding
from .ffn import MLP, GatedMLP, SequentialFFN
from .loss import CrossEntropyLoss
from .norm import LayerNorm, RMSNorm
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
    "LayerNorm",
    "LogSoftmax",
    "MultiheadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "SequentialFFN",
    "Softmax",
    "TransformerEncoderLayer",
    "plain",
]
