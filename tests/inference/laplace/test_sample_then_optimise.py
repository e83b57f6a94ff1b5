"""Posterior draws by optimisation: the two objectives, their minimisers, covariances, and both solvers."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian

from inference import SampledLaplace
from inference.backend import Run
from inference.curvature import ggn
from inference.jacobians import eta_and_jacobian
from inference.laplace.sample_then_optimise import _PRIOR_NOISE, SampleThenOptimise, SolverOptions
from inference.laplace.solvers import averaged_descent, conjugate_gradients
from inference.linear_model import LinearModel
from tests.networks import network
from tests.tolerances import z_limit

EXACT = SolverOptions(num_steps=500, tolerance=1e-13, step_size=0.2, momentum=0.9, batch_size=None)


def sampler_of(name: str, num: int, options: SolverOptions = EXACT) -> SampleThenOptimise:
    target, theta = network(name)
    run = Run(SampledLaplace(progress=False), target, 0)
    model = LinearModel(target, theta, num)
    return SampleThenOptimise(model, num, options, run)


def precision_of(dim: int) -> Tensor:
    return torch.linspace(0.5, 3.0, dim)


class Quadratics:
    """The two objectives of one draw, written out with a dense Jacobian."""

    def __init__(self, seed: int = 0) -> None:
        target, theta = network("learnt_noise")
        self.jacobian = eta_and_jacobian(target, theta, target.x)[1]  # (N, E, P)
        self.weight = target.family().fisher(target.parameters(theta))  # (N, E, E), diagonal and positive
        self.precision = precision_of(target.dim)
        generator = torch.Generator().manual_seed(seed)
        root = self.weight.diagonal(dim1=-2, dim2=-1).rsqrt()
        self.noise = root * torch.randn(root.shape, generator=generator)
        self.prior = self.precision.rsqrt() * torch.randn(target.dim, generator=generator)
        pulled = torch.einsum("nep,nef,nf->p", self.jacobian, self.weight, self.noise)
        self.shifted = self.prior + pulled / self.precision

    def _fit(self, residual: Tensor) -> Tensor:
        return 0.5 * torch.einsum("ne,nef,nf->", residual, self.weight, residual)

    def noisy(self, z: Tensor) -> Tensor:
        prior = 0.5 * (self.precision * (z - self.prior).square()).sum()
        return self._fit(self.jacobian @ z - self.noise) + prior

    def quiet(self, z: Tensor) -> Tensor:
        return self._fit(self.jacobian @ z) + 0.5 * (self.precision * (z - self.shifted).square()).sum()

    def minimiser(self, objective) -> Tensor:
        zero = torch.zeros_like(self.precision)
        return -torch.linalg.solve(hessian(objective)(zero), grad(objective)(zero))

    def minibatch_gradients(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of both from one datum each, (N, P)."""
        num = len(self.jacobian)
        parts = []
        for residual, centre in ((self.jacobian @ z - self.noise, self.prior), (self.jacobian @ z, self.shifted)):
            pulled = torch.einsum("nep,nef,nf->np", self.jacobian, self.weight, residual)
            parts.append(num * pulled + self.precision * (z - centre))
        return parts[0], parts[1]


def test_both_objectives_have_the_same_minimiser():
    quadratics = Quadratics()
    noisy, quiet = (quadratics.minimiser(f) for f in (quadratics.noisy, quadratics.quiet))
    torch.testing.assert_close(noisy, quiet, rtol=1e-12, atol=1e-12)


def test_the_second_objective_has_quieter_minibatch_gradients():
    variances = torch.zeros(2)
    for seed in range(50):
        quadratics = Quadratics(seed)
        pair = quadratics.minibatch_gradients(quadratics.minimiser(quadratics.quiet))
        torch.testing.assert_close(pair[0].mean(0), pair[1].mean(0), rtol=1e-8, atol=1e-8)
        variances += torch.stack([g.var(0).sum() for g in pair])
    assert variances[1] < 0.7 * variances[0]


@pytest.mark.parametrize("name", ["by_hand", "learnt_noise", "resnet"])
def test_draws_solve_the_systems_of_the_second_objective(name):
    sampler = sampler_of(name, 3)
    target, theta = network(name)
    precision = precision_of(target.dim)
    z = sampler.draws(precision)
    noise = torch.randn(3, target.dim, generator=sampler.run.stream(_PRIOR_NOISE))
    rhs = precision.sqrt() * noise + sampler._noise
    expected = torch.linalg.solve(ggn(target, theta) + precision.diag(), rhs.T).T
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["by_hand", "learnt_noise"])
def test_draws_have_the_inverse_precision_as_their_covariance(name):
    num = 20_000
    sampler = sampler_of(name, num)
    target, theta = network(name)
    precision = precision_of(target.dim)
    z = sampler.draws(precision)
    covariance = torch.linalg.inv(ggn(target, theta) + precision.diag())
    variance = covariance.diagonal()
    error = ((variance[:, None] * variance + covariance.square()) / num).sqrt()
    assert ((z.T @ z / num - covariance) / error).abs().max() < z_limit(covariance.numel())
    assert (z.mean(0) / (variance / num).sqrt()).abs().max() < z_limit(len(variance))


