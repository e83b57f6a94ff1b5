"""The posteriors that samplers are compared on: data, our model, and the functions whose draws are judged.

Every contestant gets the same arrays and declares the same density in its own language. What is compared are functions
of the parameters that mean the same everywhere: outputs of a network at test inputs, or the parameters themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer
from torch import Tensor

from benchmarks.problems import NOISE, Problem
from bnn_zoo.data import load

Floats = NDArray[np.floating]
Sites = dict[str, Tensor]
NUM_PROBES = 100
_SCHOOLS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0), (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


@dataclass(frozen=True)
class Posterior:
    """One posterior.

    Attributes:
        name: What the page calls it.
        kind: "mlp", "logistic", "schools" or "linear": which density a peer declares.
        arrays: x, y, probes and what else the density needs.
        model: Ours, in Pyro.
        functions: Values (..., F) of the judged functions from site values (..., *shape).
        plain_model: The same by hand in Pyro, for Pyro's own sampler; the model itself if None.
    """

    name: str
    kind: str
    arrays: dict[str, Floats]
    model: Callable[..., object]
    functions: Callable[[Sites], Tensor]
    plain_model: Callable[..., object] | None = None


def network(data: str, hidden: tuple[int, ...]) -> Posterior:
    """A tanh network with known noise on split 0 of a data set; priors N(0, 1/fan-in), biases N(0, 1)."""
    loaded = load(data)
    problem = Problem((loaded.num_features, *hidden, 1), loaded.x_train, loaded.y_train)
    probes = torch.cat([loaded.x_test, loaded.x_train])[:NUM_PROBES]
    names = [name for name, _ in problem.sites]

    def functions(sites: Sites) -> Tensor:
        return torch.func.vmap(lambda s: problem.network([s[name] for name in names], probes))(sites)

    arrays = {
        "x": loaded.x_train.numpy(),
        "y": loaded.y_train.numpy(),
        "probes": probes.numpy(),
        "sizes": np.array(problem.sizes),
        "noise": np.array(NOISE),
    }
    return Posterior(f"{problem.name}, {data}", "mlp", arrays, problem.ours(), functions, problem.pyro_model())


def logistic() -> Posterior:
    """Logistic regression on breast cancer: 569 rows, 30 standardised inputs, N(0, 1) priors."""
    x, y = load_breast_cancer(return_X_y=True)
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y.astype(np.float32))

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)

    def functions(sites: Sites) -> Tensor:
        return sites["w"] @ inputs[:NUM_PROBES].T + sites["b"].unsqueeze(-1)

    arrays = {"x": x, "y": labels.numpy(), "probes": x[:NUM_PROBES]}
    return Posterior("logistic regression, breast cancer", "logistic", arrays, model, functions)


def schools() -> Posterior:
    """Eight schools, non-centred: mu ~ N(0, 5), tau ~ HalfCauchy(5)."""
    y, sigma = (np.array(values, dtype=np.float32) for values in _SCHOOLS)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("data", len(x)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, x), obs=y)

    def functions(sites: Sites) -> Tensor:
        mu, tau = sites["mu"].unsqueeze(-1), sites["tau"].unsqueeze(-1)
        return torch.cat([mu, tau.log(), mu + tau * sites["eta"]], -1)

    return Posterior("eight schools", "schools", {"x": sigma, "y": y}, model, functions)


def gaussian() -> Posterior:
    """A correlated Gaussian in 10 dimensions: linear regression with known noise on collinear inputs."""
    random = np.random.default_rng(0)
    correlation = 0.9 ** np.abs(np.subtract.outer(np.arange(10), np.arange(10)))
    x = (random.normal(size=(100, 10)) @ np.linalg.cholesky(correlation).T).astype(np.float32)
    y = (x @ random.normal(size=10) + 0.5 * random.normal(size=100)).astype(np.float32)

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    return Posterior("correlated Gaussian, P = 10", "linear", {"x": x, "y": y}, model, lambda sites: sites["w"])


POSTERIORS: dict[str, Callable[[], Posterior]] = {
    "energy": lambda: network("energy", (50,)),
    "energy_deep": lambda: network("energy", (50, 50)),
    "boston": lambda: network("boston", (50,)),
    "gap": lambda: network("gap", (50,)),
    "logistic": logistic,
    "schools": schools,
    "gaussian": gaussian,
}
