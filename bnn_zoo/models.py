"""Models by name: how the command line declares a network, so that a saved run can declare the same one again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pyro.distributions as dist

from bnn_models import MLP, likelihoods, priors
from bnn_models.mlp import ACTIVATIONS
from bnn_zoo.data import Dataset
from bnn_zoo.data.registry import did_you_mean
from bnn_zoo.errors import UsageError, usage

MODELS: dict[str, str] = {
    "mlp": "fully connected network; learnt noise sd with a HalfNormal(1) prior, or class probabilities",
    "heteroscedastic_mlp": "the same with a second output for the log of the noise sd at each input; regression only",
    "linear": "no hidden layer: Bayesian linear or multinomial logistic regression",
}

_SCALED: dict[str, Callable[..., priors.Prior]] = {
    "normal": priors.Normal,
    "laplace": priors.Laplace,
    "student_t": priors.StudentT,
    "logistic": priors.Logistic,
}
PRIORS: dict[str, str] = {
    "normal": "Gaussian: `normal:fan_in` (sd 1/sqrt(inputs) for weights, 1 for biases), or `normal:0.5`",
    "laplace": "Laplace: `laplace:fan_in`, or `laplace:0.5` for its scale b",
    "student_t": "Student t with 3 degrees of freedom: `student_t:fan_in`, or `student_t:0.5`",
    "logistic": "logistic, tails between Gaussian and Laplace: `logistic:fan_in`, or `logistic:0.5` for its scale",
    "scale_mixture": "half N(0, 1) and half N(0, 0.1^2), as in Bayes by Backprop",
    "hierarchical": "Gaussian whose sd is learnt for each layer: `hierarchical:1` for a HalfNormal(1) prior on it",
}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model as the command line names it; plain values, kept beside every saved posterior.

    Attributes:
        name: One of :data:`MODELS`.
        hidden: Widths of the hidden layers.
        activation: One of ``bnn_models.mlp.ACTIVATIONS``.
        prior: One of :data:`PRIORS`, maybe with a scale after a colon.
    """

    name: str = "mlp"
    hidden: tuple[int, ...] = (50,)
    activation: str = "tanh"
    prior: str = "normal:fan_in"

    def __post_init__(self) -> None:
        for name, known, what in (
            (self.name, MODELS, "models"),
            (self.activation, ACTIVATIONS, "activations"),
            (self.prior.partition(":")[0], PRIORS, "priors"),
        ):
            if name not in known:
                raise UsageError(f"unknown {what[:-1]} {name!r}: {did_you_mean(name, known, what)}")
        if not self.hidden or any(width < 1 for width in self.hidden):
            raise UsageError(f"`hidden` must be widths >= 1 such as 50 or 50,50, got {self.hidden}")

    def build(self, data: Dataset) -> MLP:
        """Declare the model for a data set.

        Args:
            data: Says how many inputs and classes there are.

        Returns:
            A Pyro model.
        """
        return self.build_for(data.num_features, data.num_classes)

    def build_for(self, num_features: int, num_classes: int) -> MLP:
        """Declare the model.

        Args:
            num_features: Inputs D.
            num_classes: Classes K; 0 for a regression.

        Returns:
            A Pyro model.

        Raises:
            UsageError: If the model does not suit the task.
        """
        hidden = () if self.name == "linear" else self.hidden
        if num_classes and self.name == "heteroscedastic_mlp":
            raise UsageError("model 'heteroscedastic_mlp' needs a regression: class labels have no noise sd; use 'mlp'")
        if num_classes:
            outputs, likelihood = num_classes, likelihoods.Categorical()
        elif self.name == "heteroscedastic_mlp":
            outputs, likelihood = 2, likelihoods.HeteroscedasticNormal()
        else:
            outputs, likelihood = 1, likelihoods.Normal(scale=dist.HalfNormal(1.0))
        sizes = [num_features, *hidden, outputs]
        return MLP(sizes, activation=self.activation, prior=parse_prior(self.prior), likelihood=likelihood)

    def likelihood_text(self, num_classes: int) -> str:
        """The likelihood in words, for reports (the ``repr`` of a distribution hides its parameters).

        Args:
            num_classes: Classes K; 0 for a regression.

        Returns:
            One line.
        """
        if num_classes:
            return f"Categorical over {num_classes} classes, logits from the network"
        if self.name == "heteroscedastic_mlp":
            return "Normal; mean and log sd from the network, standardised targets"
        return "Normal; mean from the network, sd with a HalfNormal(1) prior, standardised targets"

    def to_json(self) -> dict[str, Any]:
        """Plain values for :meth:`from_json`."""
        return {**asdict(self), "hidden": list(self.hidden)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ModelSpec:
        """Undo :meth:`to_json`."""
        return cls(**{**fields, "hidden": tuple(fields["hidden"])})


def parse_prior(text: str) -> priors.Prior:
    """The prior that a text such as ``normal:fan_in`` names.

    Args:
        text: A name of :data:`PRIORS`, maybe with a colon and a scale.

    Returns:
        The prior.

    Raises:
        UsageError: If the scale is neither a number nor "fan_in".
    """
    name, _, argument = text.partition(":")
    if name == "scale_mixture":
        if argument:
            raise UsageError(f"prior 'scale_mixture' takes no scale, got {text!r}")
        return priors.ScaleMixture()
    try:
        scale = "fan_in" if argument in ("", "fan_in") else float(argument)
    except ValueError as err:
        raise UsageError(f"the scale of a prior must be a number or fan_in, as in normal:0.5, got {text!r}") from err
    with usage(f"prior {text!r}: "):
        if name == "hierarchical":
            size = 1.0 if scale == "fan_in" else scale
            return priors.Hierarchical(dist.HalfNormal(size), fan_in=scale == "fan_in")
        return _SCALED[name](scale=scale)


def parse_hidden(text: str) -> tuple[int, ...]:
    """Widths of hidden layers from a text such as ``50,50``.

    Args:
        text: Whole numbers, separated by commas.

    Returns:
        The widths.

    Raises:
        UsageError: If there is anything else.
    """
    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError as err:
        raise UsageError(f"--hidden must be widths such as 50 or 50,50, got {text!r}") from err
