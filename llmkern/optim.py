"""AdamW on llmkern's kernels."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .ops.dispatch import fall_back


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` in one pass over the parameters: same arguments, state and state_dict, and more.

        optimizer = llmkern.optim.AdamW(model.parameters(), lr=3e-4, max_norm=1.0)

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused:
            as torch's.
        max_norm: before each step the gradients are scaled as `torch.nn.utils.clip_grad_norm_` does it
            for all parameters of the optimizer, but inside the step: the gradients stay as they are.  Their
            norm is `grad_norm` afterwards.  A norm that is not finite makes all parameters NaN, as there.
        master_weights: bfloat16 and float16 parameters have a float32 value in the state, from which they
            are rounded.
        stochastic_rounding: bfloat16 parameters are rounded up or down at random, with the right mean, so
            that steps smaller than their precision are not lost (Zamirai et al. 2020, Revisiting BFloat16
            Training, arXiv:2010.06192, sec. 4).  The random numbers are a function of torch's generator.

    With either of the last two the moments are float32, as `state_dict` shows.  Where a group has
    capturable or differentiable, a scaler left its found_inf, or a parameter is complex, not contiguous or
    has a sparse gradient, torch's own step runs and says so.

    Source: Loshchilov, Hutter 2019, Decoupled Weight Decay Regularization, arXiv:1711.05101.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"AdamW: max_norm is {max_norm}, expected a positive number or None")
        if master_weights and stochastic_rounding:
            raise ValueError("AdamW: master_weights and stochastic_rounding are both True, expected one")
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            maximize=maximize, foreach=foreach, capturable=capturable, differentiable=differentiable,
            fused=fused,
        )  # fmt: skip
        self.max_norm = max_norm
        self.master_weights, self.stochastic_rounding = master_weights, stochastic_rounding
        self.grad_norm: Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        """One step; `closure` evaluates the loss again and is called with gradients enabled."""
        if reason := self._why_torch():
            if self.max_norm is not None or self.master_weights or self.stochastic_rounding:
                raise ValueError(
                    f"AdamW: {reason}, expected none of this with max_norm, master_weights or "
                    "stochastic_rounding"
                )
            fall_back("AdamW", reason)
            return _torch_step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = self._clip()
        for group in self.param_groups:
            self._update(group, scale)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch, which casts states to the dtype of their parameter: here float32 stays float32."""
        super().load_state_dict(state_dict)
        if not (self.master_weights or self.stochastic_rounding):
            return
        order = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(order, parameters):
            for name, value in state_dict["state"].get(i, {}).items():
                if name != "step" and isinstance(value, Tensor):
                    self.state[p][name] = value.to(p.device, torch.float32, copy=True)

    def _why_torch(self) -> str | None:
        if getattr(self, "found_inf", None) is not None:
            return "a gradient scaler left found_inf to the optimizer"
        for group in self.param_groups:
            for option in ("capturable", "differentiable"):
                if group[option]:
                    return f"{option}=True"
            for p in group["params"]:
                if p.is_complex() or not p.is_contiguous() or (p.grad is not None and p.grad.is_sparse):
                    return "a parameter is complex, not contiguous or has a sparse gradient"
        return None

    def _clip(self) -> Tensor | None:
        """The factor of all gradients, without waiting for the device."""
        if self.max_norm is None:
            return None
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return None
        self.grad_norm = ops.grad_norm(grads)
        return (self.max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)

    def _update(self, group: dict, scale: Tensor | None) -> None:
        together: dict[tuple, list[Tensor]] = {}  # what was skipped is behind the others
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                self._start(p, group["amsgrad"], state)
            state["step"] += 1
            key = int(state["step"]), p.device, p.dtype, state["exp_avg"].dtype
            together.setdefault(key, []).append(p)
        beta1, beta2 = group["betas"]
        for (step, device, dtype, _), params in together.items():
            states = [self.state[p] for p in params]
            masters = "master" in states[0]
            random = self.stochastic_rounding and dtype == torch.bfloat16
            ops.adamw(
                [p.detach() for p in params],
                [p.grad for p in params],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                step, float(group["lr"]), beta1, beta2, group["weight_decay"], group["eps"],
                max_exp_avg_sqs=[s["max_exp_avg_sq"] for s in states] if group["amsgrad"] else None,
                masters=[s["master"] for s in states] if masters else None,
                grad_scale=scale,
                seed=torch.randint(2**63 - 1, (), device=device) if random else None,
                maximize=group["maximize"],
            )  # fmt: skip
            torch.autograd.graph.increment_version(params)

    def _start(self, p: Tensor, amsgrad: bool, state: dict) -> None:
        """A new parameter's state, with torch's names."""
        wide = (self.master_weights or self.stochastic_rounding) and p.dtype.itemsize < 4
        dtype = torch.float32 if wide else p.dtype
        state["step"] = torch.tensor(0.0)
        for name in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ())):
            state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        if self.master_weights and wide:
            state["master"] = p.detach().float()


def _torch_step(optimizer: AdamW, closure) -> Tensor | None:
    """torch's step, without the hooks of the optimizer, which run around ours already."""
    step = torch.optim.AdamW.step
    if hasattr(step, "hooked"):  # torch wraps it so when an optimizer of that class is made
        step = step.__wrapped__
    return step(optimizer, closure)
