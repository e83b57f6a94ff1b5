"""Ours against the peers, measured side by side: `python -m benchmarks.run`, then `python -m benchmarks.report`."""

import os

# Read by the numerical libraries when they load, so set before any of them is imported.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
    os.environ[_name] = "1"
