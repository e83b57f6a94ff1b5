"""Every test runs in float64 on one thread, with a clean parameter store and Pyro's validation on."""

import signal
from collections.abc import Iterator

import pyro
import pytest
import torch

torch.set_num_threads(1)
# Shells start background jobs with Ctrl-C ignored, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _clean_state() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.enable_validation(True)
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
