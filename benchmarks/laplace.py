"""Task "laplace": fit, predictive and prior tuning of the Laplace family against laplace-torch, with the same weights.

An MLP 784-256-256-10 (tanh) and a LeNet (relu), trained for two epochs on 10,000 MNIST images; 1,000 test images to
predict. Each peer runs at the best of a few batch sizes. Its predictive with all weights costs 20 to 140 ms an image,
so it gets 20 images and its time is multiplied by 50: its cost is proportional to their number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from benchmarks.environments import PeerProcess, start
from benchmarks.measure import Case, Contestant, NotRun, Settings, Versus
from benchmarks.problems import mnist, random_images
from bnn_models import bayesianize, likelihoods, priors
from bnn_models.wrap import BayesianModule
from bnn_zoo.data import load
from inference import Backend, DenseLaplace, DiagonalLaplace, GaussianPosterior, KroneckerLaplace, Subset, tune_prior

PRECISION = 10.0
EPOCHS, BATCH = 2, 128
PROBES, FEW = 10, 20
OURS = "ours"
_BIASES = (
    "The variances differ because laplace-torch gives a layer's bias a block of its own, so that it neglects its "
    "covariance with the weights; on one linear layer with Gaussian noise the joint block is the exact posterior "
    "(tests/inference/laplace/test_kronecker.py). Without biases both agree, below."
)


@dataclass(frozen=True)
class Network:
    """A trained network and its data.

    Attributes:
        kind: "mlp", "mlp without biases" or "lenet".
        net: The network.
        x: Training inputs.
        y: Labels.
        inputs: Test inputs to predict.
    """

    kind: str
    net: nn.Sequential
    x: Tensor
    y: Tensor
    inputs: Tensor

    @property
    def name(self) -> str:
        """What the tables call it."""
        return {"mlp": "MLP 784-256-256-10", "lenet": "LeNet"}.get(self.kind, "MLP 784-256-256-10 without biases")

    @property
    def last(self) -> str:
        """Pattern of the sites of the last layer."""
        return f"{len(self.net) - 1}.*"

    def model(self) -> BayesianModule:
        """The network with its prior."""
        return bayesianize(self.net, priors.Normal(scale=PRECISION**-0.5), likelihoods.Categorical(10))

    def peer(self, task: str, structure: str, backend: str, batch: int, predict_batch: int, few: bool) -> PeerProcess:
        """laplace-torch on this network."""
        inputs = self.inputs[:FEW] if few else self.inputs
        # What a prediction costs does not depend on how many data the fit had.
        rows = slice(0, 500) if task == "predict" else slice(None)
        return start(
            "laplace-torch",
            task,
            kind=self.kind.split()[0],
            bias="without" not in self.kind,
            theta=parameters_to_vector(self.net.parameters()).detach().numpy(),
            x=self.x[rows].numpy(),
            y=self.y[rows].numpy(),
            inputs=inputs.numpy(),
            probes=self.inputs[:PROBES].numpy(),
            structure=structure,
            backend=backend,
            batch=batch,
            predict_batch=predict_batch,
            precision=PRECISION,
        )


@dataclass(frozen=True)
class Structure:
    """One form of the approximation, ours and the peer's.

    Attributes:
        name: The peer's name of it.
        backend: Ours.
        goals: Least ratios wanted: fit and predictive.
        fits: The peer's backends for the fit, with their batch sizes.
        predict_batch: The peer's best batch size for predicting.
        few: Whether the peer predicts 20 images instead of 1,000.
    """

    name: str
    backend: Callable[[Network], Backend]
    goals: dict[str, tuple[float, float]]
    fits: tuple[tuple[str, int], ...]
    predict_batch: int
    few: bool


def _alone(**fields: Any) -> dict[str, Any]:
    # The weights are trained: no search for a mode.
    return {"start": None, "polish_steps": 0, "progress": False, **fields}


STRUCTURES = (
    Structure(
        "kron",
        lambda network: KroneckerLaplace(**_alone()),
        {"mlp": (2.0, 500.0), "lenet": (1.0, 15.0)},
        (("default", 100), ("default", 1000)),
        10,
        True,
    ),
    Structure(
        "diag",
        lambda network: DiagonalLaplace(**_alone()),
        {"mlp": (1.0, 150.0), "lenet": (1.0, 5.0)},
        (("backpack", 100), ("backpack", 500)),
        10,
        True,
    ),
    Structure(
        "last",
        lambda network: Subset(DenseLaplace(**_alone()), sites=network.last, rest=None),
        {"mlp": (1.0, 10.0), "lenet": (1.0, 10.0)},
        (("default", 500),),
        500,
        False,
    ),
)


def trained(kind: str, num: int) -> Network | None:
    """A network trained on the first images of MNIST; None without MNIST.

    Args:
        kind: As in `Network`.
        num: Training images.

    Returns:
        The network with its data.
    """
    problem = mnist((256, 256), num)
    if problem is None:
        return None
    return train(kind, problem.x, problem.y, load("mnist").x_test[:1000], EPOCHS)


def train(kind: str, x: Tensor, y: Tensor, inputs: Tensor, epochs: int) -> Network:
    """A network of torch's initial weights, trained by Adam.

    Args:
        kind: As in `Network`.
        x: Flat training images.
        y: Labels.
        inputs: Flat test images.
        epochs: Passes over the training images.

    Returns:
        The network with its data.
    """
    torch.manual_seed(0)
    bias = "without" not in kind
    if kind == "lenet":
        x, inputs = x.reshape(-1, 1, 28, 28), inputs.reshape(-1, 1, 28, 28)
        net = nn.Sequential(
            *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
            nn.Linear(84, 10),
        )
    else:
        net = nn.Sequential(
            *(nn.Linear(784, 256, bias), nn.Tanh(), nn.Linear(256, 256, bias), nn.Tanh()), nn.Linear(256, 10, bias)
        )
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimiser.step()
    return Network(kind, net, x, y, inputs)


def cases(settings: Settings) -> Iterator[Case | NotRun]:
    """Fit, predictive and tuning for each network and structure."""
    if settings.quick:
        problem = random_images((256, 256), 200)
        yield _fit(train("mlp", problem.x, problem.y, problem.x[:PROBES], epochs=1), STRUCTURES[0], settings)
        return
    for kind in ("mlp", "lenet", "mlp without biases"):
        network = trained(kind, 10_000)
        if network is None:
            yield NotRun(kind, "MNIST is not in the data cache (`bnn-zoo data get mnist`, or BNN_ZOO_DATA)")
            continue
        for structure in STRUCTURES if kind != "mlp without biases" else STRUCTURES[:1]:
            yield _fit(network, structure, settings)
            if kind != "mlp without biases":
                yield _predict(network, structure, settings)
                if (kind, structure.name) == ("mlp", "last"):
                    yield NotRun(f"{network.name}, last: one prior precision", "a minute and more for the peer")
                else:
                    yield _tune(network, structure, settings)


def _posterior(network: Network, structure: Structure) -> GaussianPosterior:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two epochs of training do not end at a mode, and laplace-torch does not look
        found = structure.backend(network).fit(network.model(), network.x, network.y)
    assert isinstance(found, GaussianPosterior)
    return found


def _variances(posterior: GaussianPosterior, inputs: Tensor) -> Tensor:
    """Ours, of log probabilities: a Categorical's logits are normalised."""
    return posterior.function_covariance(inputs).reshape(len(inputs) * 10, -1).diagonal().double()


