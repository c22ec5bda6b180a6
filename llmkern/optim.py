"""AdamW on llmkern's kernels."""

import torch
from torch import Tensor

from . import ops


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` in one pass over the parameters: same arguments, state and state_dict.

    With a group that has amsgrad, maximize, capturable or differentiable, a scaler's found_inf, or a
    parameter that is complex, not contiguous or has a sparse gradient, it takes torch's own step.

    Source: Loshchilov, Hutter 2019, Decoupled Weight Decay Regularization, arXiv:1711.05101.
    """

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        """One step; `closure` evaluates the loss again and is called with gradients enabled."""
        if not all(map(self._fits, self.param_groups)) or getattr(self, "found_inf", None) is not None:
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    @staticmethod
    def _fits(group: dict) -> bool:
        options = ("amsgrad", "maximize", "capturable", "differentiable")
        plain = all(
            p.is_floating_point() and p.is_contiguous() and not (p.grad is not None and p.grad.is_sparse)
            for p in group["params"]
        )
        return plain and not any(group[o] for o in options)

    def _update(self, group: dict) -> None:
        lists = [], [], [], [], [], []
        self._init_group(group, *lists)
        beta1, beta2 = group["betas"]
        params, grads, exp_avgs, exp_avg_sqs, _, steps = lists
        together = {}  # a parameter that had no gradient is behind the others
        for i, step in enumerate(steps):
            step += 1
            together.setdefault((int(step), params[i].device), []).append(i)
        for (step, _), chosen in together.items():
            many = ([all_[i] for i in chosen] for all_ in (params, grads, exp_avgs, exp_avg_sqs))
            detached = ([t.detach() for t in part] for part in many)
            ops.adamw(*detached, step, float(group["lr"]), beta1, beta2, group["weight_decay"], group["eps"])
