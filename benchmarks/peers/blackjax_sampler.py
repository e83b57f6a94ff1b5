"""BlackJAX's NUTS and MCLMC as contestants: one fit of one chain for each line of JSON it reads.

Everything is compiled at the first fit and reused. Chains are run one after another within a fit.
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

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from jax_densities import functions, log_density, shapes


def nuts(density, start, options):
    """Window adaptation, then NUTS; a compiled function of a key, giving draws, steps and divergences."""
    depth = options["max_tree_depth"]
    warm = blackjax.window_adaptation(blackjax.nuts, density, max_num_doublings=depth)

    def run(key):
        first, second, third = jax.random.split(key, 3)
        (state, parameters), info = warm.run(second, start(first), num_steps=options["warmup_steps"])
        kernel = blackjax.nuts(density, **({"max_num_doublings": depth} | parameters)).step

        def body(state, key):
            state, info = kernel(key, state)
            return state, (state.position, info.num_integration_steps, info.is_divergent)

        _, (draws, steps, divergent) = jax.lax.scan(body, state, jax.random.split(third, options["num_samples"]))
        warm_steps = getattr(info, "info", info).num_integration_steps
        return draws, steps.sum() + warm_steps.sum(), divergent.sum()

    return jax.jit(run)


def mclmc(density, start, options):
    """Tuning, then MCLMC with every `thinning`-th state kept; two new gradients a step."""
    steps, thinning = options["num_samples"] * options["thinning"], options["thinning"]
    kernel = blackjax.mclmc.build_kernel()

    def run(key):
        first, second, third, fourth = jax.random.split(key, 4)
        state = blackjax.mclmc.init(position=start(first), logdensity_fn=density, rng_key=second)
        state, tuned, tuning = blackjax.mclmc_find_L_and_step_size(
            mclmc_kernel=kernel,
            num_steps=options["warmup_steps"],
            state=state,
            rng_key=third,
            logdensity_fn=density,
            frac_tune1=0.4,
            frac_tune2=0.4,
            frac_tune3=0.2,
        )
        step = blackjax.mclmc(
            density, L=tuned.L, step_size=tuned.step_size, inverse_mass_matrix=tuned.inverse_mass_matrix
        ).step

        def several(state, key):
            state = jax.lax.scan(lambda s, k: (step(k, s)[0], None), state, jax.random.split(key, thinning))[0]
            return state, state.position

        _, draws = jax.lax.scan(several, state, jax.random.split(fourth, options["num_samples"]))
        return draws, 2 * (tuning + steps), 0

    return jax.jit(run)


def main() -> None:
    """Build, say so, and answer orders until the input ends."""
    p, options, kind = np.load(SPECIFICATION["arrays"]), SPECIFICATION["options"], SPECIFICATION["kind"]
    density, sites = log_density(kind, p), shapes(kind, p)
    judged = functions(kind, p)

    def start(key):
        keys = jax.random.split(key, len(sites))
        return {
            n: jax.random.uniform(k, s, minval=-2.0, maxval=2.0) for k, (n, s) in zip(keys, sites.items(), strict=True)
        }

    run = {"BlackJAX NUTS": nuts, "BlackJAX MCLMC": mclmc}[SPECIFICATION["sampler"]](density, start, options)
    print(json.dumps({"versions": {"blackjax": blackjax.__version__, "jax": jax.__version__}}), flush=True)
    building = 0.0
    for number, line in enumerate(sys.stdin):
        order = json.loads(line)
        begin = time.perf_counter()
        chains, gradients, divergences = [], 0.0, 0
        for key in jax.random.split(jax.random.PRNGKey(order["seed"]), options["num_chains"]):
            if number == 0 and not chains:
                run = run.lower(key).compile()
                building = time.perf_counter() - begin
            draws, steps, divergent = jax.block_until_ready(run(key))
            chains.append(draws)
            gradients += float(steps)
            divergences += int(divergent)
        seconds = time.perf_counter() - begin
        stacked = {name: jnp.stack([c[name] for c in chains]) for name in sites}
        np.save(order["path"], np.asarray(judged(stacked), dtype=np.float64))
        answer = {"seconds": seconds, "gradients": gradients, "divergences": divergences}
        answer["sampling_seconds"] = seconds - (building if number == 0 else 0.0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
