"""`diagnose`: what it finds, prints and leaves as it was."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import nn

import llmkern
from llmkern.diagnose import page
from llmkern.diagnose.report import WALLS


def test_memory_is_predicted_to_the_byte(diagnosed):
    for each in (diagnosed, diagnosed.after):
        assert each.prediction.peak_bytes == each.peak_bytes
        assert each.prediction.parts == each.parts


def test_the_prediction_of_swap_is_the_swapped_model(diagnosed):
    swap = next(r for r in diagnosed.remedies if r.name == "swap_")
    assert "llmkern.nn.Block" in diagnosed.swap and any(
        r.op.startswith("llmkern.") for r in diagnosed.after.rows
    )
    assert swap.peak_bytes == diagnosed.after.peak_bytes
    assert swap.speedup == pytest.approx(diagnosed.prediction.seconds / diagnosed.after.prediction.seconds)


def test_walls_are_the_whole_step(diagnosed):
    assert set(diagnosed.walls) == set(WALLS) and sum(diagnosed.walls.values()) == pytest.approx(
        diagnosed.seconds
    )
    assert sum(diagnosed.share(row.seconds) for row in diagnosed.rows) <= 1 + 1e-9
    assert 0 < diagnosed.mfu < 10 and 0 < diagnosed.hfu < 10


def test_remedies_are_ordered_by_gain(diagnosed):
    names = [r.name for r in diagnosed.remedies]
    gains = [round(r.speedup, 2) for r in diagnosed.remedies]
    assert gains == sorted(gains, reverse=True)
    assert {"swap_", "bfloat16", "twice the batch", "checkpointing", "FSDP, 8 devices"} <= set(names)


def test_the_model_is_as_before(gpt, batch, profile):
    gpt.eval()
    weights = {name: t.clone() for name, t in gpt.state_dict().items()}
    for p in gpt.parameters():
        p.grad = torch.ones_like(p)
    state = torch.random.get_rng_state()
    llmkern.diagnose(gpt, batch, profile=profile)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not gpt.training and all(torch.equal(p.grad, torch.ones_like(p)) for p in gpt.parameters())
    assert all(torch.equal(t, weights[name]) for name, t in gpt.state_dict().items())


def test_text_json_and_page(diagnosed, tmp_path):
    text = str(diagnosed)
    for words in ("Walls", "Ops, longest first", "Memory at the peak", "gain of swap_", "MFU counts"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 118
    data = json.loads(json.dumps(diagnosed.to_dict()))
    assert data["after"]["rows"] and data["wall"] in WALLS and data["remedies"][0]["reason"]
    assert sum(data["parts"].values()) == data["peak_bytes"]
    file = tmp_path / "wall.html"
    diagnosed.save_html(file)
    html = file.read_text()
    assert not re.search(r"(src|href)=|url\(|@import|<script", html), "the page asks for something"
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html
    for label in ("roofline of the ops", "memory over the step"):
        assert html.count(f'aria-label="{label}"') == 2  # before and after


def test_the_page_is_well_formed_and_escapes_names(diagnosed):
    html = page.page(dataclasses.replace(diagnosed, name="<b>&\"'"))
    assert "<b>&\"'" not in html
    body = re.search(r"<body>.*</body>", html, re.DOTALL).group()
    ElementTree.fromstring(body.replace("&#x27;", "'"))
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        places = re.findall(r'\b(?:cx|cy|x|y|x1|y1)="([^"]*)"', svg)
        assert places and all(-1 <= float(place) <= 480 for place in places)


def test_inference_has_no_optimizer(gpt, batch, profile):
    found = llmkern.diagnose(gpt, batch[:1], mode="inference", profile=profile)
    assert {row.phase for row in found.rows} == {"forward"} and found.parts["optimizer"] == 0
    assert {"int8 weights", "int4 weights"} <= {r.name for r in found.remedies}
    assert not any(p.grad is not None for p in gpt.parameters())


def test_waiting_for_data_is_a_wall(profile):
    def slow():
        import time

        while True:
            time.sleep(0.02)
            yield torch.randn(4, 8)

    found = llmkern.diagnose(nn.Linear(8, 8), slow(), profile=profile)
    assert found.wall == "data" and found.walls["data"] > 0.5 * found.seconds


def test_communication_is_a_wall(profile, tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(8, 8))
        found = llmkern.diagnose(model, torch.randn(4, 8), profile=profile)
    finally:
        torch.distributed.destroy_process_group()
    (row,) = (row for row in found.rows if row.wall == "communication")
    assert row.op == "c10d.allreduce_" and row.bytes >= 4 * (64 + 8)
    assert found.walls["communication"] > 0


def test_a_model_that_looks_at_values_is_measured_all_the_same(profile):
    class Looks(nn.Linear):
        def forward(self, x):
            return super().forward(x * 2 if x.sum().item() > 0 else x)

    found = llmkern.diagnose(Looks(8, 8), torch.randn(4, 8), profile=profile)
    assert any("not predictable before it ran" in note for note in found.notes)
    assert any("swap_ could not be predicted" in note for note in found.notes)
    assert found.prediction.peak_bytes == found.peak_bytes


def test_a_loss_is_found_or_named(profile):
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))
    tokens = torch.randint(11, (2, 5))
    assumed = llmkern.diagnose(model, tokens, profile=profile)
    assert any("cross-entropy" in note for note in assumed.notes)
    given = llmkern.diagnose(model, tokens, loss_fn=lambda out, batch: out.square().mean(), profile=profile)
    assert not any("loss" in note for note in given.notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "fast"}, "mode is 'fast', expected one of train, inference"),
        ({"model": 3}, "model is int, expected a torch.nn.Module"),
        ({"batch": (1, 2, 3, 4, 5, 6)}, "does not fit"),
        ({"batch": torch.randn(2, 7)}, "cannot run a train step on this batch"),
        ({"batch": iter([])}, "has no more elements"),
        ({"model": nn.Flatten()}, "no parameter requires a gradient"),
        ({"model": nn.Linear(8, 8, device="meta")}, "is on meta and cannot run"),
    ],
)
def test_bad_input_is_told_in_one_sentence(profile, change, words):
    arguments = {"model": nn.Linear(8, 8), "batch": torch.randn(2, 8), "profile": profile, **change}
    with pytest.raises(ValueError, match=words) as error:
        llmkern.diagnose(**arguments)
    assert "\n" not in str(error.value)
