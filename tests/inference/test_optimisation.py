import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference.adam import Adam
from inference.backend import Batches, Run
from inference.errors import NonFiniteError
from inference.optimisation import Recipe, descend, energy_per_datum, polish, train
from inference.point import MAP
from inference.target import Target, compile_target
from tests.cases import tanh_network

PRIOR_SCALE, NOISE = 1.5, 0.5
network = tanh_network(3, 5)


def linear(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), PRIOR_SCALE).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, NOISE), obs=y)


def data(num: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num, 3, generator=generator)
    return x, x @ torch.tensor([1.0, -2.0, 0.5]) + NOISE * torch.randn(num, generator=generator)


def a_run(target: Target, seed: int = 0) -> Run:
    return Run(MAP(progress=False), target, seed)


def test_loss_is_the_energy_per_datum() -> None:
    target = compile_target(network, *data())
    theta = target.sample_prior(1)[0]
    loss = energy_per_datum(target)(theta, target.x, target.y)
    torch.testing.assert_close(loss * target.num_data, -target.log_density(theta), rtol=1e-12, atol=0)


def test_doubling_the_data_doubles_the_data_part_of_the_energy() -> None:
    x, y = data()
    once, twice = compile_target(network, x, y), compile_target(network, torch.cat([x, x]), torch.cat([y, y]))
    theta = once.sample_prior(1)[0]
    parts = [
        energy_per_datum(t)(theta, t.x, t.y) * t.num_data + t.log_prior(theta) for t in (once, twice)
    ]  # the data part alone
    torch.testing.assert_close(parts[1], 2 * parts[0], rtol=1e-12, atol=0)


def test_one_sgd_step_is_torch_sgd_with_weight_decay_one_over_variance_and_num_data() -> None:
    x, y = data()
    target = compile_target(linear, x, y)
    start = torch.tensor([[0.3, -0.2, 0.9]])
    recipe = Recipe(num_steps=1, step_size=0.01, optimiser="sgd", schedule="constant")
    ours = train(target, a_run(target), start, recipe).theta[0]

    weight = start[0].clone().requires_grad_()
    optimiser = torch.optim.SGD([weight], lr=0.01, momentum=0.9, weight_decay=1 / (PRIOR_SCALE**2 * len(x)))
    (-dist.Normal(x @ weight, NOISE).log_prob(y).mean()).backward()
    optimiser.step()
    torch.testing.assert_close(ours, weight.detach(), rtol=1e-12, atol=0)


def test_without_prior_the_loss_is_the_mean_negative_log_likelihood() -> None:
    x, y = data()
    target = compile_target(linear, x, y)
    theta = torch.tensor([0.3, -0.2, 0.9])
    expected = -dist.Normal(x @ theta, NOISE).log_prob(y).mean()
    torch.testing.assert_close(energy_per_datum(target, prior=False)(theta, x, y), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch_size", [None, 10])
@pytest.mark.parametrize("optimiser", ["adam", "sgd", "adagrad"])
def test_stacked_members_and_a_loop_over_members_end_at_the_same_theta(batch_size: int | None, optimiser: str) -> None:
    target = compile_target(network, *data())
    start = target.initial(3, seed=0)
    recipe = Recipe(num_steps=30, step_size=1e-3, batch_size=batch_size, optimiser=optimiser)  # type: ignore[arg-type]
    ends = [train(target, a_run(target), start, recipe, together=together).theta for together in (True, False)]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-11)
    assert (ends[0] - start).abs().max() > 1e-3


def test_a_member_does_not_depend_on_how_many_train_beside_it() -> None:
    target = compile_target(network, *data())
    recipe = Recipe(num_steps=30, step_size=1e-3, batch_size=10)
    two, four = (train(target, a_run(target), target.initial(m, seed=0), recipe).theta for m in (2, 4))
    torch.testing.assert_close(two, four[:2], rtol=1e-9, atol=1e-11)
    assert (four[0] - four[1]).abs().max() > 1e-2


def test_the_callback_sees_every_step_and_the_theta_after_it() -> None:
    target = compile_target(linear, *data())
    seen: list[tuple[int, Tensor]] = []
    recipe = Recipe(num_steps=5, step_size=0.1)
    end = train(
        target,
        a_run(target),
        torch.zeros(2, 3),
        recipe,
        callback=lambda step, members, theta: seen.append((step, theta.clone())),
    )
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5]
    torch.testing.assert_close(seen[-1][1], end.theta, rtol=0, atol=0)


def test_gradients_are_counted_in_passes_over_the_data() -> None:
    target = compile_target(linear, *data(40))
    run = a_run(target)
    train(target, run, torch.zeros(3, 3), Recipe(num_steps=8, step_size=0.1, batch_size=10))
    assert run.info.gradients == pytest.approx(3 * 8 * 10 / 40)


