"""Targets restricted to single entries of theta: the same density, and every site whole again on the outside."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import inference
from inference import DenseLaplace, DrawsPosterior, MeanFieldVI, PyroMCMC, compile_target
from inference.errors import UnsupportedModelError
from inference.restriction import restrict_to_entries
from inference.target import Target
from tests.cases import normal

QUIET: dict[str, Any] = {"compile": False, "progress": False}
ENTRIES = torch.tensor([7, 0, 3, 4, 10, 12])
X = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X.sum(-1)


def model(x: Tensor, y: Tensor | None = None) -> None:
    w1, w2 = pyro.sample("w1", normal(3, 3)), pyro.sample("w2", normal(3))
    noise = pyro.sample("noise", dist.HalfNormal(1.0).expand([1]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(torch.tanh(x @ w1) @ w2, noise), obs=y)


def _target() -> tuple[Target, Target, Tensor]:
    full = compile_target(model, X, Y)
    at = torch.randn(full.dim, generator=torch.Generator().manual_seed(1))
    return full, restrict_to_entries(full, ENTRIES, at), at


def test_the_density_is_the_full_one_with_the_rest_fixed() -> None:
    full, part, at = _target()
    order = ENTRIES.sort().values
    assert part.dim == 6
    theta = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    expected = at.repeat(4, 1)
    expected[:, order] = theta
    assert torch.equal(part.expand(theta), expected)
    assert torch.equal(part.reduce(expected), theta)
    torch.testing.assert_close(vmap(part.log_density)(theta), vmap(full.log_density)(expected))
    gradient = grad(part.log_density)(theta[0])
    torch.testing.assert_close(gradient, grad(full.log_density)(expected[0])[order])
    value, found = part.log_density_and_grad(4, compile=False)(theta)
    torch.testing.assert_close(value, vmap(full.log_density)(expected))
    torch.testing.assert_close(found[0], gradient)


def test_sites_are_whole_on_the_outside_and_partly_held_inside() -> None:
    full, part, at = _target()
    assert [(s.name, s.shape, s.start, s.stop) for s in part.sites] == [
        ("w1", (4,), 0, 4),
        ("w2", (1,), 4, 5),
        ("noise", (1,), 5, 6),
    ]
    sites = part.unravel(part.reduce(at))
    assert {name: tuple(value.shape) for name, value in sites.items()} == {"w1": (3, 3), "w2": (3,), "noise": (1,)}
    torch.testing.assert_close(part.ravel(sites), part.reduce(at))
    torch.testing.assert_close(part.ravel({k: v.expand(5, *v.shape) for k, v in sites.items()})[3], part.reduce(at))
    assert restrict_to_entries(full, torch.arange(full.dim), at).sites == full.sites


def test_single_entries_of_whole_sites_are_the_restriction_by_name() -> None:
    full, _, at = _target()
    by_name, by_entry = full.restrict("w2", at), restrict_to_entries(full, torch.arange(9, 12), at)
    theta = torch.randn(3)
    torch.testing.assert_close(by_name.log_density(theta), by_entry.log_density(theta))
    assert by_name.kept == by_entry.kept
    assert by_name.sites == by_entry.sites


@pytest.mark.parametrize("backend", [DenseLaplace(start=None, **QUIET), MeanFieldVI(num_steps=5, **QUIET)])
@pytest.mark.filterwarnings("ignore::inference.errors.ApproximationWarning")
def test_a_posterior_over_entries_is_saved_loaded_and_reported_on(backend: Any, tmp_path: Any) -> None:
    _, part, at = _target()
    posterior = backend.fit_to(part, init=part.reduce(at))
    fixed = torch.tensor([i for i in range(13) if i not in ENTRIES])
    assert torch.equal(part.expand(posterior.sample(3))[:, fixed], at[fixed].expand(3, -1))
    assert posterior.sample_sites(2)["w1"].shape == (2, 3, 3)
    posterior.save(tmp_path)
    loaded = inference.load(tmp_path, model)
    assert torch.equal(loaded.sample(3), posterior.sample(3))
    assert torch.equal(loaded.predict(X, num_samples=4).mean, posterior.predict(X, num_samples=4).mean)
    assert posterior.to_arviz(num_samples=4).posterior["w1"].shape == (1, 4, 3, 3)
    assert posterior.diagnose().backend == type(backend).__name__


def test_a_posterior_of_the_whole_model_starts_one_of_its_entries() -> None:
    full, part, at = _target()
    held = DrawsPosterior(full, at[None, None], backend=None)
    assert torch.equal(part.initial(1, init=held)[0], part.reduce(at))


def simplex(x: Tensor, y: Tensor | None = None) -> None:
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ p, 1.0), obs=y)


def test_entries_that_cannot_be_kept_are_refused() -> None:
    full, part, at = _target()
    for bad in ([0, 0], [-1], [13], []):
        with pytest.raises(ValueError, match="`entries` must be distinct positions in a theta of length 13"):
            restrict_to_entries(full, torch.tensor(bad), at)
    with pytest.raises(ValueError, match=r"`at` must have shape \(13,\)"):
        restrict_to_entries(full, ENTRIES, at[:5])
    with pytest.raises(ValueError, match="restricted already"):
        restrict_to_entries(part, ENTRIES, at)
    with pytest.raises(ValueError, match=r"site 'p' has the support .* choose all of its 2 entries or none"):
        restrict_to_entries(compile_target(simplex, X, Y), torch.tensor([1]), torch.zeros(2))


def test_pyros_own_kernels_refuse_single_entries() -> None:
    _, part, _ = _target()
    with pytest.raises(UnsupportedModelError, match="move whole sites, not single entries"):
        PyroMCMC(num_samples=4, warmup_steps=0, **QUIET).fit_to(part)
