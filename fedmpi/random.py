"""The only source of randomness: counter-based functions of a key.

A key is a 64-bit integer made from ``(seed, round, client, stream)``. Every random tensor is an
elementwise integer function of its key and the element's index, so it is the same on CPU and GPU, on
any machine, at any number of ranks, and any part of it can be made without the rest. Golden vectors
in ``tests/test_random.py`` hold this.

The generator is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014): ``mix(key + (i + 1) * GOLDEN)``. No transcendental function is evaluated on a device, because
their last bits differ between libraries: normals come from a quantile table with integer
interpolation.

Shape suffixes: C clients (keys), N elements.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_LAST = (1 << 63) - 1  # no signed word sorts behind it

# Below this length a permutation sorts 64-bit words (uniform over all permutations up to the
# generator); from it on it is a keyed bijection, which needs no memory and no sort.
SORT_BELOW = 1 << 16
_ROUNDS = 6  # of the bijection: an odd multiplier, an offset and a xor-shift each


def _signed(x: int) -> int:
    """The int64 with the same bits as the unsigned 64-bit ``x``."""
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


def _mix(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def _shift(x: Tensor, n: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix_tensor(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


@lru_cache(maxsize=1)
def constants() -> Tensor:
    """The generator's three constants, int64, for compiled kernels that draw by themselves."""
    return torch.tensor([_signed(c) for c in (_GOLDEN, _MIX_1, _MIX_2)], dtype=torch.int64, device="cpu")


