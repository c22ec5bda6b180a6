"""Bugs of others in norms, losses, optimizers, compilers, trainers and files, as tests."""

import copy
import struct

import pytest
import torch
import torch.nn.functional as F
from error_rule import run
from gguf_file import build, info
from guard_pages import guarded
from here import GPU, TRITON
from history.bugs import COUNT, bug, close, far_apart, randn
from torch import nn
from triton_interpreter import overflow_checks

import llmkern
from llmkern import ops
from llmkern.models import GGUF, GGUFError
from llmkern.ops import OPS
from llmkern.ops.op import Op, samples
from llmkern.text.batches import Batches

pytestmark = pytest.mark.usefixtures("strict")
each_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@bug(10, "fla-org/flash-linear-attention#1080")
def test_rows_beyond_int32(backend: str):
    x = far_apart(2, 3, 16)
    with ops.use(backend), overflow_checks():
        for op in (lambda x: ops.rms_norm(x, (16,)), ops.softmax, lambda x: ops.layer_norm(x, (16,))):
            assert torch.equal(op(x), op(x.contiguous()))


@bug(11, "fla#871, #1138")
@bug(29, "unslothai/unsloth#10617; Dao-AILab/quack#88")
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_strided_and_expanded_upstream(norm, backend: str, device: str):
    op, theirs = getattr(ops, norm), getattr(F, norm)
    x = randn(6, 5, 33, device=device)
    strided = randn(33, 5, 6, device=device).permute(2, 1, 0)
    if device == "cpu":
        strided = guarded(strided.permute(2, 1, 0)).permute(2, 1, 0)  # nothing behind it may be read
    for upstream in (strided, torch.ones((), device=device).expand(6, 5, 33)):
        a, b = x.clone().requires_grad_(), x.double().requires_grad_()
        with ops.use(backend):
            op(a, (33,)).backward(upstream)
        theirs(b, (33,)).backward(upstream.double())
        close(a.grad, b.grad)


@bug(30, "flagos-ai/FlagGems#5392")
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 1, 3, 7), (1, 2, 1, 2, 7)])
def test_layer_norm_of_any_rank(shape, backend: str, device: str):
    w = randn(7, device=device)
    x = guarded(randn(*shape)) if device == "cpu" else randn(*shape, device=device)
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    with ops.use(backend):
        ops.layer_norm(a, (7,), w, w).square().sum().backward()
    F.layer_norm(b, (7,), w.double(), w.double()).square().sum().backward()
    close(a.grad, b.grad)


@bug(18, "pytorch#101967, #120802")
@each_op
def test_the_first_call_is_as_the_second(op: Op, backend: str, device: str):
    """Nothing is tried out on a user's tensors."""
    sample = next(samples(op, torch.float32, device))
    first, second = (run(op, sample, backend=backend) for _ in range(2))
    assert all(map(torch.equal, first.outputs, second.outputs))


@bug(19, "pytorch#132196, #198031")
@bug(20, "pytorch#136550")
def test_compiled_with_one_tensor_twice(silent):
    x = randn(1, 2, 9, 16)

    def function(x):
        y = x.clone()
        return ops.attention(y, y, y) + ops.rms_norm(y, (16,))

    assert torch.equal(torch.compile(function, backend="aot_eager", fullgraph=True)(x), function(x))


@bug(21, "NVIDIA/cuEquivariance#223")
def test_fake_strides_are_the_real_ones(silent):
    x = randn(2, 9, 3, 16).permute(0, 2, 1, 3)
    real, fake = ops.attention(x, x, x), ops.attention(*(x.to("meta"),) * 3)
    assert real.stride() == fake.stride()


@bug(22, "pytorch#195829")
def test_cross_entropy_of_shifted_logits(backend: str, device: str):
    z, target = (randn(4, 50, device=device) * 4).round() / 4, torch.arange(4, device=device)
    with ops.use(backend):
        close(ops.cross_entropy(z + 1e4, target), F.cross_entropy(z.double(), target), 1e-5)


@bug(24, "linkedin/Liger-Kernel#968, #678")
@pytest.mark.parametrize("fused", [False, True])
def test_losses_of_each_token_have_gradients(fused, backend: str, device: str):
    """With a random upstream gradient: one of ones hides a factor."""
    h, w = randn(6, 8, device=device), randn(11, 8, device=device)
    target, upstream = torch.arange(6, device=device), randn(6, device=device, seed=3)
    a, b = h.clone().requires_grad_(), h.double().requires_grad_()
    with ops.use(backend):
        if fused:
            losses = ops.linear_cross_entropy(a, w, target, reduction="none")
        else:
            losses = ops.cross_entropy(a @ w.t(), target, reduction="none")
        losses.backward(upstream)
    F.cross_entropy(b @ w.double().t(), target, reduction="none").backward(upstream.double())
    close(a.grad, b.grad)


@bug(25, "Liger-Kernel#507")
@pytest.mark.parametrize("wanted", [(), (0,), (1,), (0, 1)])
def test_the_loss_does_not_depend_on_who_needs_gradients(wanted, backend: str, device: str):
    h, w = randn(6, 8, device=device), randn(11, 8, device=device)
    for i in wanted:
        (h, w)[i].requires_grad_()
    target = torch.arange(6, device=device)
    with ops.use(backend):
        close(ops.linear_cross_entropy(h, w, target), F.cross_entropy(h.double() @ w.double().t(), target))


