"""Causal fine-tuning: a model goes on learning to write, from other texts."""

import argparse

from rich.console import Console
from torch import nn

from ..evaluate import Predictability, predictability
from ..text import Batches, Tokenizer, split
from ..text.documents import join
from ..train import checkpoint
from .adapt import adapt, save_updates, train_config
from .fit import Epoch, fit


def train_causal(console: Console, args: argparse.Namespace, model: nn.Module, tokenizer: Tokenizer) -> int:
    """Train on the texts of args.data, and save the model of the best epoch."""
    tokens = join([str(args.data)], tokenizer, args.text_column)
    train, held_out = split(tokens, 1 - args.val_share)
    if args.val is not None:
        train, held_out = tokens, join([str(args.val)], tokenizer, args.text_column)
    context = min(model.config.block_size, args.max_tokens or model.config.block_size)
    batches = Batches(train, args.batch_size, context, args.seed, next(model.parameters()).device)
    epoch_steps = max(1, len(train) // (context * args.batch_size))

    def measure() -> Predictability:
        return predictability(model, held_out, batch_size=args.batch_size)

    before = measure()
    adapt(args, model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    console.print(
        f"text     {len(train):,} tokens to train on, {len(held_out):,} to validate with\n"
        f"model    {type(model).__name__}, {trained:,} parameters are trained\n"
        f"held-out loss before {before.loss:.4f}"
    )

    def tell(epoch: Epoch) -> None:
        console.print(
            f"epoch {epoch.number}/{args.epochs}: loss {epoch.loss:.4f}, held-out {epoch.held_out.loss:.4f}, "
            f"perplexity {epoch.held_out.perplexity:.2f}, {epoch.seconds:.0f} s"
            + (" (best)" if epoch.best else "")
        )

    config = train_config(args, args.epochs * epoch_steps)
    epochs = fit(model, batches, epoch_steps, config, measure, args.patience, tell)
    args.out.mkdir(parents=True, exist_ok=True)
    save_updates(args, model)
    path = checkpoint.save(args.out, len(epochs) * epoch_steps, model, tokenizer)
    console.print(f"The model is in {path}.", soft_wrap=True)
    return 0