def test_a_diverging_loss_stops_with_its_step() -> None:
    target = compile_target(linear, *data())
    recipe = Recipe(num_steps=5000, step_size=1e3, optimiser="sgd", schedule="constant")
    with pytest.raises(NonFiniteError, match=r"step \d\d: the loss of member 0 is inf.*smaller `step_size`"):
        train(target, a_run(target), torch.ones(1, 3), recipe)


def test_the_error_names_the_site_whose_gradient_is_not_finite_first() -> None:
    def root(x: Tensor, y: Tensor | None = None) -> None:
        pyro.sample("fine", dist.Normal(0.0, 1.0))
        w = pyro.sample("broken", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x * w.abs().sqrt(), 1.0), obs=y)  # infinite slope at 0

    target = compile_target(root, torch.ones(4), torch.ones(4))
    with pytest.raises(NonFiniteError, match=r"step 2: .* the gradient of site 'broken' is not finite"):
        train(target, a_run(target), torch.zeros(1, 2), Recipe(num_steps=5, step_size=0.1))


def test_the_error_names_the_member_whose_loss_is_not_finite() -> None:
    target = compile_target(linear, *data())
    start = torch.stack([torch.ones(3), torch.full((3,), 1e200)])
    with pytest.raises(NonFiniteError, match=r"step 1: the loss of member 1 is inf"):
        train(target, a_run(target), start, Recipe(num_steps=2, step_size=0.1))


def test_cosine_schedule_ends_at_zero_and_a_function_is_a_factor() -> None:
    for schedule, expected in (("cosine", 0.0), (lambda step: 0.5, 0.05), ("constant", 0.1)):
        recipe = Recipe(num_steps=7, step_size=0.1, schedule=schedule)  # type: ignore[arg-type]
        assert recipe.rate(7) == pytest.approx(expected, abs=1e-12)


def test_the_cosine_schedule_is_torchs() -> None:
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 7)
    recipe = Recipe(num_steps=7, step_size=0.1)
    for step in range(7):
        assert recipe.rate(step) == pytest.approx(optimiser.param_groups[0]["lr"], abs=1e-12)
        optimiser.step()
        schedule.step()


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_adam_takes_the_steps_of_torchs(kind: torch.dtype, decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(3, 4, generator=generator, dtype=kind)
    twin = theta.clone().requires_grad_()
    ours = Adam(theta, decay)
    theirs = (
        torch.optim.AdamW([twin], weight_decay=decay, fused=True) if decay else torch.optim.Adam([twin], fused=True)
    )
    for step in range(10):
        gradient = torch.randn(4, 3, generator=generator, dtype=kind).t()
        theirs.param_groups[0]["lr"] = 0.1 / (1 + step)
        twin.grad = gradient.contiguous()
        theirs.step()
        ours.step(gradient, 0.1 / (1 + step))
    assert torch.equal(theta, twin.detach())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
def test_a_step_of_stacked_members_is_each_members_own_step(kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # To the bit where rows fill the processor's vectors; what is left over of one is rounded once more or less.
    for size, ulps in ((1_024, 0), (1_027, 8)):
        theta = torch.randn(5, size, generator=generator, dtype=kind)
        rows = [row.clone() for row in theta]
        together, alone = Adam(theta), [Adam(row) for row in rows]
        for _ in range(10):
            gradient = torch.randn(5, size, generator=generator, dtype=kind)
            together.step(gradient, 0.1)
            for adam, own in zip(alone, gradient, strict=True):
                adam.step(own, 0.1)
        tolerance = ulps * torch.finfo(kind).eps
        torch.testing.assert_close(theta, torch.stack(rows), rtol=tolerance, atol=tolerance)


def test_polishing_reaches_a_stationary_point_and_never_climbs() -> None:
    target = compile_target(network, *data())
    loss = energy_per_datum(target)
    start = target.initial(1, seed=3)[0]
    end = polish(target, a_run(target), start, max_steps=500)
    assert loss(end, target.x, target.y) < loss(start, target.x, target.y)
    gradient = torch.func.grad(loss)(end, target.x, target.y)
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("optimiser", ["adam", "sgd", "adagrad"])
def test_gradients_in_another_memory_order_train_the_same(optimiser: str) -> None:
    target = compile_target(linear, *data())
    recipe = Recipe(num_steps=3, step_size=0.1, optimiser=optimiser)  # type: ignore[arg-type]
    run, start = a_run(target), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    batches = Batches(target, None, [run.stream(m) for m in range(4)])
    ends = []
    for order in (lambda g: g.contiguous(), lambda g: g.t().contiguous().t()):
        with run.bar(3, "test") as bar:
            program = lambda theta, x, y, order=order: (order(theta - 1), theta.sum(-1))  # noqa: E731
            ends.append(descend(target, run, program, start, recipe, batches, bar, slice(0, 4)).theta)
    assert torch.equal(ends[0], ends[1])
