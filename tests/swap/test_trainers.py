"""Trainers: the same losses and the same steps as unswapped, gradient accumulation included."""

import copy

import pytest
import torch
from torch import Tensor, nn

import llmkern

families = pytest.importorskip("hf_families")
STEPS, ACCUMULATED = 3, 2


@pytest.fixture
def model(silent) -> nn.Module:
    torch.manual_seed(0)
    return families.build("Llama")


def examples() -> list[dict[str, Tensor]]:
    """As many labels that count as the example's number: means of means would differ from the mean of all."""
    rows = []
    for i, ids in enumerate(families.tokens(2 * STEPS * ACCUMULATED, 11)):
        labels = ids.clone()
        labels[2 + i % 7 :] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def hugging_face(model: nn.Module, tmp_path) -> list[float]:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=STEPS, per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATED, learning_rate=1e-2, logging_steps=1, report_to=[],
        save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=examples())
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def lightning(model: nn.Module, tmp_path) -> list[float]:
    pl = pytest.importorskip("pytorch_lightning")
    losses = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss = self.model(**batch).loss
            losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    trainer = pl.Trainer(
        accelerator="cpu", max_steps=STEPS, accumulate_grad_batches=ACCUMULATED, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(examples(), batch_size=2))
    return losses


def plain_loop(model: nn.Module, tmp_path) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    loader = torch.utils.data.DataLoader(examples(), batch_size=2)
    for i, batch in enumerate(loader):
        loss = model(**batch).loss
        (loss / ACCUMULATED).backward()
        losses.append(loss.item())
        if (i + 1) % ACCUMULATED == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("train", [hugging_face, lightning, plain_loop])
@pytest.mark.parametrize("loss", ["auto", "fused"])
@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore:.*num_workers")
def test_the_same_training(model, train, loss, tmp_path):
    twin = copy.deepcopy(model)
    expected = train(twin, tmp_path)
    report = llmkern.swap_(model, loss=loss)
    assert any("loss" in e.now for e in report.changed)
    losses = train(model, tmp_path)
    assert len(losses) >= STEPS and expected[-1] < expected[0]
    assert losses == pytest.approx(expected, rel=1e-4)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=2e-3)
