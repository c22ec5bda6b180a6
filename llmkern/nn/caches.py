"""KVCaches: the caches of all layers of a model, in one memory."""

from collections.abc import Iterable

from .decode import KVCache


class KVCaches(list[KVCache]):
    """A `KVCache` for each layer, parts of one memory, so that one kernel can go through all of them.

    Args:
        layers: number of caches.
        batch, options: as in `KVCache`.

    Attributes:
        k, v: (L, B, H_kv, S, D), or with pages (L, pages, H_kv, page_size, D).
        k_scale, v_scale: for int8, k's shape without D; else None.
        lengths: (L, B) int32.
        memo: what who runs on these caches wants to remember; parts share it.
    """

    def __init__(self, layers: int, batch: int, *args: object, **options: object) -> None:
        shape = KVCache(0, *args, **options)  # no memory, but all options checked
        super().__init__(KVCache(batch if i == 0 else 0, *args, **options) for i in range(layers))
        first = self[0] if layers else shape
        self.memo: dict = {}
        for name in ("k", "v", "k_scale", "v_scale", "lengths"):
            one = getattr(first, name)
            memory = None if one is None else one.new_zeros((layers, *one.shape))
            setattr(self, name, memory)
            for i, cache in enumerate(self):
                setattr(cache, name, None if memory is None else memory[i])
        for cache in self:
            cache.block_table = first.block_table

    def rows(self, start: int, stop: int) -> "KVCaches":
        """The sequences start, start + 1, ..., stop - 1, in the same memory."""
        part = _of(cache.rows(start, stop) for cache in self)
        part.memo = self.memo
        pages = bool(self) and self[0].block_table is not None
        for name in ("k", "v", "k_scale", "v_scale"):
            memory = getattr(self, name)
            setattr(part, name, memory if memory is None or pages else memory[:, start:stop])
        part.lengths = self.lengths[:, start:stop]
        return part


def _of(caches: Iterable[KVCache]) -> KVCaches:
    part = KVCaches.__new__(KVCaches)
    list.__init__(part, caches)
    return part
