"""Transforms of sites: exactness, budgets, the closed-form loss, and what the solvers promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import random_sites
from ggml_ext.core.errors import GgmlExtError
from ggml_ext.core.registry import TRANSFORMS
from ggml_ext.methods import transforms
from ggml_ext.methods.sites import ActivationSpec, Site, SiteStats, SiteTransform, identity
from ggml_ext.methods.transforms import TransformRequest, fake_quant_activation, flatquant, matrices
from ggml_ext.methods.transforms.awq import Objective
from ggml_ext.methods.transforms.clip import with_best_clip
from ggml_ext.methods.transforms.kronecker import Factors
from ggml_ext.methods.transforms.loss import Loss, weight_noise
from ggml_ext.methods.transforms.structure import largest, n_weights, split_budget, structures

A4 = ActivationSpec(bits=4, group=0)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def request(site: Site, name: str, **options: object) -> TransformRequest:
    types = {linear.tensor: "fq4" if site.n % 256 == 0 else "q4_0" for linear in site.linears}
    return TransformRequest(name, types, **{"steps": 6, **options})  # type: ignore[arg-type]


def stored_values(transform: SiteTransform) -> int:
    return sum(m.numel() for m in (transform.left, transform.right) if m is not None)


def assert_foldable(site: Site, transform: SiteTransform) -> None:
    """A diagonal where it can go, equal over the query heads that share a value head."""
    if site.fold is None:
        assert bool((transform.diag == 1).all())
        assert transform.head is None
    if site.head_dim:
        shared = transform.diag.view(site.n_head_kv, -1, site.head_dim)
        assert torch.equal(shared, shared[:, :1].expand_as(shared))
    else:
        assert transform.head is None


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("kind", random_sites.KINDS)
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_outputs_stay_the_same(name: str, kind: str, alpha: float | None) -> None:
    """A transform whose dual does not undo it, or that cannot be folded, would change the model."""
    site, stats = random_sites.make(kind, seed=3)
    transform = transforms.solve(site, stats, request(site, name, alpha=alpha, activation=A4))
    assert_foldable(site, transform)
    assert transform.online == TRANSFORMS[name].online
    x = stats.sample[:16].double()
    for linear in site.linears:
        w = linear.weight.double()
        want = x @ w.mT
        assert torch.allclose(transform.apply(x) @ transform.weight(w).mT, want, rtol=0, atol=1e-9)
        assert torch.allclose(transform.effective_weight(transform.weight(w)), w, rtol=0, atol=1e-9)
    assert torch.allclose(transform.invert(transform.apply(x)), x, rtol=0, atol=1e-9)
    for factor in (transform.left, transform.right, transform.head):
        if factor is not None:
            residual = factor @ torch.linalg.inv(factor) - torch.eye(len(factor), dtype=torch.float64)
            assert residual.abs().max() <= 1e-5
            assert torch.linalg.cond(factor) <= flatquant.MAX_CONDITION
    for factor in (transform.left, transform.right):
        assert factor is None or torch.equal(factor, factor.half().double())


@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 3), (5, 1)]),
    head_dim=st.sampled_from([8, 12]),
    n=st.integers(2, 50),
    name=st.sampled_from(list(TRANSFORMS)),
)
@settings(max_examples=25, deadline=None)
def test_any_shape_of_site(heads: tuple[int, int], head_dim: int, n: int, name: str) -> None:
    """Odd numbers of channels and heads must not break a solver, nor the function."""
    for site, stats in (random_sites.plain(n, seed=n), random_sites.attention(*heads, head_dim, seed=n)):
        wanted = TransformRequest(name, {m.tensor: "f16" for m in site.linears}, A4, steps=2)
        transform = transforms.solve(site, stats, wanted)
        x, w = stats.sample.double(), site.linears[0].weight.double()
        assert torch.allclose(transform.apply(x) @ transform.weight(w).T, x @ w.T, rtol=0, atol=1e-8)


def test_factors_learn_in_the_basis_that_the_file_has() -> None:
    """The solver's fast float32 arithmetic has to be SiteTransform's, or it would minimise something else."""
    for kind in random_sites.KINDS:
        site, stats = random_sites.make(kind, seed=1)
        for structure in structures(site):
            diag = torch.linspace(0.5, 2, site.n_head_kv * site.head_dim or site.n, dtype=torch.float64)
            diag = transforms.diagonal.expand(site, diag) if site.fold else torch.ones(site.n).double()
            start = flatquant.initial(site, diag, structure)
            factors = Factors(site, start)
            x = stats.sample[:5]
            w = site.linears[0].weight
            assert torch.allclose(factors.inputs(x), start.apply(x.double()).float(), atol=1e-4)
            assert torch.allclose(factors.weights(w), start.weight(w), atol=1e-4)
            kept = factors.transform()
            assert torch.allclose(
                kept.apply(x.double()) @ kept.weight(w.double()).mT, x.double() @ w.double().mT
            )


@pytest.mark.parametrize("rounding", ["gptq", "imatrix"])
@pytest.mark.parametrize("activation", [A4, ActivationSpec(8, 16), ActivationSpec(16, 0)])
def test_the_surrogate_has_the_gradient_of_the_loss(rounding: str, activation: ActivationSpec) -> None:
    """A wrong gradient still makes some progress; differences of the loss itself show it."""
    site, stats = random_sites.plain(24, seed=5)
    wanted = request(site, "flatquant", rounding=rounding, activation=activation)
    loss = Loss(site, stats, wanted)
    factors = Factors(site, flatquant.initial(site, torch.ones(24).double(), structures(site)[-1]))
    loss.surrogate(factors, 0.9).backward()
    for name, parameter in factors.parameters.items():
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
        slope = float((parameter.grad * direction).sum())
        values = []
        for step in (-2e-3, 2e-3):
            with torch.no_grad():
                parameter += step * direction
                values.append(loss.value(factors, 0.9))
                parameter -= step * direction
        assert (values[1] - values[0]) / 4e-3 == pytest.approx(slope, rel=0.1, abs=2e-4), name


def test_the_residuals_are_what_gptq_is_left_with() -> None:
    """D_j is the power of channel j that the later channels cannot express; another order would optimise for
    a GPTQ that runs backwards."""
    site, stats = random_sites.plain(12, seed=2)
    loss = Loss(site, stats, request(site, "flatquant"))
    h = stats.hessian.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(12)
    residual = loss._residual(stats.hessian)
    for j in range(12):
        rest = h[j + 1 :, j + 1 :]
        want = h[j, j] - h[j, j + 1 :] @ torch.linalg.solve(rest, h[j + 1 :, j]) if j < 11 else h[j, j]
        assert float(residual[j]) == pytest.approx(float(want), rel=1e-3)


def test_learning_beats_its_start_and_a_random_one() -> None:
    """The solved start is the point of the closed form: less loss than where it began, than Hadamard factors
    and than random rotations."""
    site, stats = random_sites.plain(256, seed=7)
    wanted = request(site, "flatquant", steps=40, activation=A4)
    solved = transforms.solve(site, stats, wanted)
    assert solved.notes["loss"] < 0.95 * solved.notes["loss_start"]
    loss = Loss(site, stats, wanted)
    rotations = (torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0] for _ in range(2))
    random = SiteTransform(torch.ones(256).double(), left=next(rotations), right=next(rotations))
    assert loss.value(Factors(site, solved), 0.85) < loss.value(Factors(site, random), 0.85)


def test_an_ill_conditioned_iterate_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors that amplify rounding a hundredfold must not reach a file, and the report has to say so."""
    site, stats = random_sites.plain(64, seed=1)
    monkeypatch.setattr(flatquant, "MAX_CONDITION", 1.005)
    transform = transforms.solve(site, stats, request(site, "flatquant", steps=20, activation=A4))
    assert transform.notes["rejected"] > 0
    assert flatquant.condition(transform) <= 1.005
    assert transform.notes["loss"] == transform.notes["loss_start"]


