"""What `--help` says of each command, in Markdown."""

FIT = """Fit one backend and save its posterior.

**Examples**

- `bnn-zoo fit nuts --data yacht --out runs/yacht-nuts`

- `bnn-zoo fit swag --csv houses.csv --target price --set swag.max_rank=10 --out runs/houses`
"""

PREDICT = """Predict new rows with a saved posterior: CSV in, CSV out, in original units and in the same order.

A regression gives mean, stddev (noise included), lower and upper, and epistemic_stddev; classes give a label and
the probability of each.

**Example**

- `bnn-zoo predict runs/houses new_houses.csv --level 0.8 --out prices.csv`
"""

DIAGNOSE = """Say whether to trust a saved posterior: R-hat, ESS and standard errors of predictions and weights,
divergences, acceptance, step size and BFMI of each chain, k-hat, and warnings with the remedy.

`--align` also compares the weights after hidden units were matched between draws, which undoes the arbitrary numbering
of units by each chain.

**Example**

- `bnn-zoo diagnose runs/energy/posteriors/nuts --align`
"""

CHECK = """Hold a backend to the closed-form posterior of Bayesian linear regression with known noise.

The verdict is `exact`, `biased as documented` (the known bias of the method, with the number it should have), or
`wrong`; then the command ends with code 1.

With `--sbc`: draw weights from the prior and data from the likelihood, fit, and rank the true weights and function
values among the posterior draws, a few hundred times. Ranks of an exact method are `uniform`; `NOT UNIFORM` of one that
promises the posterior ends with code 1. Methods with a documented bias are expected to fail, with the shape that
it has: too narrow, too wide, shifted.

**Examples**

- `bnn-zoo check nuts`

- `bnn-zoo check mean_field_vi --set mean_field_vi.num_steps=20000`

- `bnn-zoo check --sbc --backends nuts,mean_field_vi,map --replicates 200 --out runs/sbc`

- `bnn-zoo check nuts --sbc --model mlp --jobs 2`
"""

COMPARE = """Fit several backends to one model on one data set and say which to trust.

Prints two tables and writes `results.json`, `report.html`, plots, a NetCDF file for ArviZ and the saved posterior
of every backend. A backend that fails is a row that says why. After Ctrl-C the same command goes on where it stopped.

**Examples**

- `bnn-zoo compare --data energy --budget demo --out runs/energy`

- `bnn-zoo compare --csv houses.csv --target price --backends map,swag,nuts --out runs/houses`

- `bnn-zoo compare --data moons --backends deep_ensemble,nuts --set nuts.num_samples=500 --out runs/moons`
"""
