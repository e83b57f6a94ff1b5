"""Where inference starts for a model made of a network: at its weights once, and at fresh weights everywhere else."""

import copy
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from bnn_models import bayesianize, likelihoods, priors
from inference import HMC, MAP, SVGD, Backend, DeepEnsemble, MeanFieldVI, Subset
from inference.target import Target, compile_target

QUIET: dict[str, Any] = {"compile": False, "progress": False}
STILL: dict[str, Any] = {"num_steps": 1, "step_size": 1e-12, **QUIET}
X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tanh(X[:, 0]) - 0.5 * X[:, 1]


class Shifted(nn.Module):
    """A parameter of its own, which nothing says how to reset."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 1)
        self.shift = nn.Parameter(torch.tensor([7.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.shift


def a_net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))


def flat(net: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def target_of(net: nn.Module, **kwargs: Any) -> Target:
    return compile_target(bayesianize(net, **kwargs), X, Y)


def test_the_first_point_is_the_network_and_every_other_one_is_its_own() -> None:
    net = a_net()
    target = target_of(net)
    points = target.initial(5, seed=3)
    assert torch.equal(points[0], flat(net))
    assert len(torch.unique(points, dim=0)) == 5
    assert torch.equal(target.initial(1, seed=3)[0], flat(net))
    assert torch.equal(target.initial(2, seed=3), points[:2])
    other = target.initial(5, seed=4)
    assert torch.equal(other[0], points[0])
    assert not (other[1:] == points[1:]).all(-1).any()


def test_fresh_weights_are_those_pytorch_would_start_from() -> None:
    net = a_net()
    model = bayesianize(net)
    twin = copy.deepcopy(net)
    torch.manual_seed(11)
    for module in twin.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = model.fresh_sites(11)
    assert list(fresh) == [name for name, _ in twin.named_parameters()]
    assert all(torch.equal(fresh[name], value) for name, value in twin.named_parameters())
    assert torch.equal(fresh["1.weight"], torch.ones(8))
    points = target_of(net).initial(4)[1:]
    assert (points[:, :24].abs() <= 3**-0.5).all()
    assert (points[:, 32:40] == 1).all()  # gains of the normalisation


def test_modules_that_hide_their_reset_are_reset_from_the_inside_out() -> None:
    net = nn.MultiheadAttention(4, 2, dropout=0.0)
    fresh = bayesianize(nn.Sequential(net)).fresh_sites(2)
    assert not torch.equal(fresh["0.in_proj_weight"], net.in_proj_weight)
    assert (fresh["0.out_proj.bias"] == 0).all()  # a Linear alone would not start there


def test_parameters_that_nothing_resets_start_as_in_any_other_model() -> None:
    net = Shifted()
    model = bayesianize(net)
    assert set(model.fresh_sites(0)) == {"inner.weight", "inner.bias"}
    target = target_of(net)
    points = target.initial(4, seed=1)
    (shift,) = (s for s in target.sites if s.name == "shift")
    assert points[0, shift.start] == 7
    assert len(points[:, shift.start].unique()) == 4
    assert (points[1:, shift.start].abs() < 3).all()


def test_parameters_without_a_prior_keep_their_value_and_those_of_the_likelihood_start_at_random() -> None:
    net = a_net()
    prior = {"0.*": None, "*": priors.Normal()}
    target = target_of(net, prior=prior, likelihood=likelihoods.Normal(scale=dist.HalfNormal(1.0)))
    points = target.initial(3)
    names = [s.name for s in target.sites]
    assert not any(name.startswith("0.") for name in names)
    sites = target.unravel(points)
    assert set(bayesianize(net, prior).fresh_sites(0)) == set(names) & set(dict(net.named_parameters()))
    (noise,) = set(names) - set(dict(net.named_parameters()))
    assert len(sites[noise].unique()) == 3
    assert torch.equal(sites["3.weight"][0], net[3].weight)


def test_the_network_and_the_global_random_state_are_left_alone() -> None:
    net = a_net()
    before = copy.deepcopy(net.state_dict())
    target = target_of(net)
    state = torch.get_rng_state()
    target.initial(6, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(target.initial(1)[0], flat(net))


@pytest.mark.parametrize("backend", [DeepEnsemble(num_members=4, **STILL), SVGD(num_particles=4, **STILL)], ids=repr)
def test_members_and_particles_start_apart_and_the_first_at_the_network(backend: Backend) -> None:
    net = a_net()
    points = backend.fit(bayesianize(net), X, Y, seed=1).draws[0]
    torch.testing.assert_close(points[0], flat(net), rtol=0, atol=1e-9)
    distances = torch.cdist(points, points) + torch.eye(4)
    assert distances.min() > 0.1


@pytest.mark.parametrize(
    "backend",
    [
        DeepEnsemble(num_members=4, num_steps=200, batch_size=100, **QUIET),
        SVGD(num_particles=4, num_steps=200, **QUIET),
    ],
    ids=["ensemble", "particles"],
)
def test_trained_on_full_batches_they_stay_apart(backend: Backend) -> None:
    posterior = backend.fit(bayesianize(a_net()), X, Y)
    assert torch.pdist(posterior.draws[0]).min() > 0.1
    assert posterior.predict(X + 3).f_variance.mean() > 1e-3


def test_methods_of_one_point_start_at_the_network() -> None:
    net = a_net()
    mode = MAP(polish=False, **STILL).fit(bayesianize(net), X, Y, seed=4)
    torch.testing.assert_close(mode.draws[0, 0], flat(net), rtol=0, atol=1e-9)
    centre = MeanFieldVI(**STILL).fit(bayesianize(net), X, Y, seed=4).mean_theta
    torch.testing.assert_close(centre, flat(net), rtol=0, atol=1e-9)


def test_the_first_chain_starts_at_the_network_and_init_overrides_it_for_all() -> None:
    net = a_net()
    model = bayesianize(net)
    still = HMC(num_samples=4, warmup_steps=0, num_chains=3, step_size=1e-9, num_leapfrogs=1, **QUIET)
    chains = still.fit(model, X, Y, seed=1).draws[:, 0]
    torch.testing.assert_close(chains[0], flat(net), rtol=0, atol=1e-6)
    assert (chains[1:] - chains[0]).norm(dim=-1).min() > 0.1
    given = still.fit(model, X, Y, seed=1, init=model.initial_sites()).draws[:, 0]
    torch.testing.assert_close(given, flat(net).expand(3, -1), rtol=0, atol=1e-6)


def test_the_members_of_a_part_of_the_network_start_apart_too() -> None:
    net = a_net()
    backend = Subset(DeepEnsemble(num_members=3, **STILL), sites="3.*", rest=None)
    last = backend.fit(bayesianize(net), X, Y).draws[0]
    torch.testing.assert_close(last[0], flat(net)[-9:], rtol=0, atol=1e-9)
    assert len(torch.unique(last, dim=0)) == 3


def test_a_models_own_starting_values_without_fresh_ones_are_one_start_beside_random_ones() -> None:
    net = bayesianize(nn.Linear(3, 1))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        net(x, y)

    model.initial_sites = lambda: {"weight": torch.full((1, 3), 2.0)}  # type: ignore[attr-defined]
    points = compile_target(model, X, Y).initial(4)
    assert (points[0, :3] == 2).all()
    assert len(torch.unique(points[:, :3], dim=0)) == 4
    assert len(torch.unique(points[:, 3])) == 4
