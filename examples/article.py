"""A character-level Transformer of torch's own layers, as many articles have it, swapped with one line.

    python examples/article.py

The model is left as it is: its layers are not batch-first, so attention runs over the first dimension of
what they get, and no causal mask is applied.  Swapped, it computes the same.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from side_by_side import Result, shakespeare, train
from torch import Tensor, nn


class Transformer(nn.Module):
    def __init__(
        self, vocab_size: int, embed_dim: int, num_heads: int, hidden_dim: int, num_layers: int,
        seq_length: int, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.positional_encoding = nn.Parameter(torch.zeros(1, seq_length, embed_dim))
        self.layers = nn.ModuleList(
            [nn.TransformerEncoderLayer(embed_dim, num_heads, hidden_dim, dropout) for _ in range(num_layers)]
        )
        self.fc_out = nn.Linear(embed_dim, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.positional_encoding[:, : x.size(1), :]
        for layer in self.layers:
            x = layer(x)
        return self.fc_out(x)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(model(inputs), targets)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def step() -> tuple[nn.Module, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """For `llmkern diagnose examples/article.py:step`: the model, a batch of characters, the loss."""
    model = Transformer(65, 256, 8, 1024, 4, 128, dropout=0.0)
    return model, torch.randint(65, (32, 128)), cross_entropy


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="a UTF-8 text file; by default Shakespeare")
    for name, default in (
        ("steps", 100), ("batch-size", 32), ("seq-length", 128), ("embed-dim", 256), ("num-heads", 8),
        ("hidden-dim", 1024), ("num-layers", 4),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dropout", type=float, default=0.0, help="0 makes the losses comparable")
    args = parser.parse_args(argv)
    batches, characters = shakespeare(args.data, args.batch_size, args.seq_length)
    torch.manual_seed(0)
    model = Transformer(
        characters, args.embed_dim, args.num_heads, args.hidden_dim, args.num_layers, args.seq_length,
        args.dropout,
    )  # fmt: skip
    return train(model, loss_of, batches, args.steps)


if __name__ == "__main__":
    main()
