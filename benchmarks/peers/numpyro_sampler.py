"""NumPyro's NUTS as a contestant: started with a specification and arrays, one fit for each line of JSON it reads.

NumPyro compiles its loop again at every call without a progress bar, so compiling and running are timed apart.
"""

import json
import os
import sys
import time

with open(sys.argv[1]) as file:
    SPECIFICATION = json.load(file)
if SPECIFICATION["threads"] == 1:
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import numpyro.util
from jax_densities import functions, layers, network
from numpyro.infer import MCMC, NUTS

_compiling = [0.0]
_maybe_jit = numpyro.util.maybe_jit


def split_jit(fn, static_argnums=(), **keywords):
    """NumPyro's jit of its loop, with the seconds of compiling added up."""
    if getattr(fn, "__name__", "") != "_fori_collect_loop":
        return _maybe_jit(fn, **keywords)

    def call(*args):
        start = time.perf_counter()
        compiled = jax.jit(fn, static_argnums=static_argnums, **keywords).lower(*args).compile()
        _compiling[0] += time.perf_counter() - start
        return jax.block_until_ready(compiled(*[a for i, a in enumerate(args) if i not in static_argnums]))

    return call


def model_of(kind, p):
    """The density as a NumPyro model of x and y."""

    def mlp(x, y):
        sizes, values = p["sizes"].tolist(), {}
        for name, shape in layers(sizes):
            scale = shape[1] ** -0.5 if len(shape) == 2 else 1.0
            values[name] = numpyro.sample(name, dist.Normal(0.0, scale).expand(shape).to_event(len(shape)))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(network(values, x, sizes), float(p["noise"])), obs=y)

    def logistic(x, y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)

    def schools(x, y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        eta = numpyro.sample("eta", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(mu + tau * eta, x), obs=y)

    def linear(x, y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    return {"mlp": mlp, "logistic": logistic, "schools": schools, "linear": linear}[kind]


def main() -> None:
    """Build, say so, and answer orders until the input ends."""
    p, options = np.load(SPECIFICATION["arrays"]), SPECIFICATION["options"]
    kind = SPECIFICATION["kind"]
    x, y = jnp.asarray(p["x"]), jnp.asarray(p["y"])
    numpyro.util.maybe_jit = split_jit
    mcmc = MCMC(
        NUTS(model_of(kind, p), max_tree_depth=options["max_tree_depth"]),
        num_warmup=options["warmup_steps"],
        num_samples=options["num_samples"],
        num_chains=options["num_chains"],
        chain_method="vectorized",
        progress_bar=False,
    )
    judged, fields = functions(kind, p), ("num_steps", "diverging")
    print(json.dumps({"versions": {"numpyro": numpyro.__version__, "jax": jax.__version__}}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        _compiling[0] = 0.0
        start = time.perf_counter()
        mcmc.warmup(jax.random.PRNGKey(order["seed"]), x, y, extra_fields=fields, collect_warmup=True)
        steps = float(mcmc.get_extra_fields()["num_steps"].sum())
        mcmc.run(mcmc.post_warmup_state.rng_key, x, y, extra_fields=fields)
        draws = jax.block_until_ready(mcmc.get_samples(group_by_chain=True))
        seconds = time.perf_counter() - start
        extra = mcmc.get_extra_fields()
        mcmc.post_warmup_state = None
        if kind == "schools":
            draws = {"mu": draws["mu"], "log_tau": jnp.log(draws["tau"]), "eta": draws["eta"]}
        np.save(order["path"], np.asarray(judged(draws), dtype=np.float64))
        answer = {
            "seconds": seconds,
            "sampling_seconds": seconds - _compiling[0],
            "gradients": steps + float(extra["num_steps"].sum()),
            "divergences": int(extra["diverging"].sum()),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
