"""The offline part of transforms: what norms, rows and routers become."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ggml_ext.methods.fold import fold
from ggml_ext.methods.sites import Fold, Linear, Site, SiteTransform, identity

N_IN = 6


def site(n: int, fold_: Fold | None, **more: object) -> Site:
    linear = Linear("reader.weight", torch.zeros(3, n))
    return Site("reader", n, (linear,), fold_, **more)  # type: ignore[arg-type]


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def remaining(transform: SiteTransform) -> SiteTransform:
    """What is left of the transform once its offline part has been folded."""
    return replace(transform, diag=torch.ones_like(transform.diag), head=None)


def assert_close(a: Tensor, b: Tensor) -> None:
    """To what float32 loses of the largest value, since sums cancel."""
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=2e-6 * float(b.abs().max()))


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 20), seed=st.integers(0, 99))
def test_a_norm_takes_the_diagonal_and_the_router_its_inverse(n: int, seed: int) -> None:
    """The transformed input of the matrices is x T, the router's output does not change."""
    g = random(seed)
    transform = SiteTransform(torch.rand(n, generator=g, dtype=torch.float64) + 0.5)
    tensors = {"norm.weight": torch.randn(n, generator=g), "router.weight": torch.randn(4, n, generator=g)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    where = site(n, Fold("norm.weight", rows=False, n=n), also=("router.weight",))
    assert fold(where, transform, tensors) == {"norm.weight", "router.weight"}
    x = torch.randn(5, n, generator=g)
    assert_close(x * tensors["norm.weight"], transform.apply(x * before["norm.weight"]))
    after = (x * tensors["norm.weight"]) @ tensors["router.weight"].T
    assert_close(after, (x * before["norm.weight"]) @ before["router.weight"].T)


@settings(max_examples=20, deadline=None)
@given(
    n_kv=st.integers(1, 3),
    shared=st.integers(1, 3),
    head_dim=st.integers(1, 5),
    first=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_value_rows_take_the_diagonal_and_the_head(
    n_kv: int, shared: int, head_dim: int, first: int, seed: int
) -> None:
    """The attention's result is linear in v, so its heads can stand for the heads of v."""
    g = random(seed)
    n_head, n = n_kv * shared, n_kv * head_dim
    diag = torch.rand(n_kv, 1, head_dim, generator=g, dtype=torch.float64) + 0.5
    head = torch.randn(head_dim, head_dim, generator=g, dtype=torch.float64) + 3 * torch.eye(head_dim)
    left = torch.randn(n_head, n_head, generator=g, dtype=torch.float64)
    transform = SiteTransform(diag.expand(n_kv, shared, head_dim).reshape(-1), head=head, left=left)
    where = site(
        n_head * head_dim,
        Fold("qkv.weight", rows=True, first=first, n=n, bias="qkv.bias"),
        n_head=n_head,
        n_head_kv=n_kv,
        head_dim=head_dim,
    )
    tensors = {
        "qkv.weight": torch.randn(first + n, N_IN, generator=g),
        "qkv.bias": torch.randn(first + n, generator=g),
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    assert fold(where, transform, tensors) == {"qkv.weight", "qkv.bias"}

    x = torch.randn(5, N_IN, generator=g)

    def attention(found: dict[str, Tensor]) -> Tensor:
        v = (x @ found["qkv.weight"].T + found["qkv.bias"])[:, first:]
        return v.view(5, n_kv, 1, head_dim).expand(5, n_kv, shared, head_dim).reshape(5, -1)

    assert_close(remaining(transform).apply(attention(tensors)), transform.apply(attention(before)))
    torch.testing.assert_close(tensors["qkv.weight"][:first], before["qkv.weight"][:first], rtol=0, atol=0)


@pytest.mark.parametrize("experts", [0, 3])
def test_rows_of_up_take_the_diagonal(experts: int) -> None:
    g = random(1)
    shape = (experts, 8, N_IN) if experts else (8, N_IN)
    transform = SiteTransform(torch.rand(8, generator=g, dtype=torch.float64) + 0.5)
    where = site(8, Fold("up.weight", rows=True, n=8))
    tensors = {"up.weight": torch.randn(shape, generator=g)}
    before = tensors["up.weight"].clone()
    assert fold(where, transform, tensors) == {"up.weight"}
    x = torch.randn(5, N_IN, generator=g)
    assert_close(x @ tensors["up.weight"].transpose(-1, -2), transform.apply(x @ before.transpose(-1, -2)))


def test_the_rows_of_a_stack_take_the_diagonal_one_after_the_other() -> None:
    """Latent attention: head after head has a matrix of its own."""
    g = random(2)
    transform = SiteTransform(torch.rand(6, generator=g, dtype=torch.float64) + 0.5)
    tensors = {"v_b.weight": torch.randn(3, 2, N_IN, generator=g)}
    before = tensors["v_b.weight"].clone()
    assert fold(site(6, Fold("v_b.weight", rows=True, n=6)), transform, tensors) == {"v_b.weight"}
    x = torch.randn(5, 3, N_IN, generator=g)

    def heads(found: Tensor) -> Tensor:
        return torch.einsum("thi,hoi->tho", x, found).reshape(5, 6)

    assert_close(heads(tensors["v_b.weight"]), transform.apply(heads(before)))


def test_nothing_is_changed_where_nothing_is_folded() -> None:
    """Identity transforms must give the bits of a file without them."""
    assert fold(site(4, None), identity(4), {}) == set()


def test_impossible_folds_are_bugs() -> None:
    uneven = SiteTransform(torch.arange(1, 9, dtype=torch.float64))
    where = site(8, Fold("v.weight", rows=True, n=4), n_head=2, n_head_kv=1, head_dim=4)
    with pytest.raises(ValueError, match="differs between the query heads"):
        fold(where, uneven, {"v.weight": torch.ones(4, 2)})
    with pytest.raises(ValueError, match="nothing before the site"):
        fold(site(8, None), uneven, {})
