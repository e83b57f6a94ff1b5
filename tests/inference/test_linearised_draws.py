"""Draws of a linearised network: predictions by products against those by the Jacobian, and saving."""

import pytest
import torch

import inference
from inference import CapabilityError
from inference.jacobians import eta_and_jacobian
from inference.linearised_draws import LinearisedDrawsPosterior
from tests.networks import learnt_noise, network


def posterior_of(name, num=4, noise_factor=1.0):
    target, theta = network(name)
    z = 0.1 * torch.randn(num, target.dim, generator=torch.Generator().manual_seed(5))
    precision = torch.linspace(1.0, 2.0, target.dim)
    return LinearisedDrawsPosterior(
        target, theta, z, backend=None, prior_precision=precision, noise_factor=noise_factor, learnt=("w1",)
    )


@pytest.mark.parametrize("name", ["by_hand", "learnt_noise", "resnet"])
def test_predictions_are_those_of_the_linearised_network(name):
    posterior = posterior_of(name)
    target = posterior.target
    eta, jacobian = eta_and_jacobian(target, posterior.center, target.x)
    draws = eta + torch.einsum("nep,sp->sne", jacobian, posterior.flat_draws - posterior.center)
    expected = target.family().from_eta(draws, target.parameters(posterior.center))
    found = posterior.source(target.x).params(slice(0, target.num_data))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


def test_the_mean_function_is_the_networks_and_its_variance_that_of_the_draws():
    posterior = posterior_of("by_hand")
    target = posterior.target
    prediction = posterior.predict(target.x)
    eta, jacobian = eta_and_jacobian(target, posterior.center, target.x)
    moved = torch.einsum("nep,kp->kne", jacobian, posterior.deviations)
    torch.testing.assert_close(prediction.f_mean, eta)
    torch.testing.assert_close(prediction.f_variance, moved.square().mean(0))
    torch.testing.assert_close(posterior.mean_theta, posterior.center)


def test_a_prediction_at_more_inputs_than_a_chunk_is_that_at_each():
    posterior = posterior_of("by_hand")
    x = posterior.target.x.repeat(70, 1)
    torch.testing.assert_close(posterior.predict(x).mean, posterior.predict(posterior.target.x).mean.repeat(70, 1))


def test_fewer_components_are_the_first_pairs():
    posterior = posterior_of("by_hand")
    thetas, weights = posterior.components(4)
    assert torch.equal(thetas, posterior.draws[0, :4])
    assert weights.tolist() == [0.25] * 4
    mean = posterior.predict(posterior.target.x, num_samples=4).f_mean
    torch.testing.assert_close(mean, posterior.predict(posterior.target.x).f_mean)


def test_a_learnt_noise_factor_multiplies_the_noise_variance():
    plain, noisy = (
        posterior_of("learnt_noise").predict(network("learnt_noise")[0].x),
        posterior_of("learnt_noise", noise_factor=2.25).predict(network("learnt_noise")[0].x),
    )
    torch.testing.assert_close(noisy.aleatoric_variance, 2.25 * plain.aleatoric_variance)
    torch.testing.assert_close(noisy.f_variance, plain.f_variance)


def test_a_fit_that_starts_there_starts_at_the_linearisation_point():
    posterior = posterior_of("by_hand")
    assert torch.equal(posterior.target.initial(1, init=posterior)[0], posterior.center)
    assert len(torch.unique(posterior.target.initial(4, init=posterior), dim=0)) == 4


def test_prior_scales_have_the_shapes_of_the_sites_learnt():
    posterior = posterior_of("by_hand")
    scales = posterior.prior_scales()
    assert list(scales) == ["w1"]
    assert scales["w1"].shape == (4, 5)
    torch.testing.assert_close(scales["w1"].flatten(), posterior.prior_precision[:20].rsqrt())


def test_saving_keeps_precisions_and_predictions(tmp_path):
    posterior = posterior_of("learnt_noise", noise_factor=2.25)
    posterior.save(tmp_path)
    loaded = inference.load(tmp_path, learnt_noise)
    assert isinstance(loaded, LinearisedDrawsPosterior)
    assert torch.equal(loaded.prior_precision, posterior.prior_precision)
    assert (loaded.noise_factor, loaded.learnt) == (2.25, ("w1",))
    x = posterior.target.x
    assert torch.equal(loaded.predict(x).variance, posterior.predict(x).variance)


def test_arviz_is_given_what_is_predicted():
    posterior = posterior_of("learnt_noise", num=8)
    data = posterior.to_arviz()
    expected = posterior.predict(posterior.target.x).component_log_prob(posterior.target.y)
    found = torch.as_tensor(data.log_likelihood["y"].values[0])
    torch.testing.assert_close(found[: len(expected)], expected)


def test_what_draws_cannot_do_is_refused():
    posterior = posterior_of("by_hand")
    with pytest.raises(CapabilityError, match="link"):
        posterior.predict(posterior.target.x, link="probit")
    with pytest.raises(ValueError, match="deviations must have shape"):
        LinearisedDrawsPosterior(
            posterior.target, posterior.center, posterior.center, backend=None, prior_precision=posterior.center
        )
