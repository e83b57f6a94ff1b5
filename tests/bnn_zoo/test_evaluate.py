"""Scores against hand computations, in original units."""

import dataclasses
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm
from sklearn.metrics import accuracy_score, log_loss

from bnn_zoo.data import Dataset, load
from bnn_zoo.distance import add_distances, distance, noise_floor
from bnn_zoo.evaluate import LEVELS, evaluate, halves, mixture_quantiles
from bnn_zoo.models import ModelSpec
from inference import NUTS, DrawsPosterior, compile_target
from inference.scoring import crps_gaussian


def posterior_of(data: Dataset, num_chains: int = 1, num_draws: int = 6, scale: float = 0.3) -> DrawsPosterior:
    """Random weights, so that nothing depends on a fit; the sampler is only named."""
    target = compile_target(ModelSpec(hidden=(4,)).build(data), data.x_train, data.y_train)
    generator = torch.Generator().manual_seed(3)
    draws = scale * torch.randn(num_chains, num_draws, target.dim, generator=generator, dtype=target.dtype)
    return DrawsPosterior(target, draws, backend=NUTS())


def components(posterior: DrawsPosterior, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Means and sds of every draw at every input by a loop over draws through the network itself, (S, N)."""
    model = ModelSpec(hidden=(4,)).build_for(x.shape[1], 0)
    means, scales = [], []
    for theta in posterior.flat_draws:
        sites = posterior.target.unravel(theta)
        means.append(model.network(sites, x)[:, 0].numpy())
        (name,) = [n for n in sites if not n.startswith("layers")]
        scales.append(np.full(len(x), float(sites[name])))
    return np.array(means), np.array(scales)


@pytest.fixture
def energy() -> Dataset:
    return load("energy", dtype=torch.float64)


def test_regression_scores_equal_hand_computations_in_original_units(energy: Dataset) -> None:
    posterior = posterior_of(energy)
    found = evaluate(posterior, energy).scores
    means, scales = components(posterior, energy.x_test)
    means, scales = means * energy.y_std + energy.y_mean, scales * energy.y_std
    y = energy.targets_original()[1].numpy()
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((means.mean(0) - y) ** 2)), rel=1e-9)
    density = norm.pdf(y, means, scales).mean(0)
    assert found["nll"] == pytest.approx(-np.log(density).mean(), rel=1e-9)
    variance = (scales**2).mean(0) + means.var(0)
    assert found["nll_gaussian"] == pytest.approx(-norm.logpdf(y, means.mean(0), np.sqrt(variance)).mean(), rel=1e-9)
    assert found["epistemic_share"] == pytest.approx(means.var(0).mean() / variance.mean(), rel=1e-9)
    low, high = (
        np.array([
            brentq(lambda t, n=n, q=q: norm.cdf(t, means[:, n], scales[:, n]).mean() - q, -200, 200)
            for n in range(len(y))
        ])
        for q in (0.05, 0.95)
    )
    assert found["coverage_90"] == pytest.approx(np.mean((low <= y) & (y <= high)))
    assert found["width_90"] == pytest.approx((high - low).mean(), rel=1e-6)


def test_scores_scale_with_the_unit_of_the_target(energy: Dataset) -> None:
    doubled = dataclasses.replace(energy, y_std=2 * energy.y_std)
    once, twice = evaluate(posterior_of(energy), energy).scores, evaluate(posterior_of(energy), doubled).scores
    for name in ("rmse", "crps", "width_50", "width_90"):
        assert twice[name] == pytest.approx(2 * once[name], rel=1e-9)
    for name in ("nll", "nll_gaussian"):
        assert twice[name] == pytest.approx(once[name] + np.log(2), rel=1e-9)
    assert twice["coverage_90"] == once["coverage_90"]


def test_crps_of_one_gaussian_is_its_closed_form(energy: Dataset) -> None:
    posterior = posterior_of(energy, num_draws=1)
    means, scales = components(posterior, energy.x_test)
    exact = crps_gaussian(energy.y_test, means[0], scales[0]).mean() * energy.y_std
    assert evaluate(posterior, energy).scores["crps"] == pytest.approx(exact, rel=2e-3)


def test_quantiles_on_the_grid_equal_those_by_bisection(energy: Dataset) -> None:
    prediction = posterior_of(energy, num_draws=3, scale=1.0).predict(energy.x_test)
    levels = np.array([0.0025, 0.1, 0.5, 0.9, 0.9975])
    exact = torch.stack([prediction.quantile(float(q)) for q in levels]).numpy()
    error = np.abs(mixture_quantiles(prediction, levels) - exact) / prediction.stddev.numpy()
    assert error[1:-1].max() < 3e-3
    assert error.max() < 1e-2


def test_classification_scores_equal_scikit_learn() -> None:
    moons = load("moons", dtype=torch.float64)
    posterior = posterior_of(moons, num_draws=5, scale=1.0)
    found = evaluate(posterior, moons)
    model = ModelSpec(hidden=(4,)).build(moons)
    logits = torch.stack([model.network(posterior.target.unravel(t), moons.x_test) for t in posterior.flat_draws])
    probs = logits.softmax(-1).mean(0).numpy()
    labels = moons.y_test.numpy()
    assert found.scores["accuracy"] == accuracy_score(labels, probs.argmax(1))
    assert found.scores["nll"] == pytest.approx(log_loss(labels, probs), rel=1e-9)
    assert found.scores["brier"] == pytest.approx(2 * np.mean((probs[:, 1] - labels) ** 2), rel=1e-9)
    aleatoric = dist.Categorical(logits=logits).entropy().mean(0).numpy()
    total = -(probs * np.log(probs)).sum(1)
    assert found.scores["epistemic_share"] == pytest.approx((total - aleatoric).mean() / total.mean(), rel=1e-6)


def test_distance_of_a_shifted_prediction_is_the_shift() -> None:
    base = norm.ppf(LEVELS)[:, None] * np.ones(7)
    spread = np.ones(7)
    reference = {"quantiles": base, "stddev": spread, "epistemic_stddev": spread}
    shifted = {"quantiles": base + 0.25, "stddev": 0.5 * spread, "epistemic_stddev": 3 * spread}
    assert distance(shifted, reference) == pytest.approx({
        "wasserstein1": 0.25,
        "variance_ratio": 0.25,
        "epistemic_ratio": 9.0,
    })


def test_noise_floor_is_the_distance_between_the_halves_of_the_chains(energy: Dataset) -> None:
    posterior = posterior_of(energy, num_chains=4)
    first, second = halves(posterior)
    assert torch.equal(first.draws, posterior.draws[:2])
    assert torch.equal(second.draws, posterior.draws[2:])
    arrays = evaluate(posterior, energy).arrays
    apart = [evaluate(half, energy).arrays for half in (first, second)]
    assert noise_floor(arrays) == pytest.approx(distance(*apart))


def test_one_chain_has_no_noise_floor(energy: Dataset) -> None:
    assert noise_floor(evaluate(posterior_of(energy), energy).arrays) is None


def test_distances_go_to_finished_rows_but_not_to_the_reference() -> None:
    probs = np.array([[0.2, 0.8], [0.6, 0.4]])
    arrays: dict[str, Any] = {"map": {"probs": probs}, "nuts": {"probs": probs[:, ::-1]}}
    rows = [{"backend": "map"}, {"backend": "nuts"}, {"backend": "svgd"}]
    assert add_distances(rows, arrays, "nuts") is None
    assert rows[0]["distance"] == pytest.approx({"agreement": 0.0, "total_variation": 0.4})
    assert "distance" not in rows[1]
    assert "distance" not in rows[2]
