"""KVCache: the keys and values that an attention layer has seen."""

import torch
from torch import Tensor

from .. import ops

MANY = 16  # first tokens from which on attention's kernel is the faster one


class KVCache:
    """Keys and values of the tokens that one attention layer has seen, for generation.

    Memory is taken once.  `attend` appends new tokens and attends to all in one op.

    Args:
        batch: B, number of sequences.
        n_kv_head: H_kv, key and value heads.
        max_length: S, the most tokens of a sequence.
        head_dim: D.
        dtype: of keys and values; torch.int8 keeps a float32 scale for each token and head beside them.
        device: where they are.
        page_size: None keeps a sequence in one piece; else in pages of so many tokens, which
            `block_table` finds: sequences may share pages, and a pool serves all.

    Attributes:
        k, v: (B, H_kv, S, D), or with pages (B · ceil(S / page_size), H_kv, page_size, D).
        k_scale, v_scale: for int8, k's shape without D; else None.
        lengths: (B,) int32, tokens of each sequence.
        block_table: (B, ceil(S / page_size)) int32, or None.
    """

    def __init__(
        self,
        batch: int,
        n_kv_head: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        page_size: int | None = None,
    ) -> None:
        if page_size is not None and page_size < 1:
            raise ValueError(f"KVCache: page_size is {page_size}, expected at least 1, or None for no pages")
        if not dtype.is_floating_point and dtype != torch.int8:
            raise ValueError(f"KVCache: dtype is {dtype}, expected a floating-point dtype or torch.int8")
        rows, length = batch, max_length
        self.block_table = None
        if page_size is not None:
            pages = -(-max_length // page_size)
            rows, length = batch * pages, page_size
            self.block_table = torch.arange(rows, dtype=torch.int32, device=device).view(batch, pages)
        shape = rows, n_kv_head, length, head_dim
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.k_scale = self.v_scale = None
        if dtype == torch.int8:
            self.k_scale, self.v_scale = (torch.zeros(shape[:3], device=device) for _ in range(2))
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)

    def attend(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None, **options: object
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Append key and value, if given, and attend to the whole cache.

        Args:
            query: (B, H, T, D); cast to the dtype of the cache, if that is not int8.
            key, value: (B, H_kv, T, D), cast likewise.
            options: keyword arguments of `llmkern.ops.decode_attention`, as cos, sin, window, softcap.

        Returns:
            (B, H, T, D) in the dtype of `query`; with return_lse a pair, as `decode_attention` gives.

        Raises:
            ValueError: what does not fit, as `decode_attention`.
        """
        if key is not None and self._begins(query, key, options):
            return self._attend_first(query, key, value, **options)
        return self._attend(query, key, value, **options)

    def _attend(
        self, query: Tensor, key: Tensor | None, value: Tensor | None, **options: object
    ) -> Tensor | tuple[Tensor, Tensor]:
        out = ops.decode_attention(
            self._cast(query), self.k, self.v, self.lengths, self._cast(key), self._cast(value),
            block_table=self.block_table, k_scale=self.k_scale, v_scale=self.v_scale, **options,
        )  # fmt: skip
        if key is not None:
            self.lengths += key.shape[2]
        return (out[0].to(query.dtype), out[1]) if isinstance(out, tuple) else out.to(query.dtype)

    def _begins(self, query: Tensor, key: Tensor, options: dict) -> bool:
        """Whether these are the first tokens of all sequences, and many: then attention's kernel, which is
        made for many queries, is several times faster.

        On a GPU looking at the lengths would mean waiting for it; and while tracing, breaking the graph.
        """
        if key.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        many = MANY <= key.shape[2] <= self.k.shape[2] and query.shape[2] == key.shape[2]
        one_piece = self.block_table is None and self.k_scale is None
        known = options.keys() <= {"cos", "sin", "interleaved", "window"}
        return many and one_piece and known and not self.lengths.any()

    @torch.no_grad()  # as decode_attention
    def _attend_first(
        self, query: Tensor, key: Tensor, value: Tensor, *, window: tuple[int, int] | None = None,
        **rotation: object,
    ) -> Tensor:  # fmt: skip
        length, q = key.shape[2], self._cast(query)
        self.append(key, value, **rotation)
        if rotation.get("cos") is not None:
            q = ops.rope(q, None, **rotation)
        k, v = self.k[:, :, :length], self.v[:, :, :length]
        return ops.attention(q, k, v, is_causal=True, window=window).to(query.dtype)

    def append(self, key: Tensor, value: Tensor, **options: object) -> None:
        """Append key and value, (B, H_kv, T, D), without a query; options cos, sin and interleaved."""
        batch, _, length, dim = key.shape
        self._attend(key.new_empty(batch, 0, length, dim), key, value, **options)

    def reset(self) -> None:
        """Forget all tokens."""
        self.lengths.zero_()

    def rows(self, start: int, stop: int) -> "KVCache":
        """The sequences start, start + 1, ..., stop - 1, in the same memory."""
        part = object.__new__(KVCache)
        vars(part).update(vars(self))
        for name in ("lengths", *(self._memory() if self.block_table is None else ("block_table",))):
            setattr(part, name, getattr(self, name)[start:stop])
        return part

    def move_row(self, source: int, target: int) -> None:
        """Let sequence `target` be what sequence `source` is, which then is empty."""
        length = int(self.lengths[source])
        if self.block_table is None:
            for name in self._memory():
                getattr(self, name)[target, :, :length] = getattr(self, name)[source, :, :length]
        else:
            self.block_table[[source, target]] = self.block_table[[target, source]]
        self.lengths[target], self.lengths[source] = length, 0

    def truncate(self, length: int | Tensor) -> None:
        """Forget what comes after the first `length` tokens; a number, or one for each sequence, (B,)."""
        self.lengths.clamp_(max=length)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of keys, values and scales."""
        return sum(getattr(self, name).nbytes for name in self._memory())

    def _memory(self) -> list[str]:
        names = ("k", "v", "k_scale", "v_scale")
        return [name for name in names if getattr(self, name) is not None]

    def _cast(self, x: Tensor | None) -> Tensor | None:
        return x if x is None or self.k.dtype == torch.int8 else x.to(self.k.dtype)
