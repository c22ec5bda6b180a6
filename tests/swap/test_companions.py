"""Swapped models beside what people use with models: PEFT, accelerate's device maps, FSDP2."""

import copy
import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import llmkern

families = pytest.importorskip("hf_families")
from hf_families import BATCH, assert_equal, assert_same, run  # noqa: E402

every_family = pytest.mark.parametrize("name", families.FAMILIES)
HOOKED = {  # block -> device; "cpu" stands for every device that has the weights
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu",
    "model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def seed(silent):
    torch.manual_seed(0)


@every_family
@pytest.mark.parametrize("first", ["swap_", "peft"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_peft_lora(name, first):
    peft = pytest.importorskip("peft")

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        return peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        )

    base = families.build(name)
    plain, ours = adapted(copy.deepcopy(base)), copy.deepcopy(base)
    if first == "swap_":
        llmkern.swap_(ours)
    ours = adapted(ours)
    if first == "peft":
        assert llmkern.swap_(ours).changed
    before = run(plain)
    assert len(before[2]) >= 2 * 2 * 4  # A and B of every linear
    assert_same(run(ours), before)
    merged = [m.merge_and_unload() for m in (ours, plain)]
    torch.testing.assert_close(*(m(**BATCH).logits for m in merged), rtol=1e-5, atol=5e-6)
    llmkern.restore_(merged[0])
    assert [type(m) for m in merged[0].modules()] == [type(m) for m in base.modules()]


def dispatch(model: nn.Module, device_map: dict[str, str], folder) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(
        model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


def test_device_map_then_swap(tmp_path):
    """accelerate puts a forward of its own on each block, which runs the class's: ours after swap_."""
    model = families.build("Llama")
    without = {e.path for e in llmkern.swap_(copy.deepcopy(model)).changed}
    before = run(dispatch(model, HOOKED, tmp_path))
    report = llmkern.swap_(model)
    assert {e.path for e in report.changed} == without and not report.left
    assert model.model.norm._hf_hook is not None
    assert_same(run(model), before)
    with llmkern.use("reference"), pytest.raises(ZeroDivisionError):
        model.model.norm.compute = lambda *args, **kwargs: 1 / 0  # ours is what runs
        run(model)
    del model.model.norm.compute
    from accelerate.hooks import remove_hook_from_module

    llmkern.restore_(remove_hook_from_module(copy.deepcopy(model), recurse=True))
    llmkern.restore_(model)
    assert_equal(run(model), before)


def test_swap_after_hooks_were_removed(tmp_path):
    """accelerate leaves the class's own forward on the instance, which must not hide ours."""
    pytest.importorskip("accelerate")
    from accelerate.hooks import remove_hook_from_module

    model = families.build("Llama")
    before = run(model)
    remove_hook_from_module(dispatch(model, HOOKED, tmp_path), recurse=True)
    assert "forward" in vars(model.model.norm)
    report = llmkern.swap_(model)
    assert not report.left and "model.norm" in {e.path for e in report.changed}
    assert_same(run(model), before)
    llmkern.restore_(model)
    assert_equal(run(model), before)


@pytest.mark.parametrize("first", ["swap_", "offload"])
def test_device_map_with_weights_on_disk(tmp_path, first):
    """Blocks without their weights are left alone and named; those swapped before work."""
    model = families.build("Llama").eval()
    before = model(**BATCH).logits.detach()
    if first == "swap_":
        llmkern.swap_(model)
    dispatch(model, {**HOOKED, "model.layers.1": "disk"}, tmp_path)
    if first == "offload":
        report = llmkern.swap_(model)
        left = {e.path: e.note for e in report.left}
        assert left and all("layers.1." in path and "offloaded" in note for path, note in left.items())
        assert {"model.layers.1.mlp", "model.layers.1.input_layernorm", "model.layers.1.mlp.up_proj"} <= set(
            left
        )
        assert "model.layers.0.mlp" in {e.path for e in report.changed}
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCH).logits, before, rtol=1e-5, atol=5e-6)


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layers in model.modules():
        for layer in layers if isinstance(layers, nn.ModuleList) else ():
            fully_shard(layer)
    return fully_shard(model)


def fsdp2(name: str, first: str) -> None:
    """Loss, logits and gradients of a model that is swapped and sharded, in either order, and restored."""
    plain, model = families.build(name), None
    model = copy.deepcopy(plain)
    before = run(plain)
    if first == "swap_":
        llmkern.swap_(model)
    sharded(model)
    if first == "fully_shard":
        report = llmkern.swap_(model)
        assert report.changed and all("call swap_ before fully_shard" in e.note for e in report.left)
    for _ in range(2):  # as it is, and restored
        model.zero_grad()
        out = model(**BATCH)
        out.loss.backward()
        grads = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
        assert_same((out.loss.detach(), out.logits.detach(), grads), before)
        llmkern.restore_(model)
    names = {type(m).__name__.removeprefix("FSDP") for m in model.modules()}
    assert names == {type(m).__name__ for m in plain.modules()}


needs_distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without distributed"
)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@needs_distributed
@every_family
@pytest.mark.parametrize("first", ["swap_", "fully_shard"])
def test_fsdp2(name, first, one_process):
    fsdp2(name, first)


def worker(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    llmkern.set_fallback("silent")
    for name in ("GPT2", "Llama"):
        torch.manual_seed(0)
        fsdp2(name, "swap_")
    torch.distributed.destroy_process_group()


@needs_distributed
def test_fsdp2_on_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port,), nprocs=2)
