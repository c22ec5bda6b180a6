"""Large outputs live in memory that is used again, and never in memory that is still in use."""

import gc
import threading

import pytest
import torch

import llmkern
from llmkern import _cpu, ops
from llmkern.ops import memory
from llmkern.ops.memory import SMALLEST, cached_bytes, pooled

pytestmark = pytest.mark.skipif(isinstance(_cpu.load(_cpu.best()), str), reason="no C++ kernels")


@pytest.fixture(autouse=True)
def empty():
    gc.collect()
    llmkern.empty_cache()
    yield
    gc.collect()
    llmkern.empty_cache()


def test_a_dead_output_is_used_again():
    x = torch.randn(1024, 512)
    y = ops.layer_norm(x, (512,))
    at = y.data_ptr()
    first = y.clone()
    del y
    assert cached_bytes() >= x.numel() * 4
    again = ops.layer_norm(x, (512,))
    assert again.data_ptr() == at and torch.equal(again, first)
    llmkern.empty_cache()
    assert cached_bytes() == 0 and torch.equal(again, first)


def test_live_outputs_share_nothing():
    outs = [pooled(torch.empty(700, 400)).fill_(i) for i in range(8)]
    assert len({t.data_ptr() for t in outs}) == 8
    assert all((t == i).all() for i, t in enumerate(outs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_like_the_original(dtype):
    like = torch.empty(3, 301, 7, 130, dtype=dtype).transpose(1, 2)
    out = pooled(like)
    assert out.shape == like.shape and out.stride() == like.stride() and out.dtype == dtype
    assert out.data_ptr() != like.data_ptr()
    small = torch.empty(SMALLEST // 4 - 1)
    assert pooled(small) is small
    integers = torch.empty(SMALLEST, dtype=torch.int64)
    assert pooled(integers) is integers


def test_a_slightly_smaller_output_fits_and_a_much_smaller_one_does_not():
    big = pooled(torch.empty(10 << 20))  # 40 MiB
    at = big.data_ptr()
    del big
    small = pooled(torch.empty(2 << 20))
    assert small.data_ptr() != at
    fits = pooled(torch.empty(9 << 20))
    assert fits.data_ptr() == at


def test_what_is_kept_has_a_limit():
    kept = [pooled(torch.empty(1 << 20)) for _ in range(6)]
    memory.keep(9 << 20)
    try:
        del kept
        assert 0 < cached_bytes() <= 9 << 20
    finally:
        memory._pool.cache_clear()  # sets its limit anew


def test_from_many_threads():
    wrong = []

    def work(value: int) -> None:
        for _ in range(50):
            t = pooled(torch.empty(300_000)).fill_(value)
            if not (t == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
