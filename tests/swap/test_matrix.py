"""Every model against float64, forward, backward, generating, compiled and restored.

`pytest tests/swap --matrix` runs it at a size at which speed means something, and writes the table into
README.md and docs/swap.md.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import matrix
import pytest
import torch
from torch import Tensor, nn

families = pytest.importorskip("hf_families")
LARGE = families.Size(width=256, inner=1024, layers=4, heads=4, vocabulary=1024)
ROUNDS, BATCH, LENGTH, NEW = 7, 4, 128, 16
TITLE = f"at width {LARGE.width}, {LARGE.layers} layers, {BATCH} x {LENGTH} tokens, float32"


class Encoder(nn.Module):
    """torch's own encoder, with a head and a loss."""

    def __init__(self, size: families.Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        # GELU: one ReLU that rounds to the other side of 0 would be all of the error
        layer = nn.TransformerEncoderLayer(
            size.width, size.heads, size.inner, 0.0, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)
        self.head = nn.Linear(size.width, size.vocabulary)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.encoder(self.embedding(input_ids)))
        return {"loss": self.loss(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def nanogpt(size: families.Size) -> nn.Module:
    """The example's GPT of somebody's own classes."""
    examples = str(Path(__file__).parents[2] / "examples")
    sys.path.insert(0, examples)
    try:
        from nanogpt import GPT, Config

        gpt = GPT(Config(size.vocabulary, 256, size.layers, size.heads, size.width))
    finally:
        sys.path.remove(examples)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = gpt

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits, loss = self.gpt(input_ids, labels)
            return {"loss": loss, "logits": logits}

    return Named()


OTHERS = {"nn.TransformerEncoder": Encoder, "GPT of own classes": nanogpt}
MODELS = [*families.FAMILIES, *OTHERS]


@pytest.fixture(scope="module")
def rows(request) -> Iterator[list[matrix.Row]]:
    found: list[matrix.Row] = []
    yield found
    if request.config.getoption("--matrix"):
        assert len(found) == len(MODELS), "some models failed, or were left out: no matrix is written"
        matrix.write(found, TITLE)


@pytest.mark.parametrize("name", MODELS)
def test_matrix(name, rows, request, silent):
    torch.manual_seed(0)
    torch._dynamo.reset()
    large = request.config.getoption("--matrix")
    size = LARGE if large else families.Size(layers=1)
    model = OTHERS[name](size) if name in OTHERS else families.build(name, size)
    tokens = (BATCH, LENGTH) if large else (2, 11)
    batch = families.labelled(batch=tokens[0], length=tokens[1], vocabulary=size.vocabulary)
    prompt = families.tokens(1, 8, size.vocabulary) if name in families.CAUSAL else None
    row = matrix.measure(name, model, batch, prompt, NEW, ROUNDS if large else 1)
    rows.append(row)
    for cell in (row.forward, row.backward, row.compiled):
        assert cell.ours <= 2 * cell.torch + 4 * 2**-24
    assert row.same_tokens in (None, True) and row.restored


def test_it_is_written_between_its_marks(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{matrix.BEGIN}\nold\n{matrix.END}\n\nafter\n")
    monkeypatch.setattr(matrix, "PAGES", (page,))
    cell = matrix.Against(1e-7, 2e-7, 1.5)
    for _ in range(2):
        matrix.write([matrix.Row("GPT", cell, cell, True, 1.25, cell, True)], "at any size")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\n\nafter\n") and "old" not in text
    assert "| GPT | 1.0e-07 (2.0e-07), 1.50x |" in text and text.count("same tokens, 1.25x") == 1
