"""The training loop, its schedule, and the comparison of two runs."""

import math

import pytest
import torch
from torch import nn

from llmkern.compare import Comparison
from llmkern.measure import peak_bytes, time_by_kind
from llmkern.models import GPTConfig
from llmkern.text import Batches
from llmkern.train import TrainConfig, Trainer, evaluate, warmup_cosine
from llmkern.train.loop import checkpoint_layers
from llmkern.train.schedule import learning_rate

TOKENS = torch.arange(400) % 7  # a text that can be learned


class Tiny(nn.Module):
    """Predicts the next token from the last one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 7)
        self.bias = nn.Parameter(torch.zeros(7))
        self.dropout = nn.Dropout(0.5)

    def forward(self, idx, targets):
        logits = self.table(idx) + self.bias + 0 * self.dropout(self.bias)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Dropping(Tiny):
    """Drops half of its logits."""

    def forward(self, idx, targets):
        logits = self.dropout(self.table(idx) + self.bias)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _trainer(steps=30, make_optimizer=None, batches=None, **options):
    model = Tiny()
    optimizer = make_optimizer and make_optimizer(model.parameters())
    config = TrainConfig(steps, 0.1, 0.01, warmup_steps=5, **options)
    return Trainer(model, batches or Batches(TOKENS, 4, 8), config, optimizer)


def test_schedule():
    rates = [warmup_cosine(step, steps=20, warmup=4, peak=1.0, floor=0.1) for step in range(25)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[12] == pytest.approx(0.55)
    assert rates[20:] == [0.1] * 5
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_stable_decay_and_constant():
    """Up in 4 steps, then 1, in the last 8 of 20 along a root down to 0.1."""
    wsd, constant = (
        [learning_rate(name, step, 20, 4, 8, 1.0, 0.1) for step in range(24)] for name in ("wsd", "constant")
    )
    assert wsd[:4] == constant[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(wsd[4:13]) == set(constant[4:20]) == {1.0}
    assert wsd[14] == pytest.approx(1 - 0.9 * 0.5) and wsd[20:] == pytest.approx([0.1] * 4)


def test_it_learns_and_tells():
    records = list(_trainer())
    assert [record.step for record in records] == list(range(30))
    assert records[-1].loss < 0.5 * records[0].loss
    assert all(r.tokens == 32 and r.seconds > 0 and r.grad_norm > 0 for r in records)
    assert records[4].learning_rate == 0.1


def test_same_seed_same_losses():
    first, second = ([record.loss for record in _trainer(5)] for _ in range(2))
    assert first == second


def test_every_step_has_its_rate_and_fresh_gradients():
    trainer = _trainer(7)
    for record in trainer:
        assert all(group["lr"] == record.learning_rate for group in trainer.optimizer.param_groups)
        assert all(p.grad is None for p in trainer.model.parameters())


def test_accumulated_batches_are_their_mean():
    """Three batches of a step, which lie side by side, are one that is as large as they are together."""
    small = Batches(TOKENS, 4, 8, seed=1)

    class Joined:
        def __getitem__(self, step):
            return [torch.cat(parts) for parts in zip(*(small[i] for i in range(3 * step, 3 * step + 3)))]

    parts, whole = _trainer(4, batches=small, accumulate=3), _trainer(4, batches=Joined())
    for a, b in zip(parts, whole):
        assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-5)
        assert a.tokens == b.tokens == 96
    for p, q in zip(parts.model.parameters(), whole.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_only_matrices_decay():
    decay = {p.dim(): g["weight_decay"] for g in _trainer().optimizer.param_groups for p in g["params"]}
    assert decay == {2: 0.1, 1: 0.0}


def test_gradients_are_clipped():
    for optimizer in (None, torch.optim.AdamW):
        trainer = _trainer(1, optimizer, grad_clip=1e-3)
        record = trainer.advance()
        moments = [trainer.optimizer.state[p]["exp_avg"].norm().item() for p in trainer.model.parameters()]
        assert record.grad_norm > 0.1 and math.hypot(*moments) == pytest.approx(0.1 * 1e-3, rel=1e-2)


def test_a_loss_that_is_not_finite_stops_the_training():
    trainer = _trainer()
    trainer.advance()
    with torch.no_grad():
        trainer.model.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        trainer.advance()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(what):
    """Weights and moments stay as they were; the next step trains."""
    trainer = _trainer(nonfinite="skip")
    trainer.advance()
    before = [p.clone() for p in trainer.model.parameters()]
    if what == "loss":
        handle = trainer.model.register_forward_hook(lambda *args: (None, args[-1][1] * math.nan))
    else:
        handle = trainer.model.bias.register_hook(lambda grad: grad * math.inf)
    assert math.isnan(trainer.advance().grad_norm)
    assert all(map(torch.equal, before, trainer.model.parameters()))
    handle.remove()
    assert trainer.advance().grad_norm > 0
    assert not any(map(torch.equal, before, trainer.model.parameters()))


@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW])
def test_a_gradient_that_is_not_finite_stops_the_training(optimizer):
    trainer = _trainer(5, optimizer)
    trainer.model.bias.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(FloatingPointError, match=r"norm of the gradients is .* at step 0"):
        trainer.advance()


def test_evaluate_leaves_the_model_as_it_was():
    model, batches = Dropping().train(), Batches(TOKENS, 4, 8)
    before = [p.clone() for p in model.parameters()]
    losses = [model.eval()(*batches[step])[1].item() for step in range(3)]
    model.train()
    assert evaluate(model, batches, 3) == pytest.approx(sum(losses) / 3)
    assert model.training and all(map(torch.equal, before, model.parameters()))


def test_bfloat16_runs_under_autocast():
    trainer = _trainer(2, dtype="bfloat16")
    seen = []
    trainer.model.table.register_forward_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
    )
    assert all(math.isfinite(record.loss) for record in trainer)
    assert seen == [torch.bfloat16] * 2
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_checkpointed_layers_run_twice():
    """Those of the longest list, once forward and once in backward, with the same gradients."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"few": nn.ModuleList([nn.Linear(3, 3)]), "many": nn.ModuleList(nn.Linear(3, 3) for _ in range(2))}
    )
    calls = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = _counted(layer, calls)
    x, gradients = torch.randn(2, 3, requires_grad=True), []
    for _ in range(2):
        y = model["many"][1](model["many"][0](model["few"][0](x)).tanh())
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *model.parameters()]))
        checkpoint_layers(model)
    assert all(map(torch.equal, *gradients)) and len(calls) == 3 + 5


