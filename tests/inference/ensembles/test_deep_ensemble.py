import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference.ensembles import DeepEnsemble
from inference.point import MAP
from tests.cases import tanh_network

NOISE = 0.5
network = tanh_network(3, 8, NOISE)


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def heteroscedastic(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2, 2), 2.0).to_event(2))
    f = x @ w
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(f[:, 0], f[:, 1].exp()), obs=y)


def data(num: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num, 3, generator=generator)
    return x, x @ torch.tensor([1.0, -2.0, 0.5]) + NOISE * torch.randn(num, generator=generator)


def test_members_of_a_convex_problem_all_coincide_with_the_map() -> None:
    x, y = data()
    ensemble = DeepEnsemble(num_members=4, num_steps=1000, step_size=0.05, batch_size=None).fit(linear, x, y)
    mode = MAP(num_steps=200).fit(linear, x, y).draws[0, 0]
    assert ensemble.draws.shape == (1, 4, 3)
    torch.testing.assert_close(ensemble.draws[0], mode.expand(4, 3), rtol=0, atol=1e-5)
    assert ensemble.predict(x).epistemic_variance.max() < 1e-8


def test_without_prior_a_convex_problem_ends_at_least_squares() -> None:
    x, y = data()
    ensemble = DeepEnsemble(num_members=2, num_steps=1000, step_size=0.05, batch_size=None, prior=False).fit(
        linear, x, y
    )
    expected = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    torch.testing.assert_close(ensemble.draws[0], expected.expand(2, 3), rtol=0, atol=1e-5)


def test_identical_members_have_no_epistemic_variance() -> None:
    x, y = data()
    init = torch.linspace(-1, 1, 32)
    posterior = DeepEnsemble(num_members=3, num_steps=20, batch_size=None).fit(network, x, y, init=init)
    torch.testing.assert_close(posterior.draws[0, 0], posterior.draws[0, 2], rtol=0, atol=1e-12)
    assert posterior.predict(x).epistemic_variance.max() < 1e-20


