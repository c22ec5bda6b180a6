"""Checkpoints: what is saved comes back, and what is damaged is found."""

import json
import random
import resource
import shutil

import pytest
import torch

from llmkern import durable
from llmkern.errors import UserError
from llmkern.models import GPT, GPTConfig
from llmkern.optim import AdamW
from llmkern.text import CharTokenizer
from llmkern.train import checkpoint
from llmkern.train.tensors import fill_optimizer

CONFIG = GPTConfig(vocab_size=7, block_size=8, n_layer=1, n_head=2, n_embd=8)
TOKENIZER = CharTokenizer("abcdefg")


def _trained(steps=2):
    """A small model, trained a little, and its optimizer."""
    torch.manual_seed(0)
    model = GPT(CONFIG)
    optimizer = AdamW(model.parameters(), 1e-2, max_norm=1.0)
    for _ in range(steps):
        model(torch.arange(7)[None], torch.arange(7)[None])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def _save(run, step=2, **options):
    model, optimizer = _trained()
    return checkpoint.save(run, step, model, TOKENIZER, optimizer, {"seed": 3}, **options)


def test_a_checkpoint_comes_back_whole(tmp_path):
    model, optimizer = _trained()
    path = checkpoint.save(tmp_path, 2, model, TOKENIZER, optimizer, {"seed": 3})
    found = checkpoint.load(tmp_path)
    assert found.folder == path == checkpoint.load(path).folder
    assert found.step == 2 and found.state["seed"] == 3
    assert found.tokenizer().to_json() == TOKENIZER.to_json()
    again = found.build_model()
    assert again.config == CONFIG and not again.training
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert again.lm_head.weight is again.transformer.wte.weight
    other = AdamW(again.parameters(), 1.0, max_norm=1.0)
    fill_optimizer(other, dict(again.named_parameters()), found.optimizer_tensors(), found.state["optimizer"])
    before, after = optimizer.state_dict(), other.state_dict()
    assert before["param_groups"] == after["param_groups"]
    assert before["state"].keys() == after["state"].keys()
    for i, fields in before["state"].items():
        assert all(torch.equal(value, after["state"][i][name]) for name, value in fields.items())


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10):
        _save(tmp_path, step)
    assert [path.name for path in checkpoint.folders(tmp_path)] == ["step-00000002", "step-00000010"]
    assert checkpoint.load(tmp_path).step == 10
    _save(tmp_path, 11, keep=0)
    assert len(checkpoint.folders(tmp_path)) == 3


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("harm", ["flip", "truncate", "append", "remove"])
def test_damage_is_named_and_passed_over(tmp_path, name, harm):
    _save(tmp_path, 1)
    path = _save(tmp_path, 2) / name
    _harm(path, harm, random.Random(name + harm))
    said = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found.step == 1 and len(said) == 1 and "step-00000002" in said[0] and name in said[0]
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(path.parent)
    shutil.rmtree(found.folder)
    with pytest.raises(UserError, match="all 1 checkpoints"):
        checkpoint.newest(tmp_path, said.append)


def _harm(path, harm, chance):
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif harm == "truncate":
        del data[chance.randrange(len(data)) :]
    elif harm == "append":
        data.append(0)
    path.unlink()
    if harm != "remove":
        path.write_bytes(data)


def test_300_flips_and_300_truncations_are_found(tmp_path):
    folder = _save(tmp_path)
    chance = random.Random(0)
    files = sorted(folder.iterdir())
    for harm in ("flip", "truncate"):
        for _ in range(300):
            path = chance.choices(files, [p.stat().st_size for p in files])[0] if chance.random() < 0.7 else (
                chance.choice(files)
            )  # fmt: skip
            whole = path.read_bytes()
            _harm(path, harm, chance)
            with pytest.raises(durable.Damaged):
                checkpoint.read(folder)
            path.write_bytes(whole)
    checkpoint.read(folder)


def test_foreign_folders_and_other_models(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.load(tmp_path)
    found = checkpoint.load(_save(tmp_path))
    with pytest.raises(UserError, match=r"wte.weight has shape \(7, 8\), expected \(9, 8\)"):
        found.load_into(GPT(GPTConfig(9, 8, 1, 2, 8)))
    with pytest.raises(UserError, match=r"has no transformer.h.1"):
        found.load_into(GPT(GPTConfig(7, 8, 2, 2, 8)))
    with pytest.raises(UserError, match=r"transformer.h.0.* is not in this one"):
        found.load_into(GPT(GPTConfig(7, 8, 0, 2, 8)))


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    _save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="has format 2, expected at most 1; update llmkern"):
        checkpoint.load(tmp_path)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    before = {p: p.read_bytes() for p in _save(tmp_path, 1).iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # no file may grow beyond
    try:
        with pytest.raises(
            UserError, match=r"step 2 cannot be written .*File too large.*step-00000001, as it"
        ):
            _save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p: p.read_bytes() for p in checkpoint.load(tmp_path).folder.iterdir()} == before
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_the_order_of_calls_is_safe(tmp_path, monkeypatch):
    """Every file is synced before the rename, and the folder's name after it."""
    calls = []
    for name in ("write", "fsync", "rename"):
        real = getattr(durable.os, name)
        monkeypatch.setattr(durable.os, name, _traced(name, real, calls))
    _save(tmp_path)
    rename = calls.index("rename")
    assert calls[rename - 1 : rename + 2] == ["fsync", "rename", "fsync"]
    before = calls[:rename]
    assert before.count("fsync") == 6  # five files and their folder
    assert all(before[i + 1] in ("write", "fsync") for i, name in enumerate(before) if name == "write")


def _traced(name, real, calls):
    def call(*args, **kwargs):
        calls.append(name)
        return real(*args, **kwargs)

    return call


def test_there_is_no_pickle(tmp_path):
    for path in _save(tmp_path).iterdir():
        assert path.suffix in (".safetensors", ".json")
        if path.suffix == ".json":
            json.loads(path.read_text())
