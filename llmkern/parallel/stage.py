"""What a process computes of a decoder: some of its layers, embeddings before or the loss behind them."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..nn.linear_loss import head_loss
from . import ring, tensor, vocabulary
from .exchange import gather, scatter
from .spine import spine_of


class Stage:
    """Takes the place of `forward` of one of our decoders, whose parameters it divides.

    Called with (B, T) ids, whole sequences, or the x of the stage before, and (B, T) targets; gives x, or on
    the last stage the sum of the losses of this process's tokens, (1,).  A stage that is first and last gives
    (None, sum), as a model gives (logits, loss).

    Args:
        model: all of it; what other stages do is removed.
        mesh: of `start`.
        first, last: whether the stage has the embeddings, and the head.
        layers: those of this stage.
    """

    def __init__(
        self, model: nn.Module, mesh: DeviceMesh, layers: range, first: bool = True, last: bool = True
    ) -> None:
        self.model, self.spine, self.first, self.last = model, spine_of(model), first, last
        self.tp, self.cp = mesh["tp"], mesh["cp"]
        self.rows = vocabulary.rows_of(model.config.vocab_size, self.tp)
        self._keep(layers)
        run = self._run
        if self.cp.size() > 1:
            for layer in self.layers:
                ring.attend_in(getattr(layer, self.spine.attention), self.cp)
        if self.tp.size() > 1:
            run = tensor.seen(run, tensor.divide(model, self.spine, self.tp))
        model.forward = run

    def _keep(self, mine: range) -> None:
        s = self.spine
        for number in set(range(len(s.parts[s.layers]))) - set(mine):
            del s.parts[s.layers]._modules[str(number)]  # others keep their names
        if not self.first:
            for name in (s.tokens, s.positions):
                if name:
                    del s.parts[name]
        if not self.last:
            del s.parts[s.norm], self.model.lm_head
        self.layers = s.parts[s.layers]

    def _run(self, x: Tensor, targets: Tensor) -> Any:
        positions = ring.positions(targets.shape[1], self.cp).to(targets.device)  # (T / cp,)
        x = self._embed(x[:, positions], positions) if self.first else x
        for layer in self.layers:
            x = self.spine.step(layer, x, positions)
        if not self.last:
            return x
        loss = self._loss(x, targets[:, positions])
        return (None, loss) if self.first else loss[None]

    def _embed(self, idx: Tensor, positions: Tensor) -> Tensor:
        s = self.spine
        tokens = s.parts[s.tokens]
        if self.tp.size() == 1:
            return s.embed(tokens(idx), positions)
        mine = positions.chunk(self.tp.size())[self.tp.get_local_rank()]
        return s.embed(scatter(vocabulary.embed(idx, tokens.weight, self.rows), self.tp), mine)

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        x = self.spine.parts[self.spine.norm](x)
        if self.tp.size() == 1:
            return head_loss(self.model.lm_head, self.model.loss, x, targets)
        x = gather(x, self.tp)
        return vocabulary.loss(x, self.model.lm_head.weight, targets, self.rows, self.tp)
