"""Who writes in `benchmarks.decode`: llmkern, llama.cpp, Hugging Face, with the weights of one GGUF file."""

import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import llmkern
from llmkern.generate import GREEDY, ModelEngine, generate
from llmkern.models import Llama, load_gguf
from llmkern.nn import QuantLinear

MOST = 1024  # tokens that a writer can see


class Written(NamedTuple):
    """Greedy tokens after a prompt, and the seconds until the first and from there to the last."""

    tokens: list[int]
    prefill: float
    decode: float


Write = Callable[[list[int], int], Written]  # a prompt, and how many tokens to write


class Writer(NamedTuple):
    """One that takes part; `bytes` are those of the weights that it reads for each token, None: not told."""

    name: str
    write: Write
    bytes: int | None = None


def writers(file: Path) -> Iterator[Writer]:
    """All that can run here."""
    for dtype in (torch.float32, torch.bfloat16):
        yield _ours("Q4_1", load_gguf(file, dtype), dtype)
    int8 = load_gguf(file, torch.bfloat16, quantized=False)
    llmkern.quantize_(int8, llmkern.Int8WeightOnly())
    yield _ours("int8", int8, torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        yield _ours("dense", load_gguf(file, dtype, quantized=False), dtype)
    if find_spec("llama_cpp"):
        yield Writer("llama.cpp Q4_1", _llama_cpp(file))
    if find_spec("transformers"):
        for dtype in (torch.bfloat16, torch.float32):
            model = load_gguf(file, dtype, quantized=False)
            yield Writer(f"Hugging Face {_short(dtype)}", _hugging_face(model))


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def weight_bytes(model: Llama) -> int:
    """Bytes of all linears, which a step reads once each."""
    total = 0
    for linear in model.modules():
        if isinstance(linear, QuantLinear):
            parts = linear.qweight, linear.scales, linear.mins, linear.bias
        elif isinstance(linear, nn.Linear):
            parts = linear.weight, linear.bias
        else:
            continue
        total += sum(p.nbytes for p in parts if p is not None)
    return total


def _ours(kind: str, model: Llama, dtype: torch.dtype) -> Writer:
    engine = ModelEngine(model, max_length=MOST)

    def write(prompt: list[int], count: int) -> Written:
        times = [time.perf_counter()]
        (output,) = generate(
            engine, [prompt], count, GREEDY, on_token=lambda *_: times.append(time.perf_counter())
        )
        return Written(output.tokens, times[1] - times[0], times[-1] - times[1])

    return Writer(f"llmkern {kind}, {_short(dtype)}", write, weight_bytes(model))


def _loop(feed: Callable[[list[int]], int], prompt: list[int], count: int) -> Written:
    """Greedy writing by `feed`, which takes tokens and gives the likeliest next one."""
    times = [time.perf_counter()]
    tokens = [feed(prompt)]
    times.append(time.perf_counter())
    while len(tokens) < count:
        tokens.append(feed(tokens[-1:]))
    return Written(tokens, times[1] - times[0], time.perf_counter() - times[1])


def _llama_cpp(file: Path) -> Write:
    """Through its C functions, without the Python around them."""
    import llama_cpp
    import numpy as np

    threads = torch.get_num_threads()
    model = llama_cpp.Llama(
        str(file), n_ctx=MOST, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
        verbose=False,
    )  # fmt: skip
    shape = (model.n_vocab(),)

    def feed(tokens: list[int]) -> int:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if status := llama_cpp.llama_decode(model.ctx, llama_cpp.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError(f"llama_decode gave {status}")
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), shape).argmax())

    def write(prompt: list[int], count: int) -> Written:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
        return _loop(feed, prompt, count)

    return write


def _hugging_face(model: Llama) -> Write:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    warnings.filterwarnings("ignore", "`past_key_values` is deprecated")  # by its only name until 5.24
    c = model.config
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
        "tie_word_embeddings",
    )  # fmt: skip
    config = LlamaConfig(**{name: getattr(c, name) for name in names})
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config)
    theirs.load_state_dict(model.state_dict(), strict=True, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)  # its table is no part of the weights
    theirs.eval()

    @torch.inference_mode()
    def write(prompt: list[int], count: int) -> Written:
        cache = DynamicCache(config=config)

        def feed(tokens: list[int]) -> int:
            out = theirs(torch.tensor([tokens]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            return int(out.logits[0, -1].argmax())

        return _loop(feed, prompt, count)

    return write
