r"""Training by gradient descent: M members as one stacked (M, P) tensor, one optimiser step for all of them.

Members descend the energy per datum, :math:`-\log p(\theta, y \mid x) / N`, the scale of a mean loss, so that published
learning rates apply; the prior is in it with its right weight (for a Gaussian of variance :math:`s^2`, PyTorch's
``weight_decay`` would be :math:`1/(s^2 N)`). The gradient of all members is one recorded graph and one call; the
optimisers and schedules are torch's and act elementwise, so a member's path does not depend on its neighbours.
Where matrix products of one member fill a core already, members train one after another, with the same arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from inference.adam import Adam
from inference.backend import Bar, Batches, Run, stacked
from inference.data import Tree, map_tree
from inference.double import in_double
from inference.early_stopping import EarlyStopping, Losses, Watch, held_out_losses
from inference.errors import NonFiniteError
from inference.graph import hot
from inference.target import Target

Loss = Callable[[Tensor, Tree, Tensor], Tensor]
Program = Callable[[Tensor, Tree, Tensor], tuple[Tensor, Tensor]]
Callback = Callable[[int, slice, Tensor], None]
Update = Callable[[Tensor, float], None]
OptimiserName = Literal["adam", "sgd", "adagrad"]
ScheduleName = Literal["constant", "cosine"]

OPTIMISERS = ("adam", "sgd", "adagrad")
SCHEDULES = ("constant", "cosine")
# Streams 0, 1, ... of a seed give the members' starting points; their shuffling must not repeat those numbers.
SHUFFLING_STREAM = 10_000


def energy_per_datum(target: Target, *, jacobian: bool = True, prior: bool = True) -> Loss:
    r"""The loss that training minimises, :math:`-[\log p(\theta) + \frac{N}{B}\sum_b \log p(y_b|x_b,\theta)/T_l]/N`.

    The temperature T of the whole energy leaves its minima where they are and is left out, so that it does not act
    as a change of step size.

    Args:
        target: The model and its temperatures.
        jacobian: Include the log-Jacobian of constrained sites (the density in unconstrained space). Without it the
            minimum is the mode of the density of the sites as they were declared.
        prior: Include the prior at all; False gives maximum likelihood.

    Returns:
        Function of theta (P,), inputs (B, ...) and targets (B, ...) to a loss () in nats per datum.
    """

    def loss(theta: Tensor, x: Tree, y: Tensor) -> Tensor:
        if not prior:
            return -target.log_likelihood(theta, x, y).mean() / target.likelihood_temperature
        value = target.log_density_estimate(theta, x, y) * target.temperature
        if not jacobian:
            value = value - torch.stack([s.log_abs_det_jacobian(theta[s.start : s.stop]) for s in target.sites]).sum()
        return -value / target.num_data

    return loss


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to descend.

    Attributes:
        num_steps: Number of optimiser steps.
        step_size: Learning rate at the start.
        batch_size: Data per step and member; None for the loader's, or else all of them.
        optimiser: "adam", "sgd" or "adagrad".
        schedule: "constant", "cosine" (to 0), or a function from the step number to a factor of ``step_size``.
        momentum: Of SGD.
        weight_decay: Decoupled weight decay of Adam (AdamW): each step also multiplies theta by 1 - rate x this.
    """

    num_steps: int
    step_size: float
    batch_size: int | None = None
    optimiser: OptimiserName = "adam"
    schedule: ScheduleName | Callable[[int], float] = "cosine"
    momentum: float = 0.9
    weight_decay: float = 0.0

    def rate(self, step: int) -> float:
        """Learning rate after ``step`` steps."""
        if callable(self.schedule):
            return self.step_size * self.schedule(step)
        if self.schedule == "cosine":
            return self.step_size * 0.5 * (1 + math.cos(math.pi * step / self.num_steps))
        return self.step_size

    def update_for(self, theta: Tensor) -> Update:
        """Function of a gradient (M, P) and a learning rate that moves a stacked tensor (M, P) in place."""
        if self.optimiser == "adam":
            return Adam(theta, self.weight_decay).step
        if self.optimiser == "adagrad":
            optimiser: torch.optim.Optimizer = torch.optim.Adagrad([theta])
        else:
            optimiser = torch.optim.SGD([theta], momentum=self.momentum, fused=True)

        def update(gradient: Tensor, rate: float) -> None:
            # A graph may return a transposed view, and fused optimisers read memory in theta's own order.
            theta.grad = gradient.contiguous()
            optimiser.param_groups[0]["lr"] = rate
            optimiser.step()
            theta.grad = None

        return update


