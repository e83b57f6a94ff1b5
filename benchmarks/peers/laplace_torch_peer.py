"""laplace-torch as a peer: started with a task and a file of arrays, then times as many calls as each line asks for.

Runs in an environment of its own and imports nothing of bnn-zoo. The networks come with trained weights. A network that
BackPACK has extended makes the other backends raise, so that each process has one backend only.
"""

import json
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from laplace import Laplace
from laplace.curvature import BackPackGGN, CurvlinopsGGN
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BACKENDS = {"backpack": BackPackGGN, "curvlinops": CurvlinopsGGN, "default": None}


def network(p):
    """The network with the weights of the file, in the order of its parameters."""
    if p["kind"] == "lenet":
        net = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
        )  # fmt: skip
    else:
        bias = bool(p["bias"])
        net = nn.Sequential(
            nn.Linear(784, 256, bias), nn.Tanh(), nn.Linear(256, 256, bias), nn.Tanh(), nn.Linear(256, 10, bias)
        )
    start = 0
    for parameter in net.parameters():
        parameter.data = torch.from_numpy(p["theta"][start : start + parameter.numel()]).view_as(parameter).clone()
        start += parameter.numel()
    return net


def laplace_of(p):
    """The approximation before its fit."""
    backend = BACKENDS[str(p["backend"])]
    return Laplace(
        network(p),
        "classification",
        subset_of_weights="last_layer" if p["structure"] == "last" else "all",
        hessian_structure={"last": "full"}.get(str(p["structure"]), str(p["structure"])),
        prior_precision=float(p["precision"]),
        **({} if backend is None else {"backend": backend}),
    )


def loader_of(p):
    """The training data at this contestant's batch size."""
    data = TensorDataset(torch.from_numpy(p["x"]), torch.from_numpy(p["y"]))
    return DataLoader(data, batch_size=int(p["batch"]))


def fit(p):
    """One fit to all the data handed over; compared are the covariances of the logits at the probes."""
    loader, found = loader_of(p), {}

    def call():
        found["la"] = laplace_of(p)
        found["la"].fit(loader)

    return call, lambda: covariances(found["la"], p)


def tune(p):
    """The prior precision from the marginal likelihood; compared is the precision."""
    la = laplace_of(p)
    la.fit(loader_of(p))

    def call():
        la.prior_precision = float(p["precision"])
        la.optimize_prior_precision(pred_type="glm", method="marglik")

    return call, lambda: la.prior_precision.reshape(-1)


def predict(p):
    """Class probabilities of the inputs handed over, by batches; compared are the covariances at the probes."""
    la, batches = laplace_of(p), torch.from_numpy(p["inputs"]).split(int(p["predict_batch"]))
    la.fit(loader_of(p))

    def call():
        for inputs in batches:
            la(inputs, pred_type="glm", link_approx="probit")

    return call, lambda: covariances(la, p)


def covariances(la, p):
    """Covariances of the logits at the probes, flat."""
    found = [la._glm_predictive_distribution(x)[1] for x in torch.from_numpy(p["probes"]).split(5)]
    return torch.cat(found).reshape(-1)


def main() -> None:
    """Build, call once, say so, and answer orders until the input ends."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    task, path = sys.argv[1:]
    start = time.perf_counter()
    call, result = {"fit": fit, "tune": tune, "predict": predict}[task](dict(np.load(path)))
    added = added_peak(call)
    ready = {
        "build_seconds": time.perf_counter() - start,
        "result": [*result().detach().double().tolist(), added],
        "versions": {
            name: version(name) for name in ("laplace-torch", "backpack-for-pytorch", "curvlinops-for-pytorch")
        },
    }
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            call()
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


def added_peak(call) -> float:
    """Most resident memory that a call adds, MiB; the kernel's mark is reset before it."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))


if __name__ == "__main__":
    main()