def test_members_differ_and_their_spread_obeys_the_law_of_total_variance() -> None:
    x, y = data()
    posterior = DeepEnsemble(num_members=4, num_steps=100, batch_size=10).fit(network, x, y)
    means = torch.stack([torch.tanh(x @ t[:24].reshape(3, 8)) @ t[24:] for t in posterior.draws[0]])
    prediction = posterior.predict(x)
    assert means.var(0, unbiased=False).min() > 0
    torch.testing.assert_close(prediction.epistemic_variance, means.var(0, unbiased=False), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(prediction.variance, means.var(0, unbiased=False) + NOISE**2, rtol=1e-8, atol=0)


def test_permuting_members_changes_no_prediction() -> None:
    x, y = data()
    posterior = DeepEnsemble(num_members=3, num_steps=30, batch_size=10).fit(network, x, y)
    before = posterior.predict(x)
    permuted = type(posterior)(posterior.target, posterior.draws[:, [2, 0, 1]], backend=posterior.backend)
    after = permuted.predict(x)
    torch.testing.assert_close(before.mean, after.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(before.log_prob(y), after.log_prob(y), rtol=1e-12, atol=1e-12)


def test_members_do_not_depend_on_how_many_there_are() -> None:
    x, y = data()
    two, three = (DeepEnsemble(num_members=m, num_steps=30, batch_size=10).fit(network, x, y).draws[0] for m in (2, 3))
    torch.testing.assert_close(two, three[:2], rtol=1e-9, atol=1e-11)


def test_members_stop_early_each_on_its_own_and_the_posterior_is_of_all_data() -> None:
    x, y = data()
    fields = {"num_steps": 600, "step_size": 0.02, "batch_size": 10, "schedule": "constant", "prior": False}
    stopping = {**fields, "validation_fraction": 0.2, "patience": 3}
    posterior = DeepEnsemble(num_members=3, **stopping).fit(network, x, y, seed=1)  # type: ignore[arg-type]
    alone = DeepEnsemble(num_members=1, **stopping).fit(network, x, y, seed=1)  # type: ignore[arg-type]
    steps = posterior.info.extra["steps"]
    assert len(set(steps)) > 1
    assert max(steps) < 600
    assert all(step % 4 == 0 for step in steps)  # 32 of 40 data are trained on: four steps an epoch
    assert alone.info.extra["steps"] == steps[:1]
    torch.testing.assert_close(alone.draws[0], posterior.draws[0, :1], rtol=1e-9, atol=1e-11)
    assert posterior.target.num_data == 40
    without = DeepEnsemble(num_members=3, **fields).fit(network, x, y, seed=1)  # type: ignore[arg-type]
    assert without.info.extra["steps"] == [600] * 3


def test_weight_decay_shrinks_the_weights() -> None:
    x, y = data()
    plain, shrunk = (
        DeepEnsemble(num_members=1, num_steps=600, prior=False, weight_decay=decay).fit(linear, x, y).draws[0, 0]
        for decay in (0.0, 0.5)
    )
    assert (shrunk.abs() < plain.abs()).all()


def test_heteroscedastic_likelihood_learns_where_the_noise_is() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.stack([torch.ones(600), torch.rand(600, generator=generator)], -1)
    y = torch.exp(-2 + 2 * x[:, 1]) * torch.randn(600, generator=generator)
    posterior = DeepEnsemble(num_members=2, num_steps=1000, step_size=0.1, batch_size=None).fit(heteroscedastic, x, y)
    log_scale = posterior.sample_sites(2)["w"][:, :, 1]  # (S, 2): intercept and slope; standard errors .06 and .1
    torch.testing.assert_close(log_scale, torch.tensor([-2.0, 2.0]).expand(2, 2), rtol=0, atol=0.3)


def test_adversarial_training_of_a_linear_model_shrinks_its_weights() -> None:
    x, y = data()
    fields = {"num_members": 1, "num_steps": 600, "batch_size": None, "prior": False}
    plain, robust = (
        DeepEnsemble(**fields, adversarial_epsilon=e).fit(linear, x, y).draws[0, 0]  # type: ignore[arg-type]
        for e in (None, 0.1)
    )
    assert (robust.abs() < plain.abs()).all()


def test_adversarial_loss_is_the_mean_of_clean_and_moved_losses() -> None:
    x, y = data()
    from inference.ensembles.deep_ensemble import _adversarial
    from inference.optimisation import energy_per_datum
    from inference.target import compile_target

    target = compile_target(network, x, y)
    theta = target.sample_prior(1)[0]
    loss = energy_per_datum(target)
    inputs = x.clone().requires_grad_()
    w0, w1 = theta[:24].reshape(3, 8), theta[24:]
    (y - torch.tanh(inputs @ w0) @ w1).square().sum().backward()
    assert inputs.grad is not None
    moved = x + 0.05 * (x.max(0).values - x.min(0).values) * inputs.grad.sign()
    expected = 0.5 * (loss(theta, x, y) + loss(theta, moved, y))
    torch.testing.assert_close(_adversarial(target, loss, 0.05)(theta, x, y), expected, rtol=1e-10, atol=0)
    assert loss(theta, moved, y) > loss(theta, x, y)


def test_adversarial_training_refuses_inputs_that_are_not_one_float_tensor() -> None:
    def from_dict(x: dict[str, Tensor], y: Tensor | None = None) -> None:
        linear(x["a"], y)

    x, y = data()
    with pytest.raises(TypeError, match="`adversarial_epsilon` needs one float tensor x"):
        DeepEnsemble(adversarial_epsilon=0.01).fit(from_dict, {"a": x}, y)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_members": 0}, "`num_members` must be an integer >= 1, got 0"),
        ({"adversarial_epsilon": -1.0}, "`adversarial_epsilon` must be > 0, got -1.0"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1, got 0"),
        ({"weight_decay": -0.1}, "`weight_decay` must be >= 0, got -0.1"),
        ({"weight_decay": float("inf")}, "`weight_decay` must be >= 0, got inf"),
        ({"weight_decay": 0.1, "optimiser": "sgd"}, '`weight_decay` is decoupled, for optimiser="adam"; with "sgd"'),
        ({"validation_fraction": 0.0}, "`validation_fraction` must be between 0 and 1, or None, got 0.0"),
        ({"validation_fraction": 1.0}, "`validation_fraction` must be between 0 and 1, or None, got 1.0"),
        ({"patience": 0}, "`patience` must be an integer >= 1, got 0"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepEnsemble(**fields)  # type: ignore[arg-type]
