"""Arguments of attention, checked: one sentence for each that does not fit."""

import torch
from torch import Tensor

ALIGNMENTS = ("top_left", "bottom_right")


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("query", q), ("key", k), ("value", v)):
        if t.dim() != 4:
            raise ValueError(
                f"attention: {name} has shape {tuple(t.shape)}, expected 4 dimensions "
                "(batch, heads, length, head dim)"
            )
        if not t.is_floating_point() or t.dtype != q.dtype:
            raise ValueError(
                f"attention: {name} is {t.dtype}, expected query, key and value of one floating-point dtype "
                f"(query is {q.dtype})"
            )
        _on(name, t, q)
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"attention: value has shape {tuple(v.shape)}, expected {(*k.shape[:3], 'any')} as key"
        )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"attention: key has shape {tuple(k.shape)}, expected batch {q.shape[0]} and "
            f"head dim {q.shape[3]} as query"
        )
    for name, t in (("query", q), ("value", v)):
        if t.shape[3] == 0:
            raise ValueError(f"attention: {name} has head dim 0, expected at least 1")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: key has {k.shape[1]} heads, expected a number that divides the query's {q.shape[1]}"
        )


def check_mask(mask: Tensor, q: Tensor, s_k: int) -> None:
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise ValueError(
            f"attention: attn_mask is {mask.dtype}, expected torch.bool, {q.dtype} or torch.float32"
        )
    _on("attn_mask", mask, q)
    full = (*q.shape[:3], s_k)
    padded = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(padded) != 4 or any(m not in (1, f) for m, f in zip(padded, full)):
        raise ValueError(
            f"attention: attn_mask has shape {tuple(mask.shape)}, expected one that broadcasts to {full}"
        )


def check_numbers(
    causal_align: str, window: tuple[int, int] | None, softcap: float, dropout_p: float
) -> None:
    if causal_align not in ALIGNMENTS:
        raise ValueError(
            f"attention: causal_align is {causal_align!r}, expected 'top_left' or 'bottom_right'"
        )
    if window is not None and (len(window) != 2 or any(side < -1 for side in window)):
        raise ValueError(
            f"attention: window is {window}, expected (left, right), each -1 for no limit, or more"
        )
    if not softcap >= 0:
        raise ValueError(f"attention: softcap is {softcap}, expected a positive number, or 0 for none")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"attention: dropout_p is {dropout_p}, expected a number in [0, 1]")


def check_heads(name: str, t: Tensor, q: Tensor, *shapes: tuple[int, ...]) -> None:
    """A floating-point tensor with a number for each head."""
    if tuple(t.shape) not in shapes or not t.is_floating_point():
        expected = " or ".join(map(str, shapes))
        raise ValueError(
            f"attention: {name} is {t.dtype} of shape {tuple(t.shape)}, expected floating point of shape "
            f"{expected}"
        )
    _on(name, t, q)


def check_documents(ids: Tensor, q: Tensor, s_k: int) -> None:
    if ids.is_floating_point() or tuple(ids.shape) != (q.shape[0], q.shape[2]) or s_k != q.shape[2]:
        raise ValueError(
            f"attention: document_ids is {ids.dtype} of shape {tuple(ids.shape)} for {q.shape[2]} queries "
            f"and {s_k} keys, expected integers of shape {(q.shape[0], q.shape[2])} and as many keys as "
            "queries"
        )
    _on("document_ids", ids, q)


def check_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    for name, t in (("query", q), ("key", k), ("value", v)):
        if t.dim() != 3:
            raise ValueError(
                f"attention_varlen: {name} has shape {tuple(t.shape)}, expected 3 dimensions "
                "(tokens, heads, head dim)"
            )
    for name, t, tokens in (
        ("cu_seqlens_q", cu_seqlens_q, q.shape[0]),
        ("cu_seqlens_k", cu_seqlens_k, k.shape[0]),
    ):
        if t.dtype not in (torch.int32, torch.int64) or t.dim() != 1 or not t.numel():
            raise ValueError(
                f"attention_varlen: {name} is {t.dtype} of shape {tuple(t.shape)}, expected torch.int32 or "
                "torch.int64 of shape (sequences + 1,)"
            )
        if t.shape != cu_seqlens_q.shape:
            raise ValueError(
                f"attention_varlen: {name} has {t.numel()} elements, expected {cu_seqlens_q.numel()} "
                "as cu_seqlens_q"
            )
        if t.device != q.device:
            raise ValueError(f"attention_varlen: {name} is on {t.device}, expected {q.device} as query")
        if t.device.type == "cpu" and not _ascends(t, tokens):  # elsewhere a look would wait for the device
            raise ValueError(
                f"attention_varlen: {name} is {t.tolist()}, expected numbers from 0 to {tokens} that never "
                "decrease"
            )


def _ascends(t: Tensor, tokens: int) -> bool:
    return t[0] == 0 and bool((t.diff() >= 0).all()) and t[-1] <= tokens


def _on(name: str, t: Tensor, q: Tensor) -> None:
    if t.device != q.device:
        raise ValueError(f"attention: {name} is on {t.device}, expected {q.device} as query")