@dataclass(frozen=True)
class Trained:
    """Where training ended.

    Attributes:
        theta: (M, P).
        losses: Loss of each member at its last step, before the last update, (M,); with early stopping, of the held-out
            data at ``theta``; nats per datum.
        steps: Steps of each member that led to ``theta``, (M,).
    """

    theta: Tensor
    losses: Tensor
    steps: Tensor


def train(
    target: Target,
    run: Run,
    start: Tensor,
    recipe: Recipe,
    *,
    loss: Loss | None = None,
    description: str = "training",
    callback: Callback | None = None,
    together: bool | None = None,
    stopping: EarlyStopping | None = None,
) -> Trained:
    """Train M members independently of one another, each on its own shuffling of the data.

    Args:
        target: The model and its data.
        run: Seed, progress and counters of this fit.
        start: Starting points, (M, P).
        recipe: Optimiser, steps and batches.
        loss: Loss of one member; the energy per datum with Jacobians by default.
        description: What the progress bar says.
        callback: Called after every step with the number of steps done, the members concerned and their thetas
            (m, P), not to be modified.
        together: Stack the members (True) or train one after another (False); None decides by size.
        stopping: When to stop before ``recipe.num_steps``, if ever; each member then keeps its best weights.

    Returns:
        Final thetas and losses.

    Raises:
        NonFiniteError: If a loss or theta stops being finite; names step, member and site.
    """
    loss = loss or energy_per_datum(target)
    num = start.shape[0]
    streams = [run.stream(SHUFFLING_STREAM + m) for m in range(num)]
    size = Batches(target, recipe.batch_size, streams[:1]).size
    if together is None:
        together = stacked(target, num, size)
    groups = [slice(0, num)] if together else [slice(m, m + 1) for m in range(num)]
    program: Program | None = None
    held_out: Losses | None = None
    trained = []
    with run.bar(recipe.num_steps * len(groups), description) as bar:
        for members in groups:
            batches = Batches(target, recipe.batch_size, streams[members])
            if program is None:
                program = gradients(target, run, loss, batches, num_calls=recipe.num_steps * len(groups))
            watch: Watch | None = None
            if stopping is not None:
                held_out = held_out or held_out_losses(stopping.held_out, batches.num, size)
                epoch = math.ceil(target.num_data / size)
                watch = Watch(held_out, start[members], stopping.patience, epoch)
            trained.append(
                descend(target, run, program, start[members], recipe, batches, bar, members, callback, watch)
            )
    parts = [torch.cat(p) for p in zip(*((t.theta, t.losses, t.steps) for t in trained), strict=True)]
    return Trained(*parts)


def gradients(target: Target, run: Run, loss: Loss, batches: Batches, num_calls: float) -> Program:
    """Record the gradients of all members' losses as one graph.

    Args:
        target: The model.
        run: Says whether to compile.
        loss: Loss of one member.
        batches: Number of members and shapes of their data.
        num_calls: Expected number of calls.

    Returns:
        Function of thetas (M, P), x and y as ``batches.next()`` gives them, to gradients (M, P) and losses (M,).
    """
    one = grad_and_value(loss)

    def single(theta: Tensor, x: Tree, y: Tensor) -> tuple[Tensor, Tensor]:
        # Without vmap the matrix products are plain ones, which are faster than batches of one.
        if not batches.full:
            x, y = map_tree(lambda leaf: leaf[0], x), y[0]
        grad, value = one(theta[0], x, y)
        return grad[None], value[None]

    batched = single if batches.num == 1 else vmap(one, in_dims=(0, *batches.in_dims))
    example = torch.zeros(batches.num, target.dim, dtype=target.dtype, device=target.device)
    return hot(batched, example, *batches.example(), compile=run.backend.compile, num_calls=num_calls)


