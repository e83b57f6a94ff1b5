r"""Likelihoods: how the outputs of a network become the distribution of the targets.

A likelihood is a frozen dataclass that is called with the network outputs inside a Pyro model. It first samples its
own latent parameters (the noise scale, site ``"likelihood.scale"``) outside the plate, then the one observed site
``"y"`` inside ``pyro.plate("data", N)``, so that the log-likelihood of every datum can be read off. Each says how many
outputs it reads. Outputs may carry extra dimensions on the left (Pyro's vectorised plates).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional

from bnn_models.checks import cast_distribution, check_positive_distribution, check_scale


class Likelihood:
    """Base class: T targets per datum read from K network outputs, ``outputs_per_target`` for each target."""

    outputs_per_target: ClassVar[int] = 1

    def num_outputs(self, target_dim: int = 1) -> int:
        """Return the number of network outputs K that T targets need.

        Args:
            target_dim: Number of targets T per datum, 1 for y of shape (N,).

        Returns:
            Number of outputs K.

        Raises:
            ValueError: If there is no target.
        """
        if target_dim < 1:
            raise ValueError(f"`target_dim` must be >= 1, got {target_dim}")
        return self.outputs_per_target * target_dim

    def target_dim(self, num_outputs: int) -> int:
        """Return the number of targets T that K network outputs serve.

        Args:
            num_outputs: Number of outputs K.

        Returns:
            Number of targets T.

        Raises:
            ValueError: If K outputs do not fit this likelihood.
        """
        per_target = self.outputs_per_target
        if num_outputs < 1 or num_outputs % per_target:
            name = type(self).__name__
            raise ValueError(f"{name} reads {per_target} network outputs per target, got {num_outputs} outputs")
        return num_outputs // per_target

    def __call__(self, outputs: Tensor, y: Tensor | None = None) -> Tensor:
        """Sample the latent parameters of the likelihood and the observed site ``"y"``.

        Args:
            outputs: Network outputs, shape (N, K).
            y: Targets, shape (N,) for one target and (N, T) for several; None to sample them.

        Returns:
            The targets, shape (N,) or (N, T).
        """
        target_dim = self.target_dim(outputs.shape[-1])
        if y is not None:
            y = self._checked(y, outputs, target_dim)
        latents = self._latents(outputs)
        parts = outputs.split(target_dim, dim=-1)
        if target_dim == 1:
            observed = self._observed([part.squeeze(-1) for part in parts], latents)
        else:
            observed = self._observed(list(parts), {name: value.unsqueeze(-1) for name, value in latents.items()})
            observed = observed.to_event(1)
        with pyro.plate("data", outputs.shape[-2], dim=-1):
            return pyro.sample("y", observed, obs=y)

    def _checked(self, y: Tensor, outputs: Tensor, target_dim: int) -> Tensor:
        """Refuse targets that would broadcast into something else; counts and labels become floats."""
        num_data = outputs.shape[-2]
        expected = (num_data,) if target_dim == 1 else (num_data, target_dim)
        if tuple(y.shape) != expected:
            hint = "; use y.squeeze(-1)" if tuple(y.shape) == (num_data, 1) and target_dim == 1 else ""
            raise ValueError(
                f"y must have shape {expected} for {num_data} inputs and {outputs.shape[-1]} outputs "
                f"with {type(self).__name__}, got {tuple(y.shape)}{hint}"
            )
        return y if y.is_floating_point() else y.to(outputs.dtype)

    def _latents(self, outputs: Tensor) -> dict[str, Tensor]:
        """Scalar parameters shared by all data, sampled if they have a prior."""
        return {}

    def _observed(self, parts: list[Tensor], latents: dict[str, Tensor]) -> Any:
        """Distribution of the targets; each part and each latent broadcasts to (N,) or (N, T)."""
        raise NotImplementedError(f"{type(self).__name__} must define the observed distribution")


def _noise_scale(scale: Any, outputs: Tensor) -> Tensor:
    if isinstance(scale, int | float):
        return torch.tensor(float(scale), dtype=outputs.dtype, device=outputs.device)
    return pyro.sample("likelihood.scale", cast_distribution(scale, outputs.dtype, outputs.device))


def _check_noise_scale(scale: Any) -> None:
    if isinstance(scale, torch.distributions.Distribution):
        check_positive_distribution("scale", scale)
    else:
        check_scale("scale", scale, "a positive number or a distribution such as dist.HalfNormal(1.0)")


@dataclass(frozen=True)
class Normal(Likelihood):
    r"""Gaussian noise of one scale, :math:`y_n \sim N(f(x_n), s^2)`; one output per target.

    Attributes:
        scale: Standard deviation s of the noise, > 0, or its prior, a univariate Pyro distribution on positive
            numbers.
    """

    scale: Any = 1.0

    def __post_init__(self) -> None:
        """Check the scale."""
        _check_noise_scale(self.scale)

    def _latents(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"scale": _noise_scale(self.scale, outputs)}

    def _observed(self, parts: list[Tensor], latents: dict[str, Tensor]) -> Any:
        return dist.Normal(parts[0], latents["scale"])


@dataclass(frozen=True)
class HeteroscedasticNormal(Likelihood):
    r"""Gaussian noise whose scale the network gives.

    :math:`y_n \sim N(f_1(x_n), (\text{softplus} f_2(x_n) + s_{min})^2)`.
    Two outputs per target: with T targets the first T outputs are the means and the last T the raw scales.

    Attributes:
        min_scale: Smallest standard deviation, > 0.
    """

    min_scale: float = 1e-6
    outputs_per_target: ClassVar[int] = 2

    def __post_init__(self) -> None:
        """Check the scale."""
        check_scale("min_scale", self.min_scale)

    def _observed(self, parts: list[Tensor], latents: dict[str, Tensor]) -> Any:
        return dist.Normal(parts[0], functional.softplus(parts[1]) + self.min_scale)


@dataclass(frozen=True)
class StudentT(Likelihood):
    r"""Heavy-tailed noise, :math:`y_n \sim t_\nu(f(x_n), s)`; one output per target.

    Attributes:
        df: Degrees of freedom :math:`\nu`, > 0.
        scale: Scale s (not the standard deviation), > 0, or its prior, a univariate Pyro distribution on positive
            numbers.
    """

    df: float = 4.0
    scale: Any = 1.0

    def __post_init__(self) -> None:
        """Check the fields."""
        check_scale("df", self.df)
        _check_noise_scale(self.scale)

    def _latents(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"scale": _noise_scale(self.scale, outputs)}

    def _observed(self, parts: list[Tensor], latents: dict[str, Tensor]) -> Any:
        df = torch.tensor(float(self.df), dtype=parts[0].dtype, device=parts[0].device)
        return dist.StudentT(df, parts[0], latents["scale"])


@dataclass(frozen=True)
class Categorical(Likelihood):
    r"""Classes, :math:`p(y_n = k) = \text{softmax}_k f(x_n)`; one output (logit) per class, y integers (N,).

    Attributes:
        num_classes: Number of classes, >= 2; None takes as many as the network has outputs.
    """

    num_classes: int | None = None

    def __post_init__(self) -> None:
        """Check the number of classes.

        Raises:
            ValueError: If there are fewer than two.
        """
        if self.num_classes is not None and (not isinstance(self.num_classes, int) or self.num_classes < 2):
            raise ValueError(f"`num_classes` must be an integer >= 2 or None, got {self.num_classes!r}")

    def num_outputs(self, target_dim: int = 1) -> int:
        """Return the number of network outputs K, one per class.

        Args:
            target_dim: Number of targets per datum, which has to be 1.

        Returns:
            Number of classes.

        Raises:
            ValueError: If the number of classes was not given, or there are several targets.
        """
        if target_dim != 1:
            raise ValueError(f"Categorical has one target per datum, got target_dim={target_dim}")
        if self.num_classes is None:
            raise ValueError("the number of classes is not known; use Categorical(num_classes=...)")
        return self.num_classes

    def target_dim(self, num_outputs: int) -> int:
        """Return the number of targets per datum, which is 1.

        Args:
            num_outputs: Number of network outputs K.

        Returns:
            1.

        Raises:
            ValueError: If the number of outputs is not the number of classes, or below two.
        """
        if num_outputs < 2:
            raise ValueError(
                f"Categorical reads one output per class, at least 2, got {num_outputs}; for one, Bernoulli()"
            )
        if self.num_classes not in {None, num_outputs}:
            raise ValueError(f"Categorical with {self.num_classes} classes reads as many outputs, got {num_outputs}")
        return 1

    def __call__(self, outputs: Tensor, y: Tensor | None = None) -> Tensor:
        """Sample the observed site ``"y"``.

        Args:
            outputs: Logits, shape (N, K).
            y: Integer labels in 0..K-1, shape (N,); None to sample them.

        Returns:
            The labels, shape (N,).

        Raises:
            ValueError: If the labels are not integers or not of shape (N,).
        """
        self.target_dim(outputs.shape[-1])
        if y is not None:
            if y.is_floating_point():
                raise ValueError(f"Categorical needs integer labels, got y of dtype {y.dtype}; use y.long()")
            self._checked(y, outputs, 1)
            y = y.long()
        with pyro.plate("data", outputs.shape[-2], dim=-1):
            return pyro.sample("y", dist.Categorical(logits=outputs), obs=y)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    r"""Two classes, :math:`p(y_n = 1) = 1 / (1 + e^{-f(x_n)})`; one output (logit) per target, y in {0, 1}."""

    def _observed(self, parts: list[Tensor], latents: dict[str, Tensor]) -> Any:
        return dist.Bernoulli(logits=parts[0])


@dataclass(frozen=True)
class Poisson(Likelihood):
    r"""Counts, :math:`y_n \sim \text{Poisson}(e^{f(x_n)})`; one output (log rate) per target, y in 0, 1, 2, ..."""

    def _observed(self, parts: list[Tensor], latents: dict[str, Tensor]) -> Any:
        return dist.Poisson(parts[0].exp())
