"""AdamW on llmkern's kernels."""

import torch
from torch import Tensor

from . import ops
from .ops.dispatch import fall_back


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` in one pass over the parameters: same arguments, state and state_dict.

    Where a group has amsgrad, maximize, capturable or differentiable, a scaler left its found_inf, or a
    parameter is complex, not contiguous or has a sparse gradient, it takes torch's own step and says so.

    Source: Loshchilov, Hutter 2019, Decoupled Weight Decay Regularization, arXiv:1711.05101.
    """

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        """One step; `closure` evaluates the loss again and is called with gradients enabled."""
        if reason := self._why_torch():
            fall_back("AdamW", reason)
            return _torch_step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _why_torch(self) -> str | None:
        if getattr(self, "found_inf", None) is not None:
            return "a gradient scaler left found_inf to the optimizer"
        for group in self.param_groups:
            for option in ("amsgrad", "maximize", "capturable", "differentiable"):
                if group[option]:
                    return f"{option}=True"
            for p in group["params"]:
                if p.is_complex() or not p.is_contiguous() or (p.grad is not None and p.grad.is_sparse):
                    return "a parameter is complex, not contiguous or has a sparse gradient"
        return None

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
        torch.autograd.graph.increment_version(params)


def _torch_step(optimizer: AdamW, closure) -> Tensor | None:
    """torch's step, without the hooks of the optimizer, which run around ours already."""
    step = torch.optim.AdamW.step
    if hasattr(step, "hooked"):  # torch wraps it so when an optimizer of that class is made
        step = step.__wrapped__
    return step(optimizer, closure)
