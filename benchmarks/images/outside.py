"""LeNet on MNIST and Fashion-MNIST: Laplace and an ensemble beside the mode, and images of other kinds.

    python -m benchmarks.images.outside --images 10000 --test 2000 --seeds 1
    python -m benchmarks.images.page

One JSON record for each data set, seed and row in `benchmarks/results/images/`; one that exists is kept. Foreign images
are standardised like the training images. Needs mnist, fashion_mnist and notmnist in the data cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from benchmarks.images.networks import lenet
from benchmarks.images.records import RESULTS, Fitted, Images, determined, run
from benchmarks.records import keep
from bnn_models import bayesianize, likelihoods, priors
from bnn_models.wrap import BayesianModule
from bnn_zoo.data import Dataset, load
from inference import (
    MAP,
    Backend,
    DeepEnsemble,
    DenseLaplace,
    GaussianPosterior,
    KroneckerLaplace,
    SampledLaplace,
    Subset,
    tune_prior,
)
from inference.posterior import Posterior

DATA = ("mnist", "fashion_mnist")
FOREIGN = {"mnist": ("notmnist", "fashion_mnist"), "fashion_mnist": ("notmnist", "mnist")}
ROWS = (
    "map",
    "kronecker",
    "kronecker_tuned",
    "kronecker_tuned_probit",
    "last_layer_tuned",
    "sampled",
    "sampled_em",
    "ensemble",
)
LAST_LAYER = "11.*"
PRECISION = 10.0
MEMBERS, DRAWS, ROUNDS = 5, 8, 2


@dataclass(frozen=True)
class Sizes:
    """What the rows cost.

    Attributes:
        steps: Steps of the mode and of every member.
        sampled_steps: Steps of stochastic descent for each set of draws.
        batch: Images per step.
    """

    steps: int = 1500
    sampled_steps: int = 300
    batch: int = 128


class Trial:
    """One data set and seed: what several rows need is made once.

    Args:
        images: The images.
        sizes: What the rows cost.
        seed: Of everything.
    """

    def __init__(self, images: Images, sizes: Sizes, seed: int) -> None:
        self.images, self.sizes, self.seed = images, sizes, seed

    def fit(self, row: str) -> Fitted:
        """Fit one row.

        Args:
            row: One of ``ROWS``.

        Returns:
            The posterior.
        """
        makers: dict[str, Callable[[], Fitted]] = {
            "map": lambda: Fitted(self.mode, self._cost()),
            "kronecker": lambda: Fitted(self.kronecker, self._cost(self.kronecker)),
            "kronecker_tuned": lambda: self.kronecker_tuned,
            "kronecker_tuned_probit": lambda: replace(self.kronecker_tuned, link="probit"),
            "last_layer_tuned": self._last_layer,
            "sampled": lambda: self._sampled(0),
            "sampled_em": lambda: self._sampled(ROUNDS),
            "ensemble": self._ensemble,
        }
        return makers[row]()

    @cached_property
    def model(self) -> BayesianModule:
        """The network with its prior."""
        return model_of(lenet(self.seed))

    @cached_property
    def mode(self) -> Posterior:
        """The trained network."""
        sizes = self.sizes
        backend = MAP(
            num_steps=sizes.steps, step_size=2e-3, batch_size=sizes.batch, polish=False, compile=False, progress=False
        )
        return backend.fit(self.model, self.images.x, self.images.y, seed=self.seed)

    @cached_property
    def kronecker(self) -> GaussianPosterior:
        """Kronecker Laplace at the trained network."""
        return self._laplace(KroneckerLaplace(start=None, polish_steps=0, progress=False))

    @cached_property
    def kronecker_tuned(self) -> Fitted:
        """The same with one prior precision for each tensor, by the evidence."""
        return self._tuned(self.kronecker)

    def _laplace(self, backend: Backend) -> GaussianPosterior:
        found = backend.fit(self.model, self.images.x, self.images.y, seed=self.seed, init=self.mode)
        assert isinstance(found, GaussianPosterior)
        return found

    def _last_layer(self) -> Fitted:
        backend = DenseLaplace(start=None, polish_steps=0, progress=False)
        return self._tuned(self._laplace(Subset(backend, sites=LAST_LAYER, rest=None)))

    def _tuned(self, base: GaussianPosterior) -> Fitted:
        began = time.perf_counter()
        tuned = tune_prior(base, groups="site", seed=self.seed)
        posterior = tuned.posterior
        seconds = time.perf_counter() - began
        posterior.info.extra |= {
            "prior_precision": {name: float(value.mean()) for name, value in tuned.prior_precision.items()},
            "log_evidence": [tuned.log_evidence_before, tuned.log_evidence],
            "determined": float(tuned.effective_parameters.sum()),
        }
        return Fitted(posterior, self._cost(base) | {"prior": seconds})

    def _cost(self, posterior: Posterior | None = None) -> dict[str, float]:
        network = {"network": self.mode.info.seconds}
        return network if posterior is None else network | {"fit": posterior.info.seconds}

    def _sampled(self, rounds: int) -> Fitted:
        backend = SampledLaplace(
            num_samples=DRAWS,
            em_rounds=rounds,
            num_steps=self.sizes.sampled_steps,
            batch_size=self.sizes.batch,
            start=None,
            compile=False,
            progress=False,
        )
        model, mode = self.model, self.mode
        busy = time.process_time()
        found = backend.fit(model, self.images.x, self.images.y, seed=self.seed, init=mode)
        busy = time.process_time() - busy
        passes = {"passes_of_descent": self.sizes.sampled_steps * self.sizes.batch / len(self.images.x)}
        found.info.extra |= determined(found) | passes
        return Fitted(found, self._cost(found) | {"fit_processor": busy})

    def _ensemble(self) -> Fitted:
        sizes = self.sizes
        backend = DeepEnsemble(
            num_members=MEMBERS,
            num_steps=sizes.steps,
            step_size=2e-3,
            batch_size=sizes.batch,
            compile=False,
            progress=False,
        )
        # The first member would start at the trained weights of the model's network: all of them start untrained.
        nets = [lenet(1000 * self.seed + member) for member in range(MEMBERS)]
        start = torch.stack([parameters_to_vector(net.parameters()).detach() for net in nets])
        found = backend.fit(self.model, self.images.x, self.images.y, seed=self.seed, init=start)
        return Fitted(found, {"network": found.info.seconds})


def model_of(net: nn.Module) -> BayesianModule:
    """A network with the prior of the study on all of its weights."""
    return bayesianize(net, priors.Normal(scale=PRECISION**-0.5), likelihoods.Categorical(10))


def load_images(name: str, num: int, num_test: int) -> Images:
    """The first images of a data set, and those of others.

    Args:
        name: "mnist" or "fashion_mnist".
        num: Training images.
        num_test: Test images, and foreign images of each kind.

    Returns:
        The images.
    """
    data = load(name)
    foreign = {other: restandardised(load(other), data)[:num_test] for other in FOREIGN[name]}
    shape = (-1, *data.input_shape)
    return Images(
        name,
        data.x_train[:num].reshape(shape),
        data.y_train[:num],
        data.x_test[:num_test].reshape(shape),
        data.y_test[:num_test],
        {other: x.reshape(shape) for other, x in foreign.items()},
    )


def restandardised(other: Dataset, data: Dataset) -> Tensor:
    """Test inputs of one data set, standardised with the moments of another.

    Args:
        other: Whose test inputs.
        data: Whose moments.

    Returns:
        (N_test, D), every class represented early: foreign sets may be sorted by class.
    """
    x = (other.inputs_original(other.x_test) - data.x_mean) / data.x_std
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the records that are not there yet.

    Args:
        arguments: Of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=",".join(DATA), help="names, separated by commas (%(default)s)")
    parser.add_argument("--rows", default=",".join(ROWS), help="rows, separated by commas (%(default)s)")
    parser.add_argument("--images", type=int, default=10_000, help="training images (%(default)s)")
    parser.add_argument("--test", type=int, default=2_000, help="test images, and of each foreign kind (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to this minus 1 (%(default)s)")
    parser.add_argument("--steps", type=int, default=Sizes.steps, help="of each network's training (%(default)s)")
    parser.add_argument("--sampled-steps", type=int, default=Sizes.sampled_steps, help="of each descent (%(default)s)")
    parser.add_argument("--batch", type=int, default=Sizes.batch, help="images per step (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args(arguments)
    for value, known in ((options.data, DATA), (options.rows, ROWS)):
        unknown = [name for name in value.split(",") if name not in known]
        if unknown:
            parser.error(f"expected some of {', '.join(known)}, got {', '.join(unknown)}")
    torch.set_num_threads(1)
    sizes = Sizes(options.steps, options.sampled_steps, options.batch)
    for seed in range(options.seeds):
        for name in options.data.split(","):
            trial = Trial(load_images(name, options.images, options.test), sizes, seed)
            for row in options.rows.split(","):
                path = options.out / f"outside-{name}-{seed}-{row}.json"
                keep(path, lambda trial=trial, row=row: run("outside", row, trial.images, trial.seed, trial.fit))


if __name__ == "__main__":
    main()