@given(
    budget=st.floats(0, 0.1) | st.none(),
    n=st.sampled_from([64, 96, 30, 256]),
    name=st.sampled_from(["hadamard", "flatquant"]),
)
@settings(max_examples=20, deadline=None)
def test_stored_factors_stay_within_the_budget(budget: float | None, n: int, name: str) -> None:
    """A file of 4.32 bits per weight has to have room for its factors."""
    for site, stats in (random_sites.plain(n, seed=1), random_sites.attention(4, 2, 16, seed=1)):
        wanted = TransformRequest(name, {m.tensor: "f16" for m in site.linears}, steps=1, budget_bits=budget)
        transform = transforms.solve(site, stats, wanted)
        if budget is not None:
            assert 16 * stored_values(transform) <= budget * n_weights(site)


@pytest.mark.parametrize("n", [64, 63])
@pytest.mark.parametrize("activation", [A4, ActivationSpec()])
def test_a_site_without_parameters_keeps_its_start(n: int, activation: ActivationSpec) -> None:
    """No fold and no budget: there is an implicit Hadamard matrix, of an odd n nothing, and no gradient."""
    site, stats = random_sites.plain(n, seed=3, foldable=False)
    wanted = TransformRequest(
        "flatquant", {m.tensor: "f16" for m in site.linears}, activation, budget_bits=0.0
    )
    transform = transforms.solve(site, stats, wanted)
    assert (transform.hadamard, stored_values(transform)) == (64 if n == 64 else 0, 0)
    assert transform.notes["loss"] == transform.notes["loss_start"]


