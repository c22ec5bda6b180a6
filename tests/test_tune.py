"""The configuration table and the command that makes it."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from llmkern.kernels import tiles

from benchmarks import tune

ROOT = Path(__file__).parent.parent
KERNELS = {"attention_fwd": 5, "attention_dkv": 5, "attention_dq": 5, "decode": 5, "gemm": 3, "quant": 2}


def test_every_kernel_has_a_tile_for_any_gpu():
    for kernel, kinds in KERNELS.items():
        for nbytes in (2, 4):
            found = [k for k in tiles.TABLE if k[:3] == (kernel, "any", nbytes)]
            assert len(found) == kinds, (kernel, nbytes)
    for key, tile in tiles.TABLE.items():
        assert all(n & (n - 1) == 0 for n in (tile.rows, tile.cols, tile.depth, tile.warps)), key


def test_the_row_of_the_gpu_comes_first(monkeypatch):
    x, mine = torch.empty(1, dtype=torch.bfloat16), tiles.Tile(16, 16, 0, 1, 1)
    any_gpu = tiles.TABLE["gemm", "any", 2, "0"]
    monkeypatch.setitem(tiles.TABLE, ("gemm", "sm_90", 2, "0"), mine)
    assert tiles.find("gemm", x, 0) == any_gpu
    monkeypatch.setattr(tiles, "architecture", lambda x: "sm_90")
    assert tiles.find("gemm", x, 0) == mine and tiles.find("gemm", x.float(), 0) != mine
    assert tiles.find("gemm", x, "none") is None


def test_the_cheapest_candidate_wins():
    key = ("gemm", "sm_90", 2, "0")
    tried = tune.candidates(next(r for r in tune.rows() if r.kernel == "gemm"), 2)
    costs = {tile: math.inf if tile.warps == 8 else tile.rows + tile.stages for tile in tried}
    results = tune.best(key, tried, lambda: (costs[tiles.TABLE[key]], ""))
    assert results[0].cost == min(costs.values()) and costs[results[0].tile] == results[0].cost
    assert key not in tiles.TABLE or tiles.TABLE[key] == tiles.load()[key]


def test_rows_are_written_and_read(tmp_path, monkeypatch):
    path = tmp_path / "tiles.csv"
    path.write_text(tiles.PATH.read_text())
    monkeypatch.setattr(tiles, "PATH", path)
    before, tile = tiles.load(), tiles.Tile(64, 32, 0, 4, 2)
    tune.save({("attention_dq", "sm_90", 2, "64"): tile}, "measured nothing")
    assert tiles.load() == {**before, ("attention_dq", "sm_90", 2, "64"): tile}
    with path.open() as file:
        assert "measured nothing" in {row["source"] for row in csv.DictReader(file)}


def test_guess_by_compiling():
    """Without a GPU: says that it guesses, and a tile that spills is not chosen."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = (
        "from unittest import mock; from benchmarks import tune; from llmkern.kernels.tiles import Tile\n"
        "small, large = Tile(64, 32, 0, 4, 2), Tile(256, 128, 0, 4, 2)\n"
        "with mock.patch.object(tune, 'candidates', lambda row, nbytes: [large, small]):\n"
        "    tune.main(['attention_fwd', '--kind', '64', '--gpu', 'sm_90'])"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    assert "guess" in lines[0], result.stderr
    assert "(64, 32" in lines[2] and "(256, 128" in lines[3] and "inf" in lines[3]


def test_without_a_gpu_it_asks_for_one(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        tune.main([])
    assert "--gpu" in capsys.readouterr().err
