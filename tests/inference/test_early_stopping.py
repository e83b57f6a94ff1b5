import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference.backend import Batches, Run
from inference.early_stopping import EarlyStopping, held_out_losses, hold_out
from inference.errors import NonFiniteError, UnsupportedModelError
from inference.optimisation import Recipe, energy_per_datum, train
from inference.point import MAP
from inference.target import Target, compile_target
from tests.cases import tanh_network
from tests.inference.ensembles.test_deep_ensemble import NOISE, data, linear

network = tanh_network(3, 20, 0.1)  # overfits soon


def a_run(target: Target) -> Run:
    return Run(MAP(compile=False, progress=False), target, 0)


def split(model=network, num: int = 40, fraction: float = 0.25) -> tuple[Target, Target, Target]:
    target = compile_target(model, *data(num))
    return target, *hold_out(target, fraction, torch.Generator().manual_seed(0))


def recipe(**changes: object) -> Recipe:
    return Recipe(**{"num_steps": 400, "step_size": 0.02, "batch_size": 10, "schedule": "constant"} | changes)  # type: ignore[arg-type]


def test_the_data_are_split_at_random_without_loss() -> None:
    target, kept, held = split()
    assert (kept.num_data, held.num_data) == (30, 10)
    rows = torch.cat([torch.column_stack([t.x, t.y]) for t in (kept, held)])
    everything = torch.column_stack([target.x, target.y])
    assert {tuple(r) for r in rows.tolist()} == {tuple(r) for r in everything.tolist()}
    other = hold_out(target, 0.25, torch.Generator().manual_seed(1))[1]
    assert not torch.equal(other.x, held.x)


def test_the_held_out_loss_is_the_mean_over_chunks_that_do_not_divide_the_data() -> None:
    _, _, held = split(linear)
    theta = torch.tensor([[0.3, -0.2, 0.9], [1.0, 0.0, 0.0]])
    expected = torch.stack([-dist.Normal(held.x @ t, NOISE).log_prob(held.y).mean() for t in theta])
    for rows in (3, 10, 64):
        torch.testing.assert_close(held_out_losses(held, 2, rows)(theta), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(held_out_losses(held, 1, 4)(theta[:1]), expected[:1], rtol=1e-12, atol=0)


def _stopped_by_hand(kept: Target, held: Target, run: Run, start: Tensor, member: int, patience: int) -> tuple:
    """One member, with torch's own optimiser and a plain loop over epochs."""
    theta = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([theta], lr=0.02)
    batches = Batches(kept, 10, [run.stream(10_000 + member)])
    loss = energy_per_datum(kept)
    best, least, kept_at, waited, step = start, math.inf, 0, 0, 0
    while waited < patience and step < 400:
        for _ in range(3):  # 30 data in batches of 10
            x, y = batches.next()
            optimiser.zero_grad()
            loss(theta, x[0], y[0]).backward()
            optimiser.step()
            step += 1
        with torch.no_grad():
            value = float(-held.log_likelihood(theta).mean())
        waited += 1
        if value < least:
            best, least, kept_at, waited = theta.detach().clone(), value, step, 0
    return best, least, kept_at, step


@pytest.mark.parametrize("together", [True, False])
def test_every_member_ends_where_it_would_end_alone(together: bool) -> None:
    target, kept, held = split()
    run, start = a_run(target), target.initial(3, seed=0)
    trained = train(kept, run, start, recipe(), together=together, stopping=EarlyStopping(held, 4))
    alone = [_stopped_by_hand(kept, held, a_run(target), start[m], m, 4) for m in range(3)]
    assert trained.steps.tolist() == [kept_at for _, _, kept_at, _ in alone]
    assert len(set(trained.steps.tolist())) > 1
    assert max(ended for *_, ended in alone) < 400
    torch.testing.assert_close(trained.theta, torch.stack([best for best, *_ in alone]), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(trained.losses, torch.tensor([least for _, least, *_ in alone]), rtol=1e-8, atol=0)
    ends = [ended for *_, ended in alone]
    steps = 3 * max(ends) if together else sum(ends)
    assert run.info.gradients == pytest.approx(steps * 10 / 40)  # passes over all 40 data


def test_what_is_kept_is_better_on_the_held_out_data_than_what_training_ends_at() -> None:
    target, kept, held = split()
    start = target.initial(2, seed=0)
    stopped = train(kept, a_run(target), start, recipe(), stopping=EarlyStopping(held, 5)).theta
    ended = train(kept, a_run(target), start, recipe()).theta
    losses = held_out_losses(held, 2, 10)
    assert (losses(stopped) < losses(ended)).all()


def test_steps_that_end_within_an_epoch_are_looked_at_too() -> None:
    target, kept, held = split(linear)
    start = torch.zeros(1, 3)
    trained = train(kept, a_run(target), start, recipe(num_steps=4, step_size=1e-3), stopping=EarlyStopping(held, 5))
    assert trained.steps.tolist() == [4]  # an epoch is three steps


def test_a_full_batch_is_an_epoch() -> None:
    target, kept, held = split(linear)
    short = recipe(num_steps=5, batch_size=None, step_size=1e-3)
    trained = train(kept, a_run(target), torch.zeros(1, 3), short, stopping=EarlyStopping(held, 1))
    assert trained.steps.tolist() == [5]


def test_a_held_out_loss_that_is_never_finite_is_an_error() -> None:
    target, kept, held = split(linear)
    broken = copy.copy(held)
    object.__setattr__(broken, "y", torch.full_like(held.y, torch.nan))
    with pytest.raises(NonFiniteError, match="the loss of member 0 on the held-out data was never finite"):
        train(kept, a_run(target), torch.zeros(2, 3), recipe(num_steps=30), stopping=EarlyStopping(broken, 2))


def test_a_model_with_a_parameter_per_datum_holds_nothing_out() -> None:
    def local(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z + x[:, 0], 1.0), obs=y)

    target = compile_target(local, *data(6))
    with pytest.raises(UnsupportedModelError, match="site 'z' has one value per datum, so that no data can"):
        hold_out(target, 0.5, torch.Generator())


def test_holding_out_all_of_the_data_is_refused() -> None:
    target = compile_target(linear, *data(3))
    with pytest.raises(ValueError, match="`validation_fraction`=0.9 of 3 data leaves none to train on"):
        hold_out(target, 0.9, torch.Generator())