@lru_cache(maxsize=1024)
def _stream(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _base(seed: int, round: int, stream: str) -> int:
    return _mix(_mix(_mix(seed + _GOLDEN) + _stream(stream)) + round + _GOLDEN)


def key(seed: int, round: int = 0, client: int = 0, stream: str = "") -> int:
    """The key of one stream of one client in one round, as a signed 64-bit integer.

    Args:
      seed: the run's seed.
      round: the round (or epoch) it belongs to; 0 for what lives as long as the run.
      client: the client; -1 for what all clients share.
      stream: what it is for, e.g. ``"batches"``. Different names give independent streams.
    """
    return _signed(_mix(_base(seed, round, stream) + (client + 2) * _GOLDEN))


def keys(seed: int, round: int, clients_C: Tensor, stream: str) -> Tensor:
    """:func:`key` for many clients at once, int64 ``(C,)``."""
    return _mix_tensor((clients_C.long() + 2) * _signed(_GOLDEN) + _signed(_base(seed, round, stream)))


def bits(key: int | Tensor, n: int, start: int = 0, device: torch.device | None = None) -> Tensor:
    """``n`` words of 64 bits, int64 ``(n,)``; ``(C, n)`` for keys ``(C,)``. Word i is that of ``start + i``.

    Args:
      device: where they are drawn; default: where the keys lie.
    """
    if isinstance(key, Tensor):
        device = key.device if device is None else device
        key = key.to(device)[..., None]
    i_N = torch.arange(start + 1, start + n + 1, dtype=torch.int64, device=device)
    return _mix_tensor(i_N * _signed(_GOLDEN) + key)


def bits_at(key: int, index_N: Tensor) -> Tensor:
    """The words of :func:`bits` at these places (int64) only, int64 ``(N,)``."""
    return _mix_tensor((index_N + 1) * _signed(_GOLDEN) + key)


def uniform(key: int | Tensor, n: int, device: torch.device | None = None) -> Tensor:
    """``n`` float32 values in [0, 1) with 24 random bits each; ``(C, n)`` for keys ``(C,)``."""
    return _shift(bits(key, n, device=device), 40).float() * 2.0**-24


def integers(key: int | Tensor, n: int, high: int, device: torch.device | None = None) -> Tensor:
    """``n`` int64 values in [0, high), high ≤ 2^31; the bias of multiply-and-shift is below 2^-32 · high."""
    return _below(bits(key, n, device=device), high)


def integers_at(key: int, index_N: Tensor, high: int) -> Tensor:
    """The values of :func:`integers` at these places (int64) only."""
    return _below(bits_at(key, index_N), high)


def _below(words: Tensor, high: int) -> Tensor:
    if not 1 <= high <= 1 << 31:
        raise ValueError(f"high: expected 1 to 2^31, got {high}")
    return (_shift(words, 32) * high) >> 32


def coins(key: int | Tensor, n: int, device: torch.device | None = None) -> Tensor:
    """``n`` fair coins, bool; coin i is bit ``i % 64`` of word ``i // 64``."""
    words = bits(key, -(-n // 64), device=device)
    shifts = torch.arange(64, device=words.device)
    return ((words[..., None] >> shifts) & 1).flatten(-2)[..., :n].bool()


def coins_at(key: int, index_N: Tensor) -> Tensor:
    """The coins of :func:`coins` at these places (int64) only."""
    return ((bits_at(key, index_N >> 6) >> (index_N & 63)) & 1).bool()


def signs(key: int | Tensor, n: int, device: torch.device | None = None) -> Tensor:
    """``n`` Rademacher values (float32 ±1), from :func:`coins`."""
    return coins(key, n, device).float().mul_(2).sub_(1)


_TABLE_BITS = 8  # intervals an octave of the quantile table
_FIXED = 30  # fractional bits of its fixed-point entries


@lru_cache(maxsize=1)
def half_normal_table() -> Tensor:
    """Quantiles of |N(0,1)|: entry (e, j) belongs to the upper-tail mass 2^(e-32) · (1 + j/2^8)."""
    normal = NormalDist()
    mass = [2.0 ** (e - 32) * (1 + j / 2**_TABLE_BITS) for e in range(31) for j in range(2**_TABLE_BITS)]
    table = [round(-normal.inv_cdf(p) * 2**_FIXED) for p in mass]
    return torch.tensor([*table, 0], dtype=torch.int64, device="cpu")


@lru_cache(maxsize=8)
def _table_on(device: torch.device) -> Tensor:
    return half_normal_table().to(device)


def normal(key: int | Tensor, n: int, device: torch.device | None = None) -> Tensor:
    """``n`` standard normal float32 values; ``(C, n)`` for keys ``(C,)``.

    A word gives a sign and an upper-tail mass u = x · 2^-32 with x a 31-bit integer ≥ 1. The exponent and
    the top 8 mantissa bits of x (exact in a float64) choose the table's interval, the next 23 bits
    interpolate in integers. |values| ≤ 6.24; the quantile's error is below 10^-6 (tests/test_random.py).
    """
    words = bits(key, n, device=device)
    x = (_shift(words, 33)).clamp_(min=1)
    as_double = x.double().view(torch.int64)
    cell = (as_double >> (52 - _TABLE_BITS)) - (1023 << _TABLE_BITS)
    fraction = (as_double >> (52 - _TABLE_BITS - 23)) & ((1 << 23) - 1)
    table = _table_on(words.device)
    low, high = table[cell], table[cell + 1]
    value = low * (1 << 23) + (high - low) * fraction  # < 2^56: exact in integers
    magnitude = (value >> 12).double() * 2.0 ** -(_FIXED + 11)
    return torch.where((words & 1).bool(), magnitude, -magnitude).float()


def bijection(key: int, log2: int) -> Tensor:
    """A keyed bijection of [0, 2^log2) as int64: mask, shift, then a multiplier and an offset for each round of
    x ← (x · multiplier + offset) & mask; x ← x ^ (x >> shift)."""
    mask, shift = (1 << log2) - 1, (log2 + 1) // 2
    draws = [_mix(key + (i + 1) * _GOLDEN) & mask for i in range(2 * _ROUNDS)]
    return torch.tensor([mask, shift, *(draw | (i % 2 == 0) for i, draw in enumerate(draws))], device="cpu")


def _bijection(x: Tensor, key: int, log2: int) -> Tensor:
    mask, shift, *rounds = bijection(key, log2).tolist()
    for multiplier, offset in zip(rounds[::2], rounds[1::2], strict=True):
        x = (x * multiplier + offset) & mask
        x = x ^ (x >> shift)
    return x


def _inverse(x: Tensor, key: int, log2: int) -> Tensor:
    """The inverse of :func:`_bijection`: the shift takes at least half of the bits, and so undoes itself."""
    mask, shift, *rounds = bijection(key, log2).tolist()
    for multiplier, offset in zip(rounds[-2::-2], rounds[::-2], strict=True):
        x = x ^ (x >> shift)
        x = ((x - offset) * pow(multiplier, -1, mask + 1)) & mask
    return x


def permutation(key: int, n: int, device: torch.device | None = None) -> Tensor:
    """A permutation of ``range(n)``, int64 ``(n,)``."""
    return sample(key, n, n, device)


def ranks(key: int, n: int, values: Tensor) -> Tensor:
    """Where these values (int64) stand in :func:`permutation`: its inverse, there only."""
    if n < SORT_BELOW:
        return permutation(key, n, values.device).argsort()[values]
    log2 = (n - 1).bit_length()
    x = _inverse(values, key, log2)
    outside = x >= n
    while bool(outside.any()):  # the way that sample() walked, back
        x[outside] = _inverse(x[outside], key, log2)
        outside = x >= n
    return x


def permutations(keys_C: Tensor, sizes_C: Tensor) -> Tensor:
    """A :func:`permutation` of ``range(n)`` for each key, with each its own n, int64 ``(C, largest n)``; behind a
    shorter one come the numbers from n on."""
    largest = int(sizes_C.max())
    if largest < SORT_BELOW:
        words_CN = bits(keys_C, largest)
        places_N = torch.arange(largest, device=words_CN.device)
        words_CN.masked_fill_(places_N >= sizes_C.to(words_CN.device)[:, None], _LAST)
        return words_CN.argsort(stable=True)
    order_CN = torch.arange(largest, device=keys_C.device).repeat(len(keys_C), 1)
    for order_N, key, n in zip(order_CN, keys_C.tolist(), sizes_C.tolist(), strict=True):
        order_N[:n] = permutation(key, n, keys_C.device)
    return order_CN


def sample(key: int, n: int, k: int, device: torch.device | None = None, start: int = 0) -> Tensor:
    """``k`` different values of ``range(n)`` in random order: those from ``start`` on of :func:`permutation`.

    Takes O(k) time and memory for n ≥ 2^16.
    """
    if not 0 <= start <= start + k <= n:
        raise ValueError(f"k: expected 0 to n = {n}, got {k}" + (f" from {start} on" if start else ""))
    if n < SORT_BELOW:
        return bits(key, n, device=device).argsort(stable=True)[start : start + k]
    log2 = (n - 1).bit_length()
    x = _bijection(torch.arange(start, start + k, dtype=torch.int64, device=device), key, log2)
    outside = x >= n
    while bool(outside.any()):  # cycle walking: at most half of [0, 2^log2) lies outside
        x[outside] = _bijection(x[outside], key, log2)
        outside = x >= n
    return x
