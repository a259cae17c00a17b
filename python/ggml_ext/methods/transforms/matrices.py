"""Orthogonal matrices with entries of nearly equal size: Paley's Hadamard matrices, cosine transforms, and
the split of a channel count into an order for one of them times a power of two."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Larger left factors cost more storage and time than the DCT of a smaller order loses.
_LARGEST_HADAMARD = 256


def power_of_two(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n


def paley(order: int) -> Tensor | None:
    """A normalised Hadamard matrix [order, order], float64, or None where this finds none.

    Paley's constructions (R. E. A. C. Paley, "On orthogonal matrices", 1933) over prime fields: I for order
    = q + 1, q = 3 mod 4; II for order = 2 (q + 1), q = 1 mod 4; and their doublings H -> [[H, H], [H, -H]].
    """
    if order in (1, 2):
        base = torch.ones(order, order, dtype=torch.float64)
        base[-1, -1] = 1.0 if order == 1 else -1.0
        return base / math.sqrt(order)
    if order % 4:
        return None
    if _is_prime(order - 1):
        matrix = _conference(order - 1, skew=True) + torch.eye(order, dtype=torch.float64)
    elif _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        c = _conference(order // 2 - 1, skew=False)
        eye = torch.eye(order // 2, dtype=torch.float64)
        matrix = torch.cat([torch.cat([c + eye, c - eye], 1), torch.cat([c - eye, -c - eye], 1)])
    else:
        half = paley(order // 2)
        if half is None:
            return None
        matrix = torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])
        return matrix / math.sqrt(2)
    return matrix / math.sqrt(order)


def dct(order: int) -> Tensor:
    """The orthonormal DCT-II matrix [order, order], float64."""
    i = torch.arange(order, dtype=torch.float64)
    matrix = torch.cos(math.pi / order * (i[:, None] + 0.5) * i[None, :]) * math.sqrt(2 / order)
    matrix[:, 0] = 1 / math.sqrt(order)
    return matrix


def spreading(order: int) -> Tensor:
    """A Hadamard matrix of the order if there is one, else a DCT: [order, order] float64, orthogonal."""
    matrix = paley(order)
    return dct(order) if matrix is None else matrix


def hadamard_split(n: int) -> tuple[int, int]:
    """(n1, n2), n = n1 n2, n2 a power of two: n1 is 1, or the smallest order of a Hadamard matrix that
    fits, or the odd part of n."""
    odd = n // power_of_two(n)
    n1 = odd
    while n1 <= min(n, _LARGEST_HADAMARD) and n % n1 == 0:
        if paley(n1) is not None:
            return n1, n // n1
        n1 *= 2
    return odd, n // odd


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))


def _conference(q: int, *, skew: bool) -> Tensor:
    """Paley's conference matrix [q + 1, q + 1] of the quadratic residues modulo the prime q: zero diagonal,
    +-1 elsewhere; skew-symmetric for q = 3 mod 4, symmetric for q = 1 mod 4."""
    residues = {x * x % q for x in range(1, q)}
    chi = torch.tensor([0.0] + [1.0 if x in residues else -1.0 for x in range(1, q)], dtype=torch.float64)
    i = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[1:, 1:] = chi[(i[:, None] - i[None, :]) % q]
    matrix[0, 1:] = 1
    matrix[1:, 0] = -1 if skew else 1
    return matrix
