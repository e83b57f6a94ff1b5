"""Samplers against each other, each in a process of its own: `python -m benchmarks.samplers`."""
