"""Which module, phase and memory an op belongs to."""

import torch
from torch import nn

from llmkern.diagnose.memory import Ledger, peak
from llmkern.diagnose.remedies import checkpoint_blocks, repeated_blocks
from llmkern.diagnose.run import trace, trace_fake, warm_up
from llmkern.diagnose.workload import Workload


def test_backward_belongs_to_the_module_of_its_forward(gpt, batch):
    workload = Workload(gpt, batch)
    warm_up(workload)
    calls = trace(workload).calls
    for phase in ("forward", "backward"):
        paths = {call.path for call in calls if call.phase == phase and call.op == "aten.mm"}
        assert "lm_head" in paths, (phase, paths)
    backward = {call.path for call in calls if call.phase == "backward"}
    assert {"transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_proj", "transformer.ln_f"} <= backward
    assert {call.phase for call in calls} == {"forward", "backward", "optimizer"}


def test_checkpointing_is_seen_as_recomputation(gpt, batch):
    plain = trace_fake(Workload(gpt, batch))
    again = trace_fake(Workload(gpt, batch), checkpoint_blocks)
    recomputed = sum(c.flops for c in again.calls if c.phase == "recompute")
    assert recomputed > 0 and not any(c.phase == "recompute" for c in plain.calls)
    assert sum(c.model_flops for c in again.calls) == sum(c.model_flops for c in plain.calls)
    assert peak(again.ledger.timeline())[1]["activations"] < peak(plain.ledger.timeline())[1]["activations"]
    assert len(repeated_blocks(gpt)) == 2


def test_parts_of_memory_at_the_peak(gpt, batch):
    workload = Workload(gpt, batch)
    warm_up(workload)
    parts = peak(trace(workload).ledger.timeline())[1]
    held = sum(p.numel() for p in gpt.parameters()) * 4
    assert parts["weights"] == held
    assert 2 * held <= parts["optimizer"] <= 2 * held + 8 * len(list(gpt.parameters()))
    assert parts["inputs"] == batch[0].numel() * 8
    assert parts["logits"] >= batch[0].numel() * 101 * 4 and parts["activations"] > 0


def test_gradients_are_counted_until_they_are_freed():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    workload = Workload(model, torch.randn(2, 64))
    warm_up(workload)
    timeline = trace(workload).ledger.timeline()
    assert max(column["gradients"] for column in timeline) == 2 * (64 * 64 + 64) * 4
    assert timeline[0]["gradients"] == 0


def test_a_view_adds_no_memory_and_a_freed_block_leaves():
    ledger = Ledger()
    x = torch.zeros(1000)
    assert ledger.add(x, "activations") == [4000] and ledger.add(x[10:], "weights") == []
    ledger.now = 1
    del x
    ledger.now = 2
    assert [column["activations"] for column in ledger.timeline()] == [4000, 4000, 0]


def test_fake_and_real_traces_agree_on_everything_but_time(gpt, batch):
    workload = Workload(gpt, batch)
    fake = trace_fake(workload)
    warm_up(workload)
    real = trace(workload)
    assert [(c.op, c.path, c.flops, c.bytes) for c in fake.calls] == [
        (c.op, c.path, c.flops, c.bytes) for c in real.calls
    ]
    assert peak(fake.ledger.timeline()) == peak(real.ledger.timeline())


def test_a_change_that_looks_at_values_is_made_on_a_copy(gpt, batch):
    def change(model):
        if model.lm_head.weight.abs().max() > 0:  # fake tensors cannot tell
            model.lm_head = nn.Linear(32, 202)

    tracer = trace_fake(Workload(gpt, batch[0]), change)
    assert any(call.model_flops == 2 * batch[0].numel() * 32 * 202 for call in tracer.calls)
    assert gpt.lm_head.out_features == 101