@bug(26, "Liger-Kernel#802")
@bug(32, "FlagGems#4988; bitsandbytes#2010; timm#2750")
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_against_float64(decay):
    """Groups with and without decay, 100 steps, gradients accumulated in 1 or 4 pieces."""
    params = [randn(5, 7), randn(7)]
    kinds = (torch.float32, torch.float32, torch.float64)
    ours, pieces, exact = ([nn.Parameter(p.clone().to(dtype)) for p in params] for dtype in kinds)

    def groups(ps):
        return [{"params": [ps[0]], "weight_decay": decay}, {"params": [ps[1]], "weight_decay": 0.0}]

    made = [llmkern.optim.AdamW(groups(ps), 1e-2) for ps in (ours, pieces)]
    made.append(torch.optim.AdamW(groups(exact), 1e-2))
    for step in range(100):
        x = randn(8, 7, seed=step)
        for ps, parts in ((ours, 1), (pieces, 4), (exact, 1)):
            for part in x.chunk(parts):
                part = part.to(ps[0].dtype)
                ((part @ ps[0].t()).square().mean() + (part * ps[1]).square().mean()).div(parts).backward()
        for optimizer in made:
            optimizer.step()
            optimizer.zero_grad()
    for a, b, c in zip(ours, pieces, exact):
        close(a, c, 1e-5)
        close(b, c, 1e-5)


@bug(27, "Liger-Kernel#512, #1391; axolotl#1601")
def test_the_weight_gradient_is_summed_in_float32(backend: str, device: str):
    """Its error in bfloat16 does not grow with the number of rows."""
    w = (randn(8, 16, device=device) / 4).bfloat16()
    errors = []
    for rows in (64, 1024):
        h, target = randn(rows, 16, device=device).bfloat16(), torch.arange(rows, device=device) % 8
        a, b = w.clone().requires_grad_(), w.double().requires_grad_()
        with ops.use(backend):
            ops.linear_cross_entropy(h, a, target).backward()
        F.cross_entropy(h.double() @ b.t(), target).backward()
        errors.append(((a.grad.double() - b.grad).norm() / b.grad.norm()).item())
    assert max(errors) < 2**-8


@bug(28, "Liger-Kernel#1305")
@each_op
def test_nothing_that_was_given_is_changed(op: Op, silent):
    if op.mutates:
        return
    sample = next(samples(op, torch.float32))
    before = copy.deepcopy([t for t in sample.args if isinstance(t, torch.Tensor)])
    run(op, sample)
    assert all(map(torch.equal, before, [t for t in sample.args if isinstance(t, torch.Tensor)]))


@bug(31, "apple/ml-cross-entropy#59")
@pytest.mark.parametrize("classes", [1, 15, 17, 127, 129])
def test_vocabulary_that_fills_no_tile(classes, backend: str, device: str):
    h, w = randn(5, 8, device=device), randn(classes, 8, device=device)
    target = torch.full((5,), classes - 1, device=device)
    with ops.use(backend):
        loss = ops.linear_cross_entropy(h, w, target)
    close(loss, F.cross_entropy(h.double() @ w.double().t(), target))


@pytest.mark.skipif(GPU or not TRITON, reason="about Triton's interpreter")
@bug(35, "triton#11584")
def test_bfloat16_in_the_interpreter():
    x = randn(4, 64).bfloat16()
    with ops.use("triton"):
        close(ops.rms_norm(x, (64,), eps=1e-5), F.rms_norm(x.double(), (64,), eps=1e-5), 2**-8)


@bug(36, "Lightning#688, #19970, #21431; transformers#35525")
def test_a_checkpoint_killed_half_way_is_none(tmp_path, monkeypatch):
    from llmkern import durable

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(durable, "rename", killed)
    with pytest.raises(KeyboardInterrupt), durable.NewFolder(tmp_path / "step-1") as folder:
        folder.write("x", [b"data"])
    assert not (tmp_path / "step-1").exists()


@bug(37, "karpathy/nanoGPT#467; paiml/entrenar#294")
@pytest.mark.parametrize("order", ["random", "epochs"])
def test_a_resumed_run_sees_new_data(order):
    """The batch of a step is a function of the step, for whoever asks."""
    tokens = torch.arange(999)
    unbroken, resumed = (Batches(tokens, 3, 8, seed=1, order=order) for _ in range(2))
    seen = [unbroken[step][0] for step in range(9)]
    assert torch.equal(resumed[6][0], seen[6])
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@bug(38, "ggml-org/llama.cpp#24263, #18674, #25378, #27203; antirez/gguf-tools#25")
@pytest.mark.parametrize("dims", [(0, 2**40), (2**32, 2**32), (2**63, 1), (32,) * 5, (2**61, 8)], ids=str)
def test_gguf_dimensions_that_lie(dims, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(build((), [info("x", dims, 8, 0)], bytes(64)))
    with pytest.raises(GGUFError):
        GGUF(path).tensor("x")
    path.write_bytes(build((), [], b"", counts=(2**61, 0)))
    with pytest.raises(GGUFError):
        GGUF(path)
    assert struct.calcsize("<Q") == 8


def test_every_bug_has_its_test(request):
    """The numbers 1 to 38 of the list."""
    from history import test_attention_bugs

    marks = [
        mark.args[0]
        for module in (request.module, test_attention_bugs)
        for test in vars(module).values()
        for mark in getattr(test, "pytestmark", ())
        if mark.name == "bug"
    ]
    assert sorted(set(marks)) == list(range(1, COUNT + 1))