def _normalised(network: Network, covariances: list[float]) -> Tensor:
    """Variances of log probabilities from covariances of the network's outputs."""
    with torch.no_grad():
        probs = network.net(network.inputs[:PROBES]).double().softmax(-1)
    jacobian = torch.eye(10) - probs.unsqueeze(1)  # of log softmax
    moved = jacobian @ torch.tensor(covariances, dtype=torch.float64).view(-1, 10, 10) @ jacobian.mT
    return moved.diagonal(dim1=1, dim2=2).flatten()


def _fit(network: Network, structure: Structure, settings: Settings) -> Case:
    posterior = _posterior(network, structure)
    ours = Contestant(OURS, lambda: _posterior(network, structure))
    notes, agreement = [], {}
    contestants, ratios = [ours], []
    goal = structure.goals.get(network.kind, (None, None))[0]
    for backend, batch in structure.fits if settings.foreign else ():
        peer = network.peer("fit", structure.name, backend, batch, structure.predict_batch, structure.few)
        name = f"laplace-torch, {backend} backend, batch {batch}"
        contestants.append(Contestant(name, timer=peer.seconds, build_seconds=peer.build_seconds))
        ratios.append(Versus(name, OURS, goal))
        *theirs, added = peer.result
        mine = _variances(posterior, network.inputs[:PROBES])
        difference = (_normalised(network, theirs) / mine - 1).abs()
        agreement[f"relative difference of log probabilities' variances, {backend}, median"] = float(
            difference.median()
        )
        agreement[f"the largest, {backend}"] = float(difference.max())
        notes.append(f"{name} added {added:.0f} MiB.")
    if structure.name == "kron" and "without" not in network.kind:
        notes.append(_BIASES)
    return Case(f"{network.name}, {structure.name}: fit to {len(network.x):,} images", "s", "fit", contestants, ratios,
                agreement, notes)  # fmt: skip


def _predict(network: Network, structure: Structure, settings: Settings) -> Case:
    posterior = _posterior(network, structure)
    calls = [Contestant(OURS, lambda: posterior.predict(network.inputs, link="probit"))]
    calls[0].call()
    ratios, notes = [], []
    if settings.foreign:
        batch = structure.predict_batch
        peer = network.peer("predict", structure.name, "default", 100, batch, structure.few)
        name = f"laplace-torch, batch {batch}"
        scale = len(network.inputs) / FEW if structure.few else 1.0
        calls.append(Contestant(name, timer=lambda num: scale * peer.seconds(num)))
        ratios.append(Versus(name, OURS, structure.goals[network.kind][1]))
        notes.append(f"{name} added {peer.result[-1]:.0f} MiB.")
        if structure.few:
            notes.append(f"Its time is that for {FEW} images times {scale:g}.")
    return Case(f"{network.name}, {structure.name}: probit predictive of {len(network.inputs):,} images", "s",
                "prediction", calls, ratios, {}, notes)  # fmt: skip


def _tune(network: Network, structure: Structure, settings: Settings) -> Case:
    posterior = _posterior(network, structure)
    found: dict[str, float] = {}

    def ours() -> None:
        tuned = tune_prior(posterior, groups="all")
        found[OURS] = float(next(iter(tuned.prior_precision.values())))

    contestants, ratios, agreement = [Contestant(OURS, ours)], [], {}
    ours()
    if settings.foreign:
        peer = network.peer("tune", structure.name, *structure.fits[0], structure.predict_batch, structure.few)
        contestants.append(Contestant("laplace-torch, marglik", timer=peer.seconds))
        ratios.append(Versus("laplace-torch, marglik", OURS, 1.0))
        agreement["prior precision, laplace-torch after its 100 steps"] = peer.result[0]
    agreement["prior precision, ours"] = found[OURS]
    return Case(f"{network.name}, {structure.name}: one prior precision by the evidence", "s", "tuning", contestants,
                ratios, agreement, [])  # fmt: skip
