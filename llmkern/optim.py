"""AdamW on llmkern's kernels."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import ops
from .ops.dispatch import fall_back
from .ops.optim_state import dequantize_state, quantize_state
from .ops.philox import new_seed
from .ops.sharding import is_sharded

SMALLEST_8BIT = 4096  # elements; a smaller parameter's states stay as they are, as Dettmers et al. do it
SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # states that have an 8-bit form


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
        states_8bit: the moments of parameters of at least 4096 elements take 8 bits each, as codes with a
            scale for each 256 of them (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization,
            arXiv:2110.02861): 2.03 bytes a parameter in place of 8.  In `state_dict` they are `exp_avg` and
            `exp_avg_sq` in uint8, `exp_avg_scale` and `exp_avg_sq_scale`; states are converted when they are
            loaded by an optimizer that keeps them in the other way.  Not with amsgrad.

    With any of the last three, moments that are not in 8 bits are float32, as `state_dict` shows.  Where a
    group has capturable or differentiable, a scaler left its found_inf, or a parameter is complex, not
    contiguous or has a sparse gradient, torch's own step runs and says so.

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
        states_8bit: bool = False,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"AdamW: max_norm is {max_norm}, expected a positive number or None")
        if master_weights and stochastic_rounding:
            raise ValueError("AdamW: master_weights and stochastic_rounding are both True, expected one")
        if states_8bit and amsgrad:
            raise ValueError("AdamW: states_8bit and amsgrad are both True, expected one")
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad,
            maximize=maximize, foreach=foreach, capturable=capturable, differentiable=differentiable,
            fused=fused,
        )  # fmt: skip
        self.max_norm = max_norm
        self.master_weights, self.stochastic_rounding = master_weights, stochastic_rounding
        self.states_8bit = states_8bit
        self.grad_norm: Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None) -> Tensor | None:
        """One step; `closure` evaluates the loss again and is called with gradients enabled."""
        if reason := self._why_torch():
            if self.max_norm is not None or self._own_states():
                raise ValueError(
                    f"AdamW: {reason}, expected none of this with max_norm, master_weights, "
                    "stochastic_rounding or states_8bit"
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
        """As torch, which casts states to the dtype of their parameter: here they stay what they are.

        Moments in 8 bits become numbers where this optimizer does not want them so, and the other way.
        """
        super().load_state_dict(state_dict)
        order = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(order, parameters):
            given = state_dict["state"].get(i, {})
            if self._own_states() or "exp_avg_scale" in given:
                self._adopt(p, {n: t for n, t in given.items() if n != "step" and isinstance(t, Tensor)})

    def _own_states(self) -> bool:
        return self.master_weights or self.stochastic_rounding or self.states_8bit

    def _adopt(self, p: Tensor, given: dict[str, Tensor]) -> None:
        """Take over loaded states in the form that this optimizer keeps."""
        given = {name: t.to(p.device, copy=True) for name, t in given.items()}
        for name, signed in SIGNED.items():
            if (scale := given.pop(f"{name}_scale", None)) is not None:
                given[name] = dequantize_state(given[name], scale, signed)
        given = {name: t.to(self._dtype(p)) for name, t in given.items()}
        if self._coded(p):
            _encode(given)
        self.state[p] = {"step": self.state[p]["step"], **given}

    def _dtype(self, p: Tensor) -> torch.dtype:
        """Of states that are numbers."""
        return torch.float32 if self._own_states() and p.dtype.itemsize < 4 else p.dtype

    def _coded(self, p: Tensor) -> bool:
        return self.states_8bit and p.numel() >= SMALLEST_8BIT

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
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self._start(p, group["amsgrad"], self.state[p])
        steps = [self.state[p]["step"] for p in params]
        torch._foreach_add_(steps, 1)
        together: dict[tuple, list[Tensor]] = {}  # what was skipped is behind the others
        for p, step in zip(params, steps):
            key = int(step), p.device, p.dtype, self.state[p]["exp_avg"].dtype
            together.setdefault(key, []).append(p)
        beta1, beta2 = group["betas"]
        for (step, _, dtype, _), params in together.items():
            states = [self.state[p] for p in params]
            kept = {name: [s[name] for s in states] for name in states[0] if name != "step"}
            random = self.stochastic_rounding and dtype == torch.bfloat16
            ops.adamw(
                [p.detach() for p in params],
                [p.grad for p in params],
                kept["exp_avg"],
                kept["exp_avg_sq"],
                step, float(group["lr"]), beta1, beta2, group["weight_decay"], group["eps"],
                max_exp_avg_sqs=kept.get("max_exp_avg_sq") if group["amsgrad"] else None,
                masters=kept.get("master"),
                exp_avg_scales=kept.get("exp_avg_scale"),
                exp_avg_sq_scales=kept.get("exp_avg_sq_scale"),
                grad_scale=scale,
                seed=new_seed(params[0]) if random else None,
                maximize=group["maximize"],
            )  # fmt: skip
            torch.autograd.graph.increment_version(params)

    def _start(self, p: Tensor, amsgrad: bool, state: dict) -> None:
        """A new parameter's state, with torch's names."""
        dtype = self._dtype(p)
        state["step"] = torch.tensor(0.0)
        for name in ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ())):
            state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
        if self._coded(p):
            if is_sharded(p):
                raise ValueError(
                    "AdamW: states_8bit is True and a parameter is a DTensor, expected a plain one"
                )
            _encode(state)
        if self.master_weights and p.dtype.itemsize < 4:
            state["master"] = p.detach().float()


def _encode(state: dict[str, Tensor]) -> None:
    """Moments to 8 bits."""
    for name, signed in SIGNED.items():
        state[name], state[f"{name}_scale"] = quantize_state(state[name], signed)


def _torch_step(optimizer: AdamW, closure) -> Tensor | None:
    """torch's step, without the hooks of the optimizer, which run around ours already."""
    step = torch.optim.AdamW.step
    if hasattr(step, "hooked"):  # torch wraps it so when an optimizer of that class is made
        step = step.__wrapped__
    return step(optimizer, closure)