def test_a_block_shares_its_budget() -> None:
    """The sites' shares must add up to the block's, use most of it, and each buy the structure it was made
    for."""
    sites = random_sites.block(hidden=256, ffn=768, heads=4, kv_heads=2)
    total = sum(n_weights(site) for site in sites.values())
    for budget in (0.0, 0.0075, 0.02, 1.0):
        split = split_budget(sites, budget)
        chosen = {kind: largest(site, split[kind]) for kind, site in sites.items()}
        used = 16 * sum(structure.values for structure in chosen.values())
        assert used <= budget * total
        if budget == 0.0075:
            assert used >= 0.5 * budget * total
        if budget == 1.0:
            assert chosen == {kind: structures(site)[-1] for kind, site in sites.items()}
    assert set(split_budget(sites, None).values()) == {None}


def test_the_same_seed_gives_the_same_bits() -> None:
    """A resumed calibration has to make the same file."""
    site, stats = random_sites.attention(4, 2, 16, seed=4)
    for name in TRANSFORMS:
        one, two = (transforms.solve(site, stats, request(site, name, activation=A4)) for _ in range(2))
        for part in ("diag", "head", "left", "right"):
            a, b = getattr(one, part), getattr(two, part)
            assert (a is None and b is None) or torch.equal(a, b)
        assert (one.clip, one.notes) == (two.clip, two.notes)


@pytest.mark.parametrize("kind", random_sites.KINDS)
@pytest.mark.parametrize("activation", [ActivationSpec(16, 0), ActivationSpec(8, 256)])
def test_awq_is_never_worse_than_nothing(kind: str, activation: ActivationSpec) -> None:
    """In its own objective, which the identity takes part in."""
    site, stats = random_sites.make(kind, seed=6)
    wanted = request(site, "awq", activation=activation)
    transform = transforms.solve(site, stats, wanted)
    objective = Objective(site, stats, wanted)
    assert objective(transform) <= objective(identity(site.n))
    assert transform.notes.get("error", 0) <= transform.notes.get("error_start", 0)


def test_awq_helps_channels_with_large_activations() -> None:
    """With outliers and a type without importances, enlarging their weights is worth something."""
    site, stats = random_sites.plain(256, seed=8, outliers=8)
    wanted = replace(request(site, "awq", activation=ActivationSpec(16, 0)), rounding="rtn")
    transform = transforms.solve(site, stats, wanted)
    assert transform.notes["error"] < 0.9 * transform.notes["error_start"]


def test_smoothquant_shares_the_range() -> None:
    """The definition: s = max|x|^a / max|w|^(1 - a), up to a factor."""
    site, stats = random_sites.plain(32, seed=9)
    transform = transforms.solve(site, stats, request(site, "smoothquant"))
    w = torch.cat([m.weight for m in site.linears]).abs().amax(0)
    want = (stats.absmax / w).sqrt().double()
    assert torch.allclose(transform.diag / want, (transform.diag / want)[0].expand(32))


def test_folded_learns_the_heads_and_leaves_nothing_online() -> None:
    """A matrix over v's channels that stays its start, or a site that got an online factor, would show."""
    site, stats = random_sites.attention(4, 2, 16, seed=3)
    transform = transforms.solve(site, stats, request(site, "folded", steps=40))
    assert transform.head is not None
    assert not transform.online
    assert transform.notes["loss"] < 0.98 * transform.notes["loss_start"]
    bare, stats = random_sites.make("unfoldable", seed=3)
    assert transforms.solve(bare, stats, request(bare, "folded")).is_identity


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 60, 76, 108, 148])
def test_paley_matrices_are_hadamard(order: int) -> None:
    matrix = matrices.paley(order)
    assert matrix is not None
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5))
    assert torch.allclose(matrix @ matrix.T, torch.eye(order, dtype=torch.float64))


