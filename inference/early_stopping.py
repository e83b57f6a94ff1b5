"""Early stopping: members train until data they were not trained on stop gaining, and keep their best weights.

Once an epoch the mean negative log-likelihood of the held-out data is computed for every member. A member stops when it
has not fallen below its least value for ``patience`` epochs in a row. Members that train side by side share one graph,
so those that have stopped move on with the others, but their weights are put back and nothing is kept of it: a member
ends where it would have ended alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import vmap

from inference.data import Tree, full_chunks, index
from inference.errors import NonFiniteError, UnsupportedModelError
from inference.graph import capture
from inference.target import Target

Losses = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EarlyStopping:
    """When to stop.

    Attributes:
        held_out: The model with the data that are not trained on.
        patience: Epochs without a new least loss after which a member stops, >= 1.
    """

    held_out: Target
    patience: int


def hold_out(target: Target, fraction: float, generator: torch.Generator) -> tuple[Target, Target]:
    """Split the data at random.

    Args:
        target: The model and all its data, N.
        fraction: Share of the data to hold out, in (0, 1); at least one datum is.
        generator: Chooses them.

    Returns:
        The model with the data to train on, and with those held out.

    Raises:
        UnsupportedModelError: If the model has parameters of single data.
        ValueError: If nothing is left to train on.
    """
    local = target.programs.traced.local_sites
    if local:
        raise UnsupportedModelError(
            f"site {local[0]!r} has one value per datum, so that no data can be held out; leave `validation_fraction` "
            "at None, or make the site global"
        )
    num = max(1, round(fraction * target.num_data))
    if num >= target.num_data:
        raise ValueError(
            f"`validation_fraction`={fraction} of {target.num_data} data leaves none to train on; lower it, or leave "
            "it at None"
        )
    order = torch.randperm(target.num_data, generator=generator, device=target.device)

    def part(rows: Tensor) -> Target:
        rows = rows.sort().values
        return replace(target, x=index(target.x, rows), y=target.y[rows])

    return part(order[num:]), part(order[:num])


def held_out_losses(held_out: Target, num: int, rows: int) -> Losses:
    """Record the mean loss of the held-out data.

    Args:
        held_out: The model and the data.
        num: Members M.
        rows: Data at a time.

    Returns:
        Function from thetas (M, P) to losses (M,); nats per datum, without the prior.
    """
    rows = min(rows, held_out.num_data)

    def one(theta: Tensor, x: Tree, y: Tensor) -> Tensor:
        return -held_out.log_likelihood(theta, x, y) / held_out.likelihood_temperature

    def single(theta: Tensor, x: Tree, y: Tensor) -> Tensor:
        return one(theta[0], x, y)[None]  # as in training: plain matrix products are faster than batches of one

    batched = single if num == 1 else vmap(one, in_dims=(0, None, None))
    example = torch.zeros(num, held_out.dim, dtype=held_out.dtype, device=held_out.device)
    program = capture(batched, example, index(held_out.x, slice(0, rows)), held_out.y[:rows])

    def losses(theta: Tensor) -> Tensor:
        total = torch.zeros(num, dtype=torch.float64, device=theta.device)
        for part, skip in full_chunks(held_out.num_data, rows):
            total += program(theta, index(held_out.x, part), held_out.y[part])[:, skip:].double().sum(-1)
        return total / held_out.num_data

    return losses


class Watch:
    """Keeps the best weights of some members while they train.

    Args:
        losses: Held-out losses of these members.
        start: Where they start, (M, P).
        patience: Epochs.
        epoch: Steps of an epoch.

    Attributes:
        best: Weights of the least loss of each member, (M, P).
        least: That loss, (M,); nats per datum.
        steps: Steps that had been done by then, (M,).
    """

    def __init__(self, losses: Losses, start: Tensor, patience: int, epoch: int) -> None:
        self.best = start.clone()
        self.least = torch.full((start.shape[0],), torch.inf, dtype=torch.float64, device=start.device)
        self.steps = torch.zeros(start.shape[0], dtype=torch.long, device=start.device)
        self._losses, self._patience, self._epoch = losses, patience, epoch
        self._waited = torch.zeros_like(self.steps)

    def stops(self, step: int, theta: Tensor) -> bool:
        """Look at the held-out data at the end of an epoch.

        Args:
            step: Steps done.
            theta: Weights after them, (M, P); those of members that have stopped are put back.

        Returns:
            Whether all members have stopped.
        """
        if step % self._epoch:
            return False
        self._look(step, theta)
        stopped = self._waited >= self._patience
        theta[stopped] = self.best[stopped]
        return bool(stopped.all())

    def finish(self, step: int, theta: Tensor) -> None:
        """Look once more where the steps end within an epoch.

        Args:
            step: Steps done.
            theta: Weights after them, (M, P).
        """
        if step % self._epoch:
            self._look(step, theta)

    def _look(self, step: int, theta: Tensor) -> None:
        """Compare with the best so far."""
        losses = self._losses(theta)
        better = (losses < self.least) & (self._waited < self._patience)
        self.best[better], self.least[better], self.steps[better] = theta[better], losses[better], step
        self._waited = torch.where(better, 0, self._waited + 1)

    def check(self, first: int) -> None:
        """Raise if a member has no weights to keep.

        Args:
            first: Number of the first of these members.

        Raises:
            NonFiniteError: If the held-out loss of a member was never finite.
        """
        if not torch.isfinite(self.least).all():
            member = first + int((~torch.isfinite(self.least)).nonzero()[0])
            raise NonFiniteError(
                f"the loss of member {member} on the held-out data was never finite; try a smaller `step_size`, or "
                "check the model at its starting point"
            )
