"""A ResNet-20 on CIFAR-10 images: Laplace by 16 draws in bounded memory, with its wall time.

    python -m benchmarks.images.resnet --images 2000 --steps 64 --batch 32
    python -m benchmarks.images.page

The 10,000 test images of CIFAR-10 are split: the first `--images` to train on, the last `--test` held out. Batch norm
is in eval mode, its gains and offsets are constants. Rows: the trained network; Kronecker-factored Laplace with one
prior precision by its evidence; `SampledLaplace` with that precision (the declared one where that row failed), by
stochastic descent on minibatches. Foreign images: German traffic signs, where their file is in the data cache. The
peak memory of a row is right where its process makes no other: `--rows sampled --weights FILE`. On a graphics card
(`--device cuda`) raise `--images`, `--epochs`, `--steps` and `--batch`.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from benchmarks.images.networks import Recipe, resnet, train
from benchmarks.images.records import RESULTS, Fitted, Images, determined, rounded, run
from benchmarks.records import keep
from bnn_models import bayesianize, likelihoods, priors
from bnn_models.wrap import BayesianModule
from bnn_zoo.data import DataError, load
from bnn_zoo.data.entries import DataFile
from bnn_zoo.data.store import cache_dir, checked_arrays
from inference import MAP, DrawsPosterior, GaussianPosterior, KroneckerLaplace, SampledLaplace, tune_prior
from inference.posterior import Posterior
from inference.target import compile_target

ROWS = ("map", "kronecker_tuned", "sampled")
TRAFFIC_SIGNS = DataFile(
    path="images/gtsrb_test3k_32.npz",
    sha256="dd5f7eda6d714cd2b2fc7198f31465c8dc5e9bc7a2f1fdadaf39ded958e30fa0",
    arrays_sha256="",
)


@dataclass(frozen=True)
class Options:
    """Sizes of the study.

    Attributes:
        epochs: Of training.
        steps: Of stochastic descent.
        batch: Images per step.
        draws: Posterior draws k.
        precision: Declared prior precision, which is also the weight decay of training.
        blocks: Blocks per stage; 3 makes ResNet-20.
        width: Channels of the first stage; 16 makes ResNet-20.
        weights: File that keeps the trained weights between runs; None to train every time.
    """

    epochs: int = 6
    steps: int = 64
    batch: int = 32
    draws: int = 16
    precision: float = 4.0
    blocks: int = 3
    width: int = 16
    weights: Path | None = None


class Trial:
    """The trained network, and one posterior for each row.

    Args:
        images: The images.
        options: Sizes.
        out: Folder of the records: the prior that one row chose is read from there by another.
        seed: Of everything.
    """

    def __init__(self, images: Images, options: Options, out: Path, seed: int = 0) -> None:
        self.images, self.options, self.out, self.seed = images, options, out, seed
        self.seconds: dict[str, float] = {}

    def record(self, row: str) -> dict[str, Any]:
        """Make one record.

        Args:
            row: One of ``ROWS``.

        Returns:
            The record, with the most memory that the process has held.
        """
        made = run("resnet", row, self.images, self.seed, self.fit)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        sizes = {name: value for name, value in vars(self.options).items() if name != "weights"}
        made["environment"]["device"] = str(self.images.x.device)
        if row == "map" and "settings" in made:
            made["settings"] = repr(self._recipe)  # no backend trained it
        return rounded(made | {"process_peak_mib": peak, "sizes": sizes})

    def fit(self, row: str) -> Fitted:
        """Fit one row.

        Args:
            row: One of ``ROWS``.

        Returns:
            The posterior.
        """
        posterior, seconds = {"map": self._map, "kronecker_tuned": self._kronecker, "sampled": self._sampled}[row]()
        return Fitted(posterior, self.seconds | seconds)

    @cached_property
    def net(self) -> nn.Sequential:
        """The trained network."""
        options, images = self.options, self.images
        net = resnet(self.seed, options.blocks, options.width).to(images.x.device)
        if options.weights is not None and options.weights.is_file():
            kept = torch.load(options.weights, weights_only=True)
            net.load_state_dict(kept["state"])
            self.seconds["network"] = kept["seconds"]
            return net.eval()
        self.seconds["network"] = train(net, images.x, images.y, self._recipe)
        if options.weights is not None:
            torch.save({"state": net.state_dict(), "seconds": self.seconds["network"]}, options.weights)
        return net

    @property
    def _recipe(self) -> Recipe:
        return Recipe(self.options.epochs, precision=self.options.precision, seed=self.seed)

    def _map(self) -> tuple[Posterior, dict[str, float]]:
        model = model_of(self.net, self.options.precision)
        target = compile_target(model, self.images.x, self.images.y, batch_size=self.options.batch)
        return DrawsPosterior(target, self._weights()[None, None], backend=MAP()), {}

    def _kronecker(self) -> tuple[Posterior, dict[str, float]]:
        model = model_of(self.net, self.options.precision)
        backend = KroneckerLaplace(start=None, polish_steps=0, progress=False)
        base = backend.fit(model, self.images.x, self.images.y, seed=self.seed)
        assert isinstance(base, GaussianPosterior)
        began = time.perf_counter()
        tuned = tune_prior(base, groups="all", seed=self.seed)
        posterior = tuned.posterior
        posterior.info.extra |= {
            "prior_precision": {"all": float(tuned.log_precision.exp())},
            "log_evidence": [tuned.log_evidence_before, tuned.log_evidence],
            "determined": float(tuned.effective_parameters.sum()),
        }
        return posterior, {"fit": base.info.seconds, "prior": time.perf_counter() - began}

    def _sampled(self) -> tuple[Posterior, dict[str, float]]:
        options = self.options
        precision = self._chosen_precision()
        backend = SampledLaplace(
            num_samples=options.draws,
            num_steps=options.steps,
            batch_size=options.batch,
            start=None,
            compile=False,
            progress=False,
        )
        model = model_of(self.net, precision)
        busy = time.process_time()
        found = backend.fit(model, self.images.x, self.images.y, seed=self.seed)
        busy = time.process_time() - busy
        passes = {"passes_of_descent": options.steps * options.batch / len(self.images.x)}
        found.info.extra |= {"prior_precision": {"all": precision}, **determined(found), **passes}
        return found, {"fit": found.info.seconds, "fit_processor": busy}

    def _chosen_precision(self) -> float:
        path = self.out / f"resnet-{self.seed}-kronecker_tuned.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        return record["extra"]["prior_precision"]["all"] if "extra" in record else self.options.precision

    def _weights(self) -> Tensor:
        model = model_of(self.net, self.options.precision)
        return parameters_to_vector(list(model.initial_sites().values()))


def model_of(net: nn.Module, precision: float) -> BayesianModule:
    """A network whose weights have a Gaussian prior, and whose batch norm is a constant.

    Args:
        net: The network, in eval mode.
        precision: Of the prior.

    Returns:
        The model.
    """
    constant = {f"{prefix}.*": None for prefix, module in net.named_modules() if isinstance(module, nn.BatchNorm2d)}
    prior = {**constant, "*": priors.Normal(scale=precision**-0.5)}
    return bayesianize(net, prior, likelihoods.Categorical(10))


def load_images(num: int, num_test: int, device: str) -> Images:
    """The images of the study.

    Args:
        num: Training images, from the front.
        num_test: Held-out images, from the end; as many traffic signs.
        device: Where to.

    Returns:
        The images.

    Raises:
        ValueError: If there are not so many.
    """
    data = load("cifar10_test")
    total = len(data.x_test)
    if num + num_test > total:
        raise ValueError(
            f"expected at most {total:,} training and held-out images together, got {num:,} + {num_test:,}"
        )
    x = data.x_test.reshape(-1, *data.input_shape).to(device)
    y = data.y_test.to(device)
    foreign = {}
    path = cache_dir() / TRAFFIC_SIGNS.path
    if path.is_file():
        pixels = torch.as_tensor(checked_arrays(path, TRAFFIC_SIGNS)["x"][:num_test])
        signs = (pixels.float().flatten(1) / 255 - data.x_mean) / data.x_std
        foreign["gtsrb"] = signs.reshape(-1, *data.input_shape).to(device)
    return Images("cifar10", x[:num], y[:num], x[total - num_test :], y[total - num_test :], foreign)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the records that are not there yet.

    Args:
        arguments: Of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Options()
    parser.add_argument("--rows", default=",".join(ROWS), help="rows, separated by commas (%(default)s)")
    parser.add_argument("--images", type=int, default=2_000, help="training images (%(default)s)")
    parser.add_argument("--test", type=int, default=500, help="held-out images (%(default)s)")
    parser.add_argument("--epochs", type=int, default=default.epochs, help="of training (%(default)s)")
    parser.add_argument("--steps", type=int, default=default.steps, help="of stochastic descent (%(default)s)")
    parser.add_argument("--batch", type=int, default=default.batch, help="images per step (%(default)s)")
    parser.add_argument("--draws", type=int, default=default.draws, help="posterior draws (%(default)s)")
    parser.add_argument("--precision", type=float, default=default.precision, help="of the prior (%(default)s)")
    parser.add_argument("--device", default="cpu", help="such as cuda (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (%(default)s)")
    parser.add_argument("--weights", type=Path, help="file that keeps the trained weights, so that a run can go on")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    given = parser.parse_args(arguments)
    unknown = [row for row in given.rows.split(",") if row not in ROWS]
    if unknown:
        parser.error(f"expected some of {', '.join(ROWS)}, got {', '.join(unknown)}")
    torch.set_num_threads(given.threads)
    try:
        images = load_images(given.images, given.test, given.device)
    except (DataError, ValueError) as error:
        parser.error(str(error))
    options = Options(given.epochs, given.steps, given.batch, given.draws, given.precision, weights=given.weights)
    trial = Trial(images, options, given.out)
    for row in given.rows.split(","):
        keep(given.out / f"resnet-{trial.seed}-{row}.json", lambda row=row: trial.record(row))


if __name__ == "__main__":
    main()