@given(n=st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_every_order_has_an_orthogonal_matrix(n: int) -> None:
    """Where no Hadamard matrix is known the DCT has to step in, and a split must multiply to n."""
    matrix = matrices.spreading(n)
    assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), atol=1e-10)
    n1, n2 = matrices.hadamard_split(n)
    assert n1 * n2 == n
    assert n2 & (n2 - 1) == 0


def test_splits_of_common_widths() -> None:
    """12 x 256 rather than 3 x 1024: 3 has no Hadamard matrix."""
    widths = {768: (12, 64), 3072: (12, 256), 14336: (28, 512), 4096: (1, 4096), 8960: (140, 64)}
    assert {n: matrices.hadamard_split(n) for n in widths} == widths


def reference_rounding(x: np.ndarray, bits: int, group: int, clip: float) -> np.ndarray:
    """One token at a time, in numpy."""
    out = np.empty_like(x)
    q_max = 2 ** (bits - 1) - 1
    for i, token in enumerate(x):
        limit = np.float32(clip) * np.abs(token).max()
        cut = np.clip(token, -limit, limit)
        for start in range(0, len(token), group or len(token)):
            part = cut[start : start + (group or len(token))]
            scale = np.abs(part).max() / np.float32(q_max)
            codes = np.rint(part / scale) if scale > 0 else np.zeros_like(part)
            out[i, start : start + len(part)] = np.clip(codes, -q_max, q_max) * scale
    return out


@given(
    n=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([0, 16, 32]),
    clip=st.sampled_from([1.0, 0.85, 0.5]),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_activations_are_rounded_as_at_run_time(
    n: int, bits: int, group: int, clip: float, seed: int
) -> None:
    """Ragged last groups and all-zero tokens included."""
    x = torch.randn(4, n, generator=torch.Generator().manual_seed(seed))
    x[0] = 0
    got = fake_quant_activation(x, ActivationSpec(bits, group), clip)
    assert np.allclose(got.numpy(), reference_rounding(x.numpy(), bits, group, clip), rtol=1e-6, atol=1e-6)


def test_rounding_passes_gradients_through() -> None:
    """To the activations and, where something is cut off, to the clip."""
    x = torch.randn(3, 32, requires_grad=True)
    clip = torch.tensor(0.8, requires_grad=True)
    fake_quant_activation(x, A4, clip).square().sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert clip.grad is not None
    assert float(clip.grad) > 0


def test_the_best_clip_beats_none_at_4_bits() -> None:
    """On the sample's own error, by which it is chosen."""
    site, stats = random_sites.plain(256, seed=2)
    transform = with_best_clip(identity(256), site, stats, request(site, "none", activation=A4))
    assert transform.clip < 1
    assert transform.notes["activation_error"] < transform.notes["activation_error_unclipped"]
    same = transforms.solve(site, stats, request(site, "none", activation=A4, search_clip=False))
    assert same.clip == 1


def test_weight_noise_is_that_of_the_type() -> None:
    """More bits leave less noise; float types none."""
    noise = [weight_noise(name)[0] for name in ("f16", "q8_0", "q6_K", "q5_K", "q4_0")]
    assert noise[0] == 0
    assert noise == sorted(noise)
    assert weight_noise("fq4")[1] == 16


def test_requests_are_checked() -> None:
    """An unknown transform, a matrix without a type and broken statistics are named."""
    site, stats = random_sites.plain(32, seed=0)
    with pytest.raises(GgmlExtError, match="no transform spinquant"):
        transforms.solve(site, stats, request(site, "spinquant"))
    with pytest.raises(GgmlExtError, match=r"blk\.0\.ffn_gate\.weight: no type"):
        transforms.solve(site, stats, TransformRequest("flatquant", {}))
    bad: SiteStats = replace(stats, hessian=stats.hessian * float("nan"))
    with pytest.raises(GgmlExtError, match="NaN"):
        transforms.solve(site, bad, request(site, "flatquant"))
