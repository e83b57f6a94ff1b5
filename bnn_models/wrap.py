"""Any `torch.nn.Module` as a Pyro model: its parameters become latent sites with priors, its code stays as it is.

The module is copied, never changed. In each run the sampled values take the place of the copy's parameters
(`torch.func.functional_call`); buffers, and parameters whose prior is None, keep their pretrained values.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

from bnn_models import likelihoods, priors
from bnn_models.mlp import without_data_dim

Inputs = Tensor | Mapping[str, Tensor] | tuple[Tensor, ...]


def bayesianize(
    net: nn.Module,
    prior: priors.Prior | Mapping[str, priors.Prior | None] | None = None,
    likelihood: likelihoods.Likelihood | None = None,
) -> "BayesianModule":
    """Make a Pyro model of a network, trained or not; the network itself is left untouched.

    Its weights are where inference starts: the one point of a mode or a mean field, the first chain, member or
    particle. Further ones start at weights that PyTorch would give a new network of this kind.

    Fan-in of a linear layer is its number of inputs, of a convolution in_channels / groups x kernel size, of an
    embedding 1. Biases and other one-dimensional parameters count as biases. The priors have mean zero, also for the
    gain of a normalisation layer, whose pretrained value is about 1: give it None where that is not meant.

    Args:
        net: Any module whose outputs have shape (N, K) or (N,); call ``net.eval()`` first if it has batch norm or
            dropout.
        prior: One prior for all parameters, or a dictionary from `fnmatch` patterns on dotted parameter names to
            priors, where the first match wins and None keeps the pretrained value; default ``priors.Normal()``.
        likelihood: Distribution of the targets; default ``likelihoods.Normal(1.0)``.

    Returns:
        The model, to be called as ``model(x, y=None)``.

    Example:
        >>> model = bayesianize(nn.Linear(2, 1), prior={"weight": priors.Normal(0.5), "bias": None})
        >>> list(model.initial_sites())
        ['weight']
    """
    return BayesianModule(net, prior, likelihood)


class BayesianModule(nn.Module):
    """A copied network whose parameters are sites, named by the network's own dotted names; see `bayesianize`.

    Parameters that share a tensor are one site, under the first of their names. Modes are fixed when the model is made:
    ``train()`` and ``eval()`` do nothing. Inside vectorised plates the network is batched by `torch.func.vmap`.
    """

    def __init__(
        self,
        net: nn.Module,
        prior: priors.Prior | Mapping[str, priors.Prior | None] | None = None,
        likelihood: likelihoods.Likelihood | None = None,
    ) -> None:
        """Copy the network and give each parameter its prior; arguments as in `bayesianize`.

        Args:
            net: The network.
            prior: Prior, or patterns to priors.
            likelihood: Distribution of the targets.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If the network is in a mode that changes it or is random, or nothing has a prior.
        """
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"`net` must be a torch.nn.Module, got {type(net).__name__}")
        _check_mode(net)
        self.prior = priors.Normal() if prior is None else prior
        self.likelihood = likelihoods.Normal() if likelihood is None else likelihood
        if not isinstance(self.likelihood, likelihoods.Likelihood):
            raise TypeError(f"`likelihood` must be one of bnn_models.likelihoods, got {likelihood!r}")
        self.net = copy.deepcopy(net).requires_grad_(False)
        self._priors = priors.assign(self.prior, [name for name, _ in self.net.named_parameters()])
        self._fan_in = _fan_in(self.net)
        if all(single is None for single in self._priors.values()):
            raise ValueError("no parameter of `net` has a prior; give at least one pattern a prior other than None")

    def train(self, mode: bool = True) -> "BayesianModule":
        """Do nothing: the mode of the network is the one it had when the model was made.

        Args:
            mode: Ignored.

        Returns:
            The model itself.
        """
        return self

    def initial_sites(self) -> dict[str, Tensor]:
        """Return the pretrained weights, the default starting point of inference.

        Returns:
            From site name to a copy of the network's value; the likelihood's own parameters are not in it.
        """
        parameters = dict(self.net.named_parameters())
        return {name: parameters[name].detach().clone() for name, prior in self._priors.items() if prior is not None}

    def fresh_sites(self, seed: int) -> dict[str, Tensor]:
        """Return weights that PyTorch would give a new network of this kind, where a further point of inference starts.

        They are drawn by the modules' own ``reset_parameters`` on a copy, inner modules first; the copy's network and
        the global random state stay as they are.

        Args:
            seed: Random seed, >= 0.

        Returns:
            From site name to a value, for the parameters of modules that can be reset.
        """
        net = copy.deepcopy(self.net).cpu()
        able: set[nn.Module] = set()

        def reset(module: nn.Module) -> None:
            draw = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if draw is not None:
                draw()
                able.add(module)

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not those of accelerators
            net.apply(reset)
        found = dict(net.named_parameters())
        names = [name for name, prior in self._priors.items() if prior is not None]
        return {name: found[name] for name in names if net.get_submodule(name.rpartition(".")[0]) in able}

    def forward(self, x: Inputs, y: Tensor | None = None) -> Tensor:
        """Sample the parameters, run the network and sample or observe the targets.

        Args:
            x: Inputs whose first dimension is N: a tensor, a tuple (positional arguments) or a dictionary (keywords).
            y: Targets, shape (N,) or (N, T); None to sample them.

        Returns:
            Network outputs, shape (N, K), with extra dimensions on the left inside vectorised plates.
        """
        dtype, device = _dtype_and_device(x)
        sites: dict[str, Tensor] = {}
        for name, parameter in self.net.named_parameters():
            prior = self._priors[name]
            if prior is not None:
                is_bias = parameter.dim() < 2 or "bias" in name.rpartition(".")[2]
                slot = priors.Slot(name, tuple(parameter.shape), self._fan_in[name], is_bias, dtype, device)
                sites[name] = prior.sample(slot)
        outputs = self.network(sites, x)
        self.likelihood(outputs, y)
        return outputs

    def network(self, sites: Mapping[str, Tensor], x: Inputs) -> Tensor:
        """Run the network at given parameter values; a pure function.

        Args:
            sites: Values of the sites; those left out keep their pretrained values. S draws in parallel have shape
                (S, 1, ...), the 1 being the data plate's, or (S, ...).
            x: Inputs, as in `forward`.

        Returns:
            Outputs, shape (N, K), or (S, N, K).
        """
        dtype, device = _dtype_and_device(x)
        constants = {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in [*self.net.named_parameters(), *self.net.named_buffers()]
            if name not in sites
        }
        shapes = {name: parameter.shape for name, parameter in self.net.named_parameters()}
        draws = {name: without_data_dim(value, len(shapes[name])) for name, value in sites.items()}
        batch = torch.broadcast_shapes(
            *(value.shape[: value.dim() - len(shapes[name])] for name, value in draws.items())
        )
        if not batch:
            return self._call({**constants, **draws}, x)
        stacked = {name: value.expand(batch + shapes[name]).reshape(-1, *shapes[name]) for name, value in draws.items()}
        outputs = torch.func.vmap(lambda draw: self._call({**constants, **draw}, x))(stacked)
        return outputs.reshape(batch + outputs.shape[1:])

    def _call(self, values: dict[str, Tensor], x: Inputs) -> Tensor:
        """Outputs (N, K) of the network with its parameters and buffers replaced."""
        args = () if isinstance(x, Mapping) else (x if isinstance(x, tuple) else (x,))
        outputs = torch.func.functional_call(self.net, values, args, dict(x) if isinstance(x, Mapping) else None)
        if not isinstance(outputs, Tensor) or outputs.dim() not in {1, 2}:
            got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(f"`net` must return a tensor of shape (N, K) or (N,), got {got}; wrap it in one that does")
        return outputs.unsqueeze(-1) if outputs.dim() == 1 else outputs

    def __repr__(self) -> str:
        """Return the declaration of the model."""
        name = type(self.net).__name__
        return f"bayesianize({name}(...), prior={self.prior!r}, likelihood={self.likelihood!r})"


def _dtype_and_device(x: Any) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of the data; token ids and other integers say nothing about the dtype, so the default holds."""
    if isinstance(x, Tensor):
        leaves = [x]
    elif isinstance(x, Mapping | tuple):
        leaves = list(x.values()) if isinstance(x, Mapping) else list(x)
    else:
        raise TypeError(f"x must be a tensor, or a tuple or dictionary of tensors, got {type(x).__name__}")
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError(
            f"x must hold at least one tensor and nothing else, got {[type(leaf).__name__ for leaf in leaves]}"
        )
    floating = [leaf.dtype for leaf in leaves if leaf.is_floating_point()]
    return (floating[0] if floating else torch.get_default_dtype()), leaves[0].device


