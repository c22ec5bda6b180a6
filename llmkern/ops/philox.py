"""Random numbers that are a function of their place, so that dropout stores no mask.

Philox4x32 (Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3, sec. 4.3) with seven
rounds, the fewest that pass BigCrush (their table 2).  The number of place (row, col) is word
(col // 16) % 4 of the block with the counter (col // 64 * 16 + col % 16, row mod 2³², row // 2³², 0).
`csrc/philox.h` and `kernels/philox.py` make the same numbers.
"""

import torch
from torch import Tensor

from . import sharding

ROUNDS = 7


def new_seed(x: Tensor, seed: Tensor | None = None) -> Tensor:
    """`seed` on the device of x, or a new one from torch's generator there: int64, one element.

    For a DTensor it is that of the first process of the mesh, so that all drop the same.

    A tensor, not a number: it is drawn anew inside CUDA graphs and compiled code, and costs no
    synchronisation.
    """
    if seed is None:
        drawn = torch.randint(2**63 - 1, (), device=x.device)
        return sharding.same(drawn, x.device_mesh) if sharding.is_sharded(x) else drawn
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(
            f"dropout seed is {seed.dtype} of shape {tuple(seed.shape)}, expected one torch.int64"
        )
    return seed.to(x.device)


def factors(seed: Tensor, rows: Tensor, cols: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """1 / (1 - p) at the places (rows, cols) that dropout keeps, each with probability 1 - p, else 0.

    Args:
        seed: int64, one element.
        rows, cols: int64, of shapes that broadcast; cols < 2³⁴.
    """
    keep = words(seed, rows, cols) >= min(int(p * 2**32), 2**32 - 1)
    return keep.to(dtype) * (1 / (1 - p) if p < 1 else 0.0)


def words(seed: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The 32-bit numbers of places (rows, cols), as int64."""
    rows, cols = torch.broadcast_tensors(rows, cols)
    c = [_low(cols // 64 * 16 + cols % 16), _low(rows), _low(rows >> 32), torch.zeros_like(rows)]
    seed = seed.reshape(())
    keys = [_low(seed), _low(seed >> 32)]
    for _ in range(ROUNDS):
        (high_a, low_a), (high_b, low_b) = _multiply(0xD2511F53, c[0]), _multiply(0xCD9E8D57, c[2])
        c = [high_b ^ c[1] ^ keys[0], low_b, high_a ^ c[3] ^ keys[1], low_a]
        keys = [_low(keys[0] + 0x9E3779B9), _low(keys[1] + 0xBB67AE85)]
    return torch.stack(c).gather(0, (cols // 16 % 4)[None])[0]


def _low(x: Tensor) -> Tensor:
    return x & 0xFFFFFFFF


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low half of the 64-bit product of two 32-bit numbers, without leaving int64."""
    high = ((x >> 16) * factor + ((x & 0xFFFF) * factor >> 16)) >> 16
    return high, _low(x * factor)
