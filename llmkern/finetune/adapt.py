"""What both tasks do to a model before and after training, as the command's arguments say."""

import argparse

from safetensors.torch import save_file
from torch import nn

from ..lora import lora_, lora_tensors, merge_lora_
from ..models import Classifier
from ..train import TrainConfig


def adapt(args: argparse.Namespace, model: nn.Module) -> None:
    """LoRA, if it is wanted; the head is trained with it."""
    if args.lora:
        lora_(model, args.lora, args.lora_alpha or 2.0 * args.lora, args.lora_dropout)
        if isinstance(model, Classifier):
            model.score.requires_grad_(True)


def train_config(args: argparse.Namespace, steps: int) -> TrainConfig:
    """How to train for so many steps: a warm-up of a tenth, then a cosine to a tenth of the rate."""
    rate = args.learning_rate or (5e-4 if args.lora else 5e-5)
    return TrainConfig(
        steps=steps, learning_rate=rate, min_learning_rate=rate / 10, warmup_steps=max(1, steps // 10),
        weight_decay=args.weight_decay,
    )  # fmt: skip


def save_updates(args: argparse.Namespace, model: nn.Module) -> None:
    """Write the low-rank updates into lora.safetensors, and merge them."""
    if args.lora:
        updates = {name: t.contiguous() for name, t in lora_tensors(model).items()}
        save_file(updates, args.out / "lora.safetensors")
        merge_lora_(model)