def _fan_in(net: nn.Module) -> dict[str, int]:
    """Number of inputs that one output sums over, for each parameter by its dotted name."""
    result: dict[str, int] = {}
    for prefix, module in net.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            dotted = f"{prefix}.{name}" if prefix else name
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) or parameter.dim() < 2:
                result[dotted] = 1
            elif isinstance(module, _ConvTransposeNd):
                result[dotted] = parameter.shape[0] // module.groups * math.prod(parameter.shape[2:])
            else:
                result[dotted] = math.prod(parameter.shape[1:])
    return result


def _check_mode(net: nn.Module) -> None:
    """Refuse modules that would change themselves, or draw random numbers of their own, when called."""
    for name, module in net.named_modules():
        dropout = getattr(module, "dropout", 0.0)
        is_random = (
            isinstance(module, _DropoutNd | nn.RReLU)
            or isinstance(module, nn.RNNBase | nn.MultiheadAttention)
            and isinstance(dropout, float)
            and dropout > 0
        )
        mutates = isinstance(module, _BatchNorm | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
        if module.training and (is_random or mutates and getattr(module, "track_running_stats", False)):
            reason = "draws random numbers" if is_random else "changes its running statistics"
            raise ValueError(
                f"module '{name}' ({type(module).__name__}) is in training mode and {reason}; call net.eval()"
            )
