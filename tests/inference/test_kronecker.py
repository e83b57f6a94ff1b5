"""Kronecker factors against brute force, the cases where they are exact, and the prior added in their eigenbasis."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from bnn_models import bayesianize, likelihoods
from inference.curvature import empirical_fisher, ggn, sampled_labels
from inference.jacobians import eta_and_jacobian
from inference.kronecker import Factors, kronecker_curvature, layer_block
from inference.target import Target, compile_target
from tests.cases import normal
from tests.networks import LABELS, NAMES, N, network
from tests.tolerances import z_limit

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def _random(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _linear_regression() -> tuple[Target, Tensor]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w, b = pyro.sample("w", normal(3, 2)), pyro.sample("b", normal(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + b, torch.tensor([0.5, 2.0])).to_event(1), obs=y)

    target = compile_target(model, _random(10, 3), _random(10, 2, seed=5))
    return target, _random(target.dim, seed=6)


def _dense(target: Target, factors: list[Factors]) -> Tensor:
    total = torch.zeros(target.dim, target.dim)
    for one in factors:
        order = one.positions.flatten()
        total[order[:, None], order] = one.dense()
    return total


def test_one_linear_layer_with_gaussian_noise_has_the_full_ggn() -> None:
    target, theta = _linear_regression()
    curvature = kronecker_curvature(target, theta)
    torch.testing.assert_close(_dense(target, curvature.layers), ggn(target, theta), **EXACT)


def test_one_datum_makes_every_block_of_a_single_output_network_exact() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w1, b1 = pyro.sample("w1", normal(3, 4)), pyro.sample("b1", normal(4))
        w2, b2 = pyro.sample("w2", normal(4, 5)), pyro.sample("b2", normal(5))
        w3 = pyro.sample("w3", normal(5))
        mean = torch.tanh(torch.tanh(x @ w1 + b1) @ w2 + b2) @ w3
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y)

    target = compile_target(model, _random(1, 3), _random(1))
    theta = _random(target.dim)
    exact = ggn(target, theta)
    for factors in kronecker_curvature(target, theta).layers:
        order = factors.positions.flatten()
        torch.testing.assert_close(factors.dense(), exact[order[:, None], order], **EXACT)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_convolution_over_one_pixel_is_a_linear_layer(sharing: str) -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()).double()
    linear = nn.Linear(3, 4).double()
    y = torch.arange(N) % 4
    found = []
    for net, x in ((conv, _random(N, 3, 1, 1)), (linear, _random(N, 3))):
        target = compile_target(bayesianize(net, likelihood=likelihoods.Categorical()), x, y)
        found.append(kronecker_curvature(target, _random(target.dim), sharing=sharing).layers[0].dense())
    torch.testing.assert_close(*found, **EXACT)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["lenet", "shared_weight", "encoder", "cross_attention"])
def test_factors_are_the_sums_they_stand_for(name: str, sharing: str) -> None:
    target, theta = network(name)
    curvature = kronecker_curvature(target, theta, sharing=sharing)
    from inference.taps import taps_for

    taps = taps_for(target, theta, target.x)
    done = taps.run(target, theta, target.x)
    roots = target.family().fisher_root(target.parameters(theta))
    every = done.all_gradients()
    for block, gradients, factors in zip(taps.blocks, every, curvature.layers, strict=True):
        columns = torch.einsum("neto,nec->ncto", gradients, roots)
        inputs = done.inputs(block)
        if block.kind == "embedding":
            expected = torch.nn.functional.one_hot(inputs, 7).sum((0, 1)).double()
        elif sharing == "expand":
            expected = torch.einsum("nti,ntj->ij", inputs, inputs)
        else:
            expected = torch.einsum("ni,nj->ij", inputs.mean(1), inputs.mean(1))
        torch.testing.assert_close(factors.inputs, expected, **EXACT)
        if sharing == "reduce" and block.kind != "embedding":
            columns = columns.sum(2, keepdim=True)
        torch.testing.assert_close(factors.outputs, torch.einsum("ncto,nctp->op", columns, columns), **EXACT)
        expanded = sharing == "expand" or block.kind == "embedding"
        assert factors.terms == (N * inputs.shape[1] if expanded else N)


def test_reduce_is_exact_where_a_shared_linear_layer_is_averaged() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        w, b = pyro.sample("w", normal(3, 2)), pyro.sample("b", normal(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x @ w + b).mean(1), 0.5).to_event(1), obs=y)

    target = compile_target(model, _random(6, 4, 3), _random(6, 2))
    theta = _random(target.dim)
    exact = ggn(target, theta)
    reduced, expanded = (
        _dense(target, kronecker_curvature(target, theta, sharing=sharing).layers) for sharing in ("reduce", "expand")
    )
    torch.testing.assert_close(reduced, exact, **EXACT)
    assert (expanded - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("name", NAMES)
def test_minibatches_add_up_to_the_full_data(name: str) -> None:
    target, theta = network(name)
    seen: list[int] = []
    whole = kronecker_curvature(target, theta)
    parts = kronecker_curvature(target, theta, chunk_bytes=1, advance=seen.append)
    assert seen == [1] * N
    for one, other in zip(whole.layers, parts.layers, strict=True):
        assert one.terms == other.terms
        torch.testing.assert_close(one.inputs, other.inputs, **EXACT)
        torch.testing.assert_close(one.outputs, other.outputs, **EXACT)
    for (_, one), (_, other) in zip(whole.sites, parts.sites, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_sites_outside_the_layers_have_their_exact_blocks() -> None:
    target, theta = network("resnet")
    exact = ggn(target, theta)
    curvature = kronecker_curvature(target, theta)
    assert [len(entries) for entries, _ in curvature.sites] == [3, 3, 3, 3]
    for entries, matrix in curvature.sites:
        torch.testing.assert_close(matrix, exact[entries[:, None], entries], **EXACT)


def test_large_sites_outside_the_layers_have_their_exact_diagonal() -> None:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        gains, w = pyro.sample("gains", normal(70)), pyro.sample("w", normal(70))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal((x * gains).tanh() @ w, 0.5), obs=y)

    target = compile_target(model, _random(5, 70), _random(5))
    theta = _random(target.dim)
    curvature = kronecker_curvature(target, theta)
    assert curvature.entries.tolist() == list(range(70))
    torch.testing.assert_close(curvature.diagonal, ggn(target, theta).diagonal()[:70], **EXACT)


def test_labels_give_the_empirical_fisher_of_one_layer_with_one_datum() -> None:
    target, theta = _linear_regression()
    x, y = target.x[:1], target.y[:1]
    found = kronecker_curvature(target, theta, x=x, y=y, labels=True)
    torch.testing.assert_close(_dense(target, found.layers), empirical_fisher(target, theta, x=x, y=y), **EXACT)


def test_labels_drawn_from_the_model_give_the_fisher_on_average() -> None:
    target, theta = network("by_hand")
    (exact, *_), draws = kronecker_curvature(target, theta).layers, 400
    found = torch.stack([
        kronecker_curvature(target, theta, y=sampled_labels(target, theta, seed), labels=True).layers[0].outputs
        for seed in range(draws)
    ])
    error = found.std(0) / draws**0.5
    assert ((found.mean(0) - exact.outputs) / error).abs().max() < z_limit(exact.outputs.numel())


def test_drawn_labels_leave_the_global_random_state_alone() -> None:
    target, theta = network("by_hand")
    before = torch.get_rng_state()
    labels = sampled_labels(target, theta, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(sampled_labels(target, theta, 3), labels)
    assert labels.shape == LABELS.shape


# -- the prior in the eigenbasis ----------------------------------------------------------------------


def _factors(out: int = 3, columns: int = 4, terms: int = 7) -> Factors:
    left, right = _random(out, out), _random(columns, columns, seed=9)
    return Factors("w", torch.arange(out * columns).reshape(out, columns), left @ left.mT, right @ right.mT, terms)


def _covariance(block: object) -> Tensor:
    from inference.kronecker_gaussian import KroneckerGaussian

    return KroneckerGaussian(torch.zeros(12), (block,)).covariance()  # type: ignore[arg-type]


PRIORS = {
    "isotropic": ([1.0, 1.0, 1.0], [2.5, 2.5, 2.5, 2.5]),
    "one for the bias": ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 0.1]),
    "rows times columns": ([1.0, 2.0, 5.0], [0.3, 1.0, 4.0, 2.0]),
    "flat": ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
}


def _prior(kind: str) -> Tensor:
    return torch.outer(*(torch.tensor(side) for side in PRIORS[kind]))


@pytest.mark.parametrize("kind", PRIORS)
def test_a_prior_precision_that_factors_is_added_exactly(kind: str) -> None:
    factors, prior = _factors(), _prior(kind)
    block, error = layer_block(factors, prior, 7)
    assert error == 0
    torch.testing.assert_close(_covariance(block), torch.linalg.inv(factors.dense() + prior.flatten().diag()), **EXACT)


def test_temperatures_scale_the_likelihood_and_the_whole() -> None:
    factors, prior = _factors(), _prior("one for the bias")
    block, _ = layer_block(factors, prior, 7, likelihood_temperature=4.0, temperature=3.0)
    expected = 3 * torch.linalg.inv(factors.dense() / 4 + prior.flatten().diag())
    torch.testing.assert_close(_covariance(block), expected, **EXACT)


def test_a_prior_precision_that_does_not_factor_is_replaced_by_the_nearest_and_the_error_is_known() -> None:
    factors, prior = _factors(), torch.ones(3, 4)
    prior[0, 0] = 2.0
    block, error = layer_block(factors, prior, 7)
    logs = prior.log()
    nearest = (logs.mean(1, keepdim=True) + logs.mean(0) - logs.mean()).exp()
    torch.testing.assert_close(
        _covariance(block), torch.linalg.inv(factors.dense() + nearest.flatten().diag()), **EXACT
    )
    assert error == pytest.approx(float((nearest.log() - logs).abs().max().expm1()))


def test_damping_adds_square_roots_to_both_factors() -> None:
    factors, num = _factors(terms=14), 7  # two places per datum
    prior = torch.full((3, 4), 2.5)
    block, _ = layer_block(factors, prior, num, damping=True)
    outputs, inputs = factors.outputs / factors.terms, factors.inputs / num
    root = 2.5**0.5
    precision = torch.kron(num**0.5 * outputs + root * torch.eye(3), num**0.5 * inputs + root * torch.eye(4))
    torch.testing.assert_close(_covariance(block), torch.linalg.inv(precision), **EXACT)


def test_neither_data_nor_prior_is_refused_with_the_site() -> None:
    factors = _factors()
    factors.inputs[:, 0] = factors.inputs[0] = 0.0
    with pytest.raises(ValueError, match=r"must be positive, got .* in site 'w': neither data nor prior"):
        layer_block(factors, torch.zeros(3, 4), 7)


def test_the_dense_form_is_the_eigen_formula() -> None:
    factors = _factors()
    out_values, out_vectors = torch.linalg.eigh(factors.outputs)
    in_values, in_vectors = torch.linalg.eigh(factors.inputs)
    basis = torch.kron(out_vectors, in_vectors)
    precision = torch.outer(out_values, in_values).flatten() / factors.terms + 2.5
    block, _ = layer_block(factors, torch.full((3, 4), 2.5), 7)
    torch.testing.assert_close(_covariance(block), (basis / precision) @ basis.mT, **EXACT)


def test_the_jacobian_of_one_layer_is_what_the_factors_are_made_of() -> None:
    target, theta = _linear_regression()
    _, jacobian = eta_and_jacobian(target, theta, target.x)
    fisher = target.family().fisher(target.parameters(theta))
    expected = torch.einsum("nep,nef,nfq->pq", jacobian, fisher, jacobian)
    torch.testing.assert_close(_dense(target, kronecker_curvature(target, theta).layers), expected, **EXACT)
