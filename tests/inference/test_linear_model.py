"""Products of a linearised network, against its Jacobian and its Gauss-Newton matrix held whole."""

import pytest
import torch

from bnn_models import MLP, likelihoods, priors
from inference.curvature import ggn
from inference.jacobians import eta_and_jacobian
from inference.linear_model import LinearModel, rows_together
from inference.target import compile_target
from tests.networks import HAND_WRITTEN, network
from tests.tolerances import z_limit

NETWORKS = ["by_hand", "learnt_noise", "resnet", "shared_weight"]


def vectors(num, dim):
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", NETWORKS)
def test_products_are_those_of_the_jacobian(name):
    target, theta = network(name)
    model = LinearModel(target, theta, 3)
    eta, jacobian = eta_and_jacobian(target, theta, target.x)
    v, u = vectors(3, target.dim), vectors(3, eta.numel()).reshape(3, *eta.shape)
    torch.testing.assert_close(model.eta, eta)
    torch.testing.assert_close(model.push(v), torch.einsum("nep,kp->kne", jacobian, v))
    torch.testing.assert_close(model.pull(u), torch.einsum("nep,kne->kp", jacobian, u))
    torch.testing.assert_close(model.gram(v), v @ ggn(target, theta))


@pytest.mark.parametrize("name", ["learnt_noise", "resnet"])
def test_the_size_of_chunks_does_not_matter(name):
    target, theta = network(name)
    small, whole = LinearModel(target, theta, 3, chunk_bytes=1), LinearModel(target, theta, 3)
    assert small.rows == 1
    assert whole.rows == target.num_data
    v = vectors(3, target.dim)
    torch.testing.assert_close(small.gram(v), whole.gram(v))
    torch.testing.assert_close(small.push(v), whole.push(v))
    torch.testing.assert_close(small.score(small.eta), whole.score(whole.eta))


def test_more_vectors_make_smaller_chunks():
    target, _ = network("resnet")
    size = 100_000
    assert 1 <= rows_together(target, 64, size) < rows_together(target, 1, size) <= target.num_data


def test_deep_networks_make_smaller_chunks():
    # Every layer's activations are held for every vector, not those of the largest layer alone.
    rows = {}
    for depth in (1, 8):
        model = MLP([4, *[64] * depth, 1], prior=priors.Normal(scale=1.0), likelihood=likelihoods.Normal(scale=0.2))
        rows[depth] = rows_together(compile_target(model, torch.randn(400, 4), torch.randn(400)), 16, 2_000_000)
    assert 1 < rows[8] < rows[1] / 4 < 100


def test_sizing_the_chunks_records_no_graph_of_all_data():
    whole, _ = network("by_hand")
    target = compile_target(HAND_WRITTEN["by_hand"], whole.x, whole.y, batch_size=2)
    assert rows_together(target, 3) == rows_together(whole, 3)
    assert target.recorded_rows == 2
    assert sum(key[0] == "joint" for key in target.programs.cache) == 1


def test_minibatches_of_the_curvature_average_to_it():
    target, theta = network("by_hand")
    model, v = LinearModel(target, theta, 2), vectors(2, target.dim)
    parts = [model.gram(v, rows=rows) for rows in torch.arange(target.num_data).split(2)]
    torch.testing.assert_close(torch.stack(parts).mean(0), model.gram(v))


def test_the_curvature_can_be_taken_at_other_values_of_eta():
    target, theta = network("by_hand")
    model, v = LinearModel(target, theta, 2), vectors(2, target.dim)
    moved = model.eta + 0.7
    moved[:, 0] += 1.0
    probs = moved.softmax(-1)
    fisher = torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)
    jacobian = eta_and_jacobian(target, theta, target.x)[1]
    expected = torch.einsum("nep,nef,nfq,kq->kp", jacobian, fisher, jacobian, v)
    torch.testing.assert_close(model.gram(v, model.params_at(moved)), expected)


def test_a_likelihood_temperature_divides_curvature_score_and_likelihood():
    target, theta = network("learnt_noise")
    cold, warm = LinearModel(target, theta, 2), LinearModel(target.tempered(1.0, 4.0), theta, 2)
    v = vectors(2, target.dim)
    torch.testing.assert_close(4 * warm.gram(v), cold.gram(v))
    torch.testing.assert_close(4 * warm.score(warm.eta), cold.score(cold.eta))
    assert 4 * warm.log_likelihood(warm.eta) == pytest.approx(cold.log_likelihood(cold.eta))


def test_the_score_is_the_gradient_of_the_likelihood_of_the_linearised_network():
    target, theta = network("learnt_noise")
    model = LinearModel(target, theta, 1)
    jacobian = eta_and_jacobian(target, theta, target.x)[1]
    offset = (0.1 * vectors(1, target.dim)[0]).requires_grad_()
    eta = model.eta + jacobian @ offset
    likelihood = model.family.distribution(model.params_at(eta)).log_prob(target.y).sum()
    (expected,) = torch.autograd.grad(likelihood, offset)
    torch.testing.assert_close(model.score(eta.detach()), expected)


@pytest.mark.parametrize("name", ["by_hand", "learnt_noise"])
def test_pulled_noise_has_the_curvature_as_its_covariance(name):
    target, theta = network(name)
    num = 20_000
    model = LinearModel(target, theta, num)
    noise = model.pull_noise(num, torch.Generator().manual_seed(0))
    curvature = ggn(target, theta)
    variance = curvature.diagonal().clamp_min(1e-12)
    error = ((variance[:, None] * variance + curvature.square()) / num).sqrt()
    assert ((noise.T @ noise / num - curvature) / error).abs().max() < z_limit(curvature.numel())
    assert (noise.mean(0) / (variance / num).sqrt()).abs().max() < z_limit(len(variance))