def test_a_noise_factor_divides_the_curvature():
    sampler = sampler_of("by_hand", 20_000)
    target, theta = network("by_hand")
    z = sampler.draws(precision_of(target.dim), 4.0)
    variance = torch.linalg.inv(ggn(target, theta) / 4 + precision_of(target.dim).diag()).diagonal()
    ratio = z.square().mean(0) / variance
    assert (ratio - 1).abs().max() < z_limit(len(variance)) * (2 / len(z)) ** 0.5


def test_a_warm_start_ends_at_the_same_draws_in_fewer_steps():
    cold = sampler_of("by_hand", 3)
    precision = precision_of(cold.model.target.dim)
    near = cold.draws(1.01 * precision)
    before = cold.num_steps
    expected = cold.draws(precision)
    cold_steps = cold.num_steps - before
    warm = sampler_of("by_hand", 3, SolverOptions(500, 1e-4, 0.2, 0.9, None))
    loose = sampler_of("by_hand", 3, SolverOptions(500, 1e-4, 0.2, 0.9, None))
    found = warm.draws(precision, near=(near, 1.01 * precision))
    loose.draws(precision)
    assert warm.num_steps < loose.num_steps <= cold_steps
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_stochastic_descent_ends_near_the_solution_of_conjugate_gradients():
    exact = sampler_of("by_hand", 8)
    target, theta = network("by_hand")
    precision = precision_of(target.dim)
    expected = exact.draws(precision)
    found = sampler_of("by_hand", 8, SolverOptions(1500, 1e-3, 0.4, 0.9, 2)).draws(precision)
    matrix = ggn(target, theta) + precision.diag()
    error = ((found - expected) @ matrix * (found - expected)).sum(-1)
    assert (error / target.dim).max() < 0.02  # in posterior variances, per direction


def test_the_mode_of_the_linear_model_is_one():
    sampler = sampler_of("by_hand", 2)
    target, _ = network("by_hand")
    precision, center = precision_of(target.dim), sampler.model.center
    mean = sampler.mean(precision, torch.full_like(center, 0.3), 1.0, torch.zeros_like(center))
    gradient = sampler.model.score(mean.eta) - precision * (center + mean.offset - 0.3)
    assert gradient.abs().max() < 1e-8
    torch.testing.assert_close(mean.eta, sampler.model.eta + sampler.model.push(mean.offset[None])[0])


def test_conjugate_gradients_solve_systems_of_different_difficulty_together():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator)
    matrix = root @ root.T + torch.eye(6)
    rhs = torch.stack([torch.zeros(6), matrix[0], torch.randn(6, generator=generator)])
    found = conjugate_gradients(
        lambda v: v @ matrix, rhs, lambda v: v / matrix.diagonal(), max_steps=50, tolerance=1e-12
    )
    torch.testing.assert_close(found.z, torch.linalg.solve(matrix, rhs.T).T, rtol=1e-9, atol=1e-9)
    assert found.residual <= 1e-12
    assert found.num_steps <= 12


def test_conjugate_gradients_that_are_cut_short_say_so():
    matrix = torch.linspace(1.0, 1e4, 50).diag()
    rhs = torch.ones(1, 50)
    found = conjugate_gradients(lambda v: v @ matrix, rhs, lambda v: v, max_steps=3, tolerance=1e-10)
    assert found.num_steps == 3
    left = rhs - found.z @ matrix
    assert found.residual == pytest.approx(float(left.norm() / rhs.norm()))
    assert found.residual > 1e-3


def test_conjugate_gradients_with_the_inverse_as_preconditioner_need_one_step():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator)
    matrix = root @ root.T + torch.eye(6)
    rhs, start = torch.randn(2, 6, generator=generator), torch.randn(2, 6, generator=generator)
    inverse = torch.linalg.inv(matrix)
    for first in (None, start):
        found = conjugate_gradients(
            lambda v: v @ matrix, rhs, lambda v: v @ inverse, start=first, max_steps=9, tolerance=1e-10
        )
        assert found.num_steps == 1
        torch.testing.assert_close(found.z, torch.linalg.solve(matrix, rhs.T).T, rtol=1e-9, atol=1e-9)


def test_averaged_descent_solves_a_quadratic_whose_batches_differ():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 5, generator=generator)
    matrix = rows.T @ rows + torch.eye(5)

    def estimate(v: Tensor, chosen: Tensor) -> Tensor:
        part = rows[chosen]
        return v @ (part.T @ part) * (len(rows) / len(chosen)) + v

    rhs = torch.randn(2, 5, generator=generator)
    found = averaged_descent(
        estimate,
        lambda: torch.randperm(40, generator=generator)[:8],
        rhs,
        torch.zeros_like(rhs),
        matrix.diagonal(),
        num_steps=4000,
        step_size=0.1,
        momentum=0.9,
    )
    expected = torch.linalg.solve(matrix, rhs.T).T
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 0.02