def descend(
    target: Target,
    run: Run,
    program: Program,
    start: Tensor,
    recipe: Recipe,
    batches: Batches,
    bar: Bar,
    members: slice,
    callback: Callback | None = None,
    watch: Watch | None = None,
) -> Trained:
    """The loop itself: batch, gradients, one optimiser step for all members.

    Args:
        target: Names the sites in errors.
        run: Counts the gradients.
        program: Descent directions and losses of all members.
        start: (M, P).
        recipe: Optimiser and schedule.
        batches: The members' data.
        bar: Progress bar.
        members: Which members these are.
        callback: See :func:`train`.
        watch: Says when all members have stopped, and keeps their best weights.

    Returns:
        Final thetas and losses.

    Raises:
        NonFiniteError: If a loss or theta stops being finite.
    """
    theta = start.detach().clone(memory_format=torch.contiguous_format)
    update = recipe.update_for(theta)
    losses = torch.zeros(theta.shape[0], dtype=theta.dtype, device=theta.device)
    step = 0
    with torch.no_grad():
        for step in range(1, recipe.num_steps + 1):
            grads, losses = program(theta, *batches.next())
            mean = float(losses.mean())
            if not math.isfinite(mean):
                raise NonFiniteError(_where(target, theta, grads, losses, step, members))
            update(grads, recipe.rate(step - 1))
            if callback is not None:
                callback(step, members, theta)
            bar.advance(1, loss=mean)
            if watch is not None and watch.stops(step, theta):
                bar.advance(recipe.num_steps - step)
                break
        else:
            if watch is not None:
                watch.finish(step, theta)
    # A pass is one over all the data of the fit, also where some are held out of this target.
    run.count(step * batches.size / run.target.num_data * theta.shape[0])
    if not torch.isfinite(theta).all():
        raise NonFiniteError(_where(target, theta, theta, losses, step, members))
    if watch is not None:
        watch.check(members.start)
        return Trained(watch.best, watch.least.to(theta.dtype), watch.steps)
    return Trained(theta, losses, torch.full((theta.shape[0],), step, device=theta.device))


def polish(
    target: Target,
    run: Run,
    start: Tensor,
    loss_of: Callable[[Target], Loss] = energy_per_datum,
    max_steps: int = 200,
) -> Tensor:
    """Finish one member by full-batch L-BFGS with strong-Wolfe line search, in float64; never ends higher.

    Args:
        target: The model and all its data.
        run: Counts the gradients.
        start: (P,).
        loss_of: Loss of one member of a target; called with the float64 twin of ``target``.
        max_steps: Largest number of L-BFGS iterations.

    Returns:
        (P,).
    """
    target = in_double(target)
    theta = start.detach().to(target.dtype, copy=True)
    loss, example = loss_of(target), (theta, target.x, target.y)
    program = hot(grad_and_value(loss), *example, compile=run.backend.compile, num_calls=1.3 * max_steps)
    optimiser = torch.optim.LBFGS(
        [theta],
        max_iter=max_steps,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    values: list[float] = []

    def closure() -> Tensor:
        theta.grad, value = program(theta, target.x, target.y)
        values.append(float(value))
        return value

    with torch.no_grad():
        optimiser.step(closure)  # type: ignore[arg-type]
        _, after = program(theta, target.x, target.y)
    run.count(len(values) + 1)
    theta.grad = None
    return theta.to(start.dtype) if float(after) <= values[0] else start


def _where(target: Target, theta: Tensor, grads: Tensor, losses: Tensor, step: int, members: slice) -> str:
    """Say where a non-finite number first appeared."""
    broken = ~(torch.isfinite(losses) & torch.isfinite(theta).all(-1))
    member = int(broken.nonzero()[0])
    # A theta that is broken already was broken by the gradient of the step before.
    suspects = theta[member] if not torch.isfinite(theta[member]).all() else grads[member]
    names = [s.name for s in target.sites if not torch.isfinite(suspects[s.start : s.stop]).all()]
    where = f"the gradient of site {names[0]!r} is not finite" if names else "its gradient is finite"
    return (
        f"step {step}: the loss of member {members.start + member} is {float(losses[member])} and {where}; "
        "try a smaller `step_size`, or check the model at its starting point"
    )


def check_choice(owner: object, name: str, choices: Sequence[str]) -> None:
    """Raise unless a field is one of some words.

    Args:
        owner: Backend.
        name: Field.
        choices: Allowed values.

    Raises:
        ValueError: Naming field, choices and value.
    """
    value = getattr(owner, name)
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}")