def _counted(layer, calls):
    real = layer.forward
    return lambda x: (calls.append(layer), real(x))[1]


def test_peak_counts_what_is_live_at_once():
    weight = torch.ones(1000)

    def step():
        kept = weight + 1  # 4000 bytes
        for _ in range(3):
            weight.view(10, 100).exp()  # 4000 bytes, freed each time
        return kept.mul_(2)

    assert peak_bytes(step) == 8000


def test_time_by_kind_sums_to_the_whole():
    layer = nn.Linear(256, 256)
    seconds = time_by_kind(lambda: layer(torch.ones(512, 256)).sum().backward(), "cpu")
    assert seconds["linear and ffn"] > 0 and seconds["attention"] == 0 and seconds["rest"] > 0


def test_comparison_of_plain_and_swapped():
    batches = Batches(TOKENS, 2, 16)
    comparison = Comparison(GPTConfig(7, 16, 1, 2, 32), batches, TrainConfig(3), seed=0, device="cpu")
    told = []
    comparison.train(lambda plain, swapped: told.append((plain.step, swapped.step)))
    comparison.measure(batches)
    assert told == [(0, 0), (1, 1), (2, 2)]
    assert comparison.largest_difference() < 1e-4
    assert set(comparison.backends_by_op()) == {"attention", "cross_entropy", "ffn", "layer_norm", "linear"}
    assert all(run.peak_bytes > 0 for run in (comparison.plain, comparison.swapped))
    assert not any("llmkern.nn" in repr(type(m)) and ".plain" not in repr(type(m))
                   for m in comparison.plain.trainer.model.modules())  # fmt: skip
