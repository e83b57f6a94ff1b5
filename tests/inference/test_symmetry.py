"""Alignment: moves of hidden units are undone exactly, functions never change, and what is no symmetry is refused."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from bnn_models import MLP, likelihoods, priors
from inference.diagnosis import function_draws
from inference.diagnostics import rhat
from inference.distributions import DiagonalGaussian
from inference.errors import ApproximationWarning, CapabilityError
from inference.posterior import DrawsPosterior, GaussianPosterior
from inference.symmetry import align, hidden_units, match, symmetric_units
from inference.target import Target, compile_target
from tests.cases import normal, observe

X = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Chains:
    """Stands in for a sampler."""

    capabilities = frozenset({"chains"})


def network(*sizes: int, activation: str = "tanh", dtype: torch.dtype = torch.float64) -> Target:
    model = MLP(sizes, activation=activation, prior=priors.Normal(scale=1.0), likelihood=likelihoods.Normal(0.3))
    y = torch.zeros(9, sizes[-1], dtype=dtype) if sizes[-1] > 1 else torch.zeros(9, dtype=dtype)
    return compile_target(model, X.to(dtype), y)


def by_hand(body: Callable[[Tensor], Tensor]) -> Target:
    return compile_target(lambda x, y=None: observe(body(x), 0.3, y), X, torch.zeros(9))


def two_heads(x: Tensor, y: Tensor | None = None) -> None:
    w1, b1 = pyro.sample("w1", normal(3, 4)), pyro.sample("b1", normal(4))
    mean, spread = pyro.sample("mean", normal(4)), pyro.sample("spread", normal(4))
    hidden = torch.tanh(x @ w1 + b1)
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(hidden @ mean, torch.exp(hidden @ spread)), obs=y)


def draws(target: Target, num: int, seed: int = 1) -> Tensor:
    return torch.randn(num, target.dim, generator=torch.Generator().manual_seed(seed), dtype=target.dtype)


def shuffled(target: Target, theta: Tensor, seed: int = 2) -> Tensor:
    """The same functions with the units of every layer reordered, and flipped where they may be."""
    generator = torch.Generator().manual_seed(seed)
    for group in symmetric_units(target, theta):
        shape = (len(theta), group.size)
        signs = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0).to(theta)
        order = torch.rand(shape, generator=generator).argsort(1)
        theta = group.moved(theta, order, signs if group.flips else torch.ones_like(signs))
    return theta


def chains_of(target: Target, theta: Tensor, **options: Any) -> DrawsPosterior:
    return DrawsPosterior(target, theta, backend=Chains(), **options)


@pytest.mark.parametrize("sizes", [(3, 6, 1), (3, 50, 2), (3, 7, 5, 1), (3, 6, 6, 6, 2)])
@pytest.mark.parametrize("activation", ["tanh", "relu", "sin"])
def test_a_random_permutation_and_flip_of_a_network_is_undone_exactly(sizes: tuple[int, ...], activation: str) -> None:
    target = network(*sizes, activation=activation)
    one = draws(target, 1)
    moved = shuffled(target, one.expand(20, -1).contiguous())
    assert (moved - one).abs().amax(1).min() > 0.1
    posterior = chains_of(target, moved.unsqueeze(0))
    found = align(posterior, reference=one[0])
    torch.testing.assert_close(found.flat_draws, one.expand(20, -1), rtol=0, atol=0)
    before, after = function_draws(posterior, X), function_draws(found, X)
    np.testing.assert_allclose(before, function_draws(chains_of(target, one.unsqueeze(0)), X)[:, [0] * 20], atol=1e-6)
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_signs_are_flipped_for_odd_activations_only_and_layers_of_hand_written_models_are_found() -> None:
    assert [g.flips for g in symmetric_units(network(3, 4, 4, 1), draws(network(3, 4, 4, 1), 3))] == [True, True]
    for activation in ("relu", "sigmoid", "silu"):
        target = network(3, 4, 1, activation=activation)
        assert [g.flips for g in symmetric_units(target, draws(target, 3))] == [False]
    target = compile_target(two_heads, X, torch.zeros(9))
    (group,) = symmetric_units(target, draws(target, 3))
    assert group.incoming.shape == (4, 4)
    assert group.outgoing.shape == (4, 2)
    assert group.flips


def test_one_hidden_layer_is_matched_as_well_as_trying_everything() -> None:
    target = network(3, 4, 2)
    (group,) = symmetric_units(target, draws(target, 2))
    reference, theta = draws(target, 1, 3)[0], draws(target, 5, 4)
    found = (match(theta, reference, [group]) - reference).square().sum(1)
    distances = []
    for order in itertools.permutations(range(4)):
        for signs in itertools.product((-1.0, 1.0), repeat=4):
            moved = group.moved(theta, torch.tensor(order).expand(5, 4), torch.tensor(signs).expand(5, 4))
            distances.append((moved - reference).square().sum(1))
    torch.testing.assert_close(found, torch.stack(distances).min(0).values, rtol=1e-10, atol=1e-10)


def test_matching_several_layers_never_moves_a_draw_away_from_the_reference() -> None:
    target = network(3, 8, 8, 1)
    groups = symmetric_units(target, draws(target, 2))
    reference, theta = draws(target, 1, 3)[0], draws(target, 40, 4)
    found = match(theta, reference, groups)
    assert ((found - reference).norm(dim=1) < (theta - reference).norm(dim=1)).all()
    torch.testing.assert_close(match(found, reference, groups), found, rtol=0, atol=0)


def test_density_chains_weights_and_statistics_stay_and_the_posterior_is_left_alone() -> None:
    target = network(3, 5, 1)
    theta = draws(target, 12).reshape(2, 6, -1)
    stats = {"lp": torch.randn(2, 6)}
    posterior = chains_of(target, theta, sample_stats=stats, weights=torch.rand(2, 6))
    found = align(posterior)
    density = torch.func.vmap(target.log_density)
    torch.testing.assert_close(density(found.flat_draws), density(posterior.flat_draws), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(posterior.draws, theta, rtol=0, atol=0)
    torch.testing.assert_close(found.weights, posterior.weights)
    assert found.sample_stats is stats
    assert found.draws.shape == theta.shape


def test_chains_that_differ_by_a_symmetry_only_agree_after_alignment_and_the_diagnosis_says_so() -> None:
    target = network(3, 6, 1)
    noise = 0.1 * draws(target, 4 * 500).reshape(4, 500, -1)
    centre = 2 * draws(target, 4, 6)[:1]
    generator = torch.Generator().manual_seed(7)
    (group,) = symmetric_units(target, centre)
    chains = []
    for part in noise:  # one move per chain
        order = torch.randperm(6, generator=generator).expand(500, 6)
        signs = torch.where(torch.rand(6, generator=generator) < 0.5, -1.0, 1.0).double().expand(500, 6)
        chains.append(group.moved(centre + part, order, signs))
    posterior = chains_of(target, torch.stack(chains))
    plain = posterior.diagnose(X)
    assert np.median(plain.rhat_weights) > 2
    assert plain.trusted
    assert "`diagnose(align=True)`" in plain.notes[0]
    found = posterior.diagnose(X, align=True)
    np.testing.assert_array_equal(found.rhat_weights_aligned, rhat(align(posterior).draws.numpy()))
    assert found.rhat_weights_aligned.max() < 1.02
    assert not found.notes
    assert "R-hat, units aligned" in str(found)
    assert found.summary()["rhat_weights_aligned_above_1.1"] == 0.0


def test_a_residual_connection_is_refused_with_the_size_of_the_change() -> None:
    def body(x: Tensor) -> Tensor:
        w1, w2 = pyro.sample("w1", normal(3, 4)), pyro.sample("w2", normal(4, 4))
        first = x @ w1
        return (first + torch.tanh(first) @ w2) @ pyro.sample("w3", normal(4))

    target = by_hand(body)
    theta = draws(target, 10).unsqueeze(0)
    with pytest.warns(ApproximationWarning, match=r"the 4 units behind 'w\d' are left as they are: .* by \d\.\de"):
        found = align(chains_of(target, theta))
    torch.testing.assert_close(found.draws, theta, rtol=0, atol=0)
    assert found.info.warnings[0][0] == "ApproximationWarning"


def test_a_prior_that_tells_units_apart_is_reported() -> None:
    def body(x: Tensor) -> Tensor:
        scales = torch.linspace(0.5, 2.0, 4)
        w1 = pyro.sample("w1", dist.Normal(torch.zeros(3, 4), scales).to_event(2))
        return torch.tanh(x @ w1) @ pyro.sample("w2", normal(4))

    target = by_hand(body)
    with pytest.warns(ApproximationWarning, match="the prior tells hidden units apart: .* nats"):
        align(chains_of(target, draws(target, 30).unsqueeze(0)))


def test_models_without_hidden_units_and_layers_that_are_partly_fixed_are_left_alone() -> None:
    linear = by_hand(lambda x: x @ pyro.sample("w", normal(3)))
    theta = draws(linear, 4).unsqueeze(0)
    torch.testing.assert_close(align(chains_of(linear, theta)).draws, theta, rtol=0, atol=0)
    whole = network(3, 5, 1)
    last = whole.restrict("layers.1.*", draws(whole, 1)[0])
    assert hidden_units(last) == []
    theta = draws(last, 4).unsqueeze(0)
    torch.testing.assert_close(align(chains_of(last, theta)).draws, theta, rtol=0, atol=0)


def test_a_restricted_posterior_with_a_whole_hidden_layer_is_aligned_in_its_own_coordinates() -> None:
    whole = network(3, 6, 4, 1)
    at = draws(whole, 1)[0]
    small = whole.restrict(["layers.0.*", "layers.1.weight"], at)
    (group,) = hidden_units(small)
    assert group.name == "layers.0.weight"
    one = whole.reduce(at).unsqueeze(0)
    moved = small.reduce(group.moved(one, torch.randperm(6).unsqueeze(0), -torch.ones(1, 6)))
    found = align(chains_of(small, moved.unsqueeze(0)), reference=small.reduce(at))
    torch.testing.assert_close(found.flat_draws, small.reduce(one), rtol=0, atol=0)


def test_float32_draws_are_aligned_without_warnings() -> None:
    torch.set_default_dtype(torch.float32)
    target = network(3, 20, 10, 1, dtype=torch.float32)
    theta = draws(target, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = align(chains_of(target, shuffled(target, theta.expand(5, -1).contiguous()).unsqueeze(0)), theta[0])
    assert found.draws.dtype == torch.float32
    torch.testing.assert_close(found.flat_draws, theta.expand(5, -1), rtol=0, atol=0)


def test_posteriors_without_draws_and_references_of_another_model_are_refused() -> None:
    target = network(3, 4, 1)
    gaussian = GaussianPosterior(target, DiagonalGaussian(torch.zeros(target.dim), torch.ones(target.dim)), backend="G")
    with pytest.raises(CapabilityError, match="only draws of all weights can be aligned"):
        align(gaussian)
    with pytest.raises(ValueError, match=r"`reference` must have shape \(21,\), got \(5,\)"):
        align(chains_of(target, draws(target, 3).unsqueeze(0)), torch.zeros(5))
