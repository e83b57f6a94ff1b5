r"""Multilayer perceptron: :math:`h_0 = x`, :math:`h_{l+1} = \phi(W_l h_l + b_l)`, linear outputs.

Every weight matrix and bias is a latent site with a prior. With independent fan-in scaled priors the outputs of a wide
network follow a Gaussian process (Neal 1996): for one hidden ReLU layer of width H, gain :math:`s_w` and no
biases their variance is :math:`s_w^4 |x|^2 / 2D` at every H. Given the hidden weights it varies around that value with
relative variance 5 / H, which is how the Gaussian limit is approached.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from pyro.nn import PyroModule
from torch import Tensor
from torch.nn import functional

from bnn_models import likelihoods, priors

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": functional.elu,
    "erf": torch.erf,
    "gelu": functional.gelu,
    "identity": lambda h: h,
    "leaky_relu": functional.leaky_relu,
    "relu": torch.relu,
    "selu": torch.selu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "sin": torch.sin,
    "softplus": functional.softplus,
    "tanh": torch.tanh,
}


class MLP(PyroModule):
    """Fully connected network as a Pyro model, ``model(x, y=None)``.

    Latent sites are ``"layers.0.weight"`` of shape (out, in), as in `torch.nn.Linear`, and ``"layers.0.bias"`` of shape
    (out,), for each layer, then those of the prior's and likelihood's own parameters; the observed site is ``"y"``.

    Example:
        >>> MLP([8, 50, 1], prior=priors.Normal(scale="fan_in")).site_shapes["layers.0.weight"]
        (50, 8)
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | Callable[[Tensor], Tensor] = "tanh",
        prior: priors.Prior | Mapping[str, priors.Prior | None] | None = None,
        likelihood: likelihoods.Likelihood | None = None,
        bias: bool = True,
    ) -> None:
        """Declare the model.

        Args:
            sizes: Layer widths [D, H1, ..., K], at least two; K must fit the likelihood.
            activation: Name in `ACTIVATIONS`, or a function applied elementwise to each hidden layer.
            prior: Prior of all sites, or a dictionary from site-name patterns to priors; default ``priors.Normal()``.
            likelihood: Distribution of the targets; default ``likelihoods.Normal(1.0)``.
            bias: Whether the layers have biases.

        Raises:
            ValueError: If sizes, activation, or patterns are wrong, or the outputs do not fit the likelihood.
            TypeError: If an argument has the wrong type.
        """
        super().__init__()
        self.sizes = tuple(sizes)
        if len(self.sizes) < 2 or any(not isinstance(size, int) or size < 1 for size in self.sizes):
            raise ValueError(f"`sizes` must be at least two positive integers [D, ..., K], got {list(sizes)}")
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            raise ValueError(f"`activation` must be a function or one of {sorted(ACTIVATIONS)}, got {activation!r}")
        if not isinstance(activation, str) and not callable(activation):
            raise TypeError(f"`activation` must be a name or a function, got {activation!r}")
        self.activation = activation
        self.prior = priors.Normal() if prior is None else prior
        self.likelihood = likelihoods.Normal() if likelihood is None else likelihood
        if not isinstance(self.likelihood, likelihoods.Likelihood):
            raise TypeError(f"`likelihood` must be one of bnn_models.likelihoods, got {likelihood!r}")
        try:
            self.likelihood.target_dim(self.sizes[-1])
        except ValueError as err:
            raise ValueError(f"`sizes` ends with {self.sizes[-1]} outputs, but {err}") from err
        self.bias = bool(bias)
        self._priors = priors.assign(self.prior, list(self.site_shapes))
        constant = [name for name, single in self._priors.items() if single is None]
        if constant:
            raise ValueError(
                f"site '{constant[0]}' has prior None, but an MLP has no pretrained value to keep; give one"
            )

    @property
    def site_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights and biases, in the order they are sampled."""
        shapes: dict[str, tuple[int, ...]] = {}
        for index, (fan_in, fan_out) in enumerate(zip(self.sizes[:-1], self.sizes[1:], strict=True)):
            shapes[f"layers.{index}.weight"] = (fan_out, fan_in)
            if self.bias:
                shapes[f"layers.{index}.bias"] = (fan_out,)
        return shapes

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Sample the weights, run the network and sample or observe the targets.

        Args:
            x: Inputs, shape (N, D).
            y: Targets, shape (N,) or (N, T); None to sample them.

        Returns:
            Network outputs, shape (N, K), with extra dimensions on the left inside vectorised plates.

        Raises:
            ValueError: If x is not a tensor of shape (N, D).
        """
        if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != self.sizes[0]:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a tensor of shape (N, {self.sizes[0]}), got {got}")
        if not x.is_floating_point():
            x = x.to(torch.get_default_dtype())
        sites: dict[str, Tensor] = {}
        for name, shape in self.site_shapes.items():
            slot = priors.Slot(name, shape, shape[-1], name.endswith("bias"), x.dtype, x.device)
            prior = self._priors[name]
            if prior is not None:
                sites[name] = prior.sample(slot)
        outputs = self.network(sites, x)
        self.likelihood(outputs, y)
        return outputs

    def network(self, sites: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Run the network at given weights; a pure function.

        Args:
            sites: Values of the weight and bias sites. S draws in parallel have shape (S, 1, out, in), as inside Pyro's
                vectorised plates, or (S, out, in).
            x: Inputs, shape (N, D).

        Returns:
            Outputs, shape (N, K), or (S, N, K).
        """
        phi = ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation
        num_layers = len(self.sizes) - 1
        h = x
        for index in range(num_layers):
            weight = without_data_dim(sites[f"layers.{index}.weight"], 2)
            bias = without_data_dim(sites[f"layers.{index}.bias"], 1) if self.bias else None
            h = _affine(h, weight, bias)
            h = phi(h) if index < num_layers - 1 else h
        return h

    def __repr__(self) -> str:
        """Return the call that re-creates the model."""
        activation = self.activation if isinstance(self.activation, str) else f"<{self.activation!r}>"
        return (
            f"MLP({list(self.sizes)}, activation={activation!r}, prior={self.prior!r}, "
            f"likelihood={self.likelihood!r}, bias={self.bias})"
        )


def without_data_dim(value: Tensor, num_dims: int) -> Tensor:
    """Bring parallel draws of a site to shape (S, ...).

    Inside a vectorised plate they are (S, 1, ...), the 1 being the data plate's; `pyro.infer.Predictive` also passes on
    what a guide gave as (S, ...), because it pads only sites of fewer dimensions than plates.

    Args:
        value: Value of a site with its draws on the left, or one value.
        num_dims: Number of dimensions of one value.

    Returns:
        The value with draw dimensions only on the left.
    """
    batch = value.shape[: value.dim() - num_dims]
    return value.squeeze(len(batch) - 1) if len(batch) > 1 else value


def _affine(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W h + b for h of shape (N, in) or (S, N, in), weight (out, in) or (S, out, in), bias (out,) or (S, out)."""
    if weight.dim() == 2 and (bias is None or bias.dim() == 1):
        return functional.linear(h, weight, bias)
    out = torch.matmul(h, weight.mT)
    if bias is None:
        return out
    return out + (bias if bias.dim() == 1 else bias.unsqueeze(-2))
