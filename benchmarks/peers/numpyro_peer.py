"""NumPyro as a peer: started with a task and a file of arrays, then times as many calls as each line of input asks for.

Runs in an environment of its own and imports nothing of bnn-zoo. All calls of one order run inside one compiled loop,
NumPyro's own way; the loop is compiled once for the number of calls asked for first.
"""

import json
import os
import sys
import time

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO, init_to_value
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.hmc_util import IntegratorState, velocity_verlet
from numpyro.infer.util import potential_energy

CHUNK = 100  # calls in one compiled loop


def sites(sizes):
    """Names and shapes of weights (out, in) and biases, in the order of theta."""
    for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        yield f"layers.{i}.weight", (b, a)
        yield f"layers.{i}.bias", (b,)


def model_of(sizes, noise, fan_in):
    """The tanh network with a fixed noise scale."""

    def model(x, y):
        h = x
        shapes = list(sites(sizes))
        for i in range(0, len(shapes), 2):
            (wname, wshape), (bname, bshape) = shapes[i], shapes[i + 1]
            scale = wshape[1] ** -0.5 if fan_in else 1.0
            w = numpyro.sample(wname, dist.Normal(0.0, scale).expand(wshape).to_event(2))
            b = numpyro.sample(bname, dist.Normal(0.0, 1.0).expand(bshape).to_event(1))
            h = h @ w.T + b
            h = jnp.tanh(h) if i < len(shapes) - 2 else h
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(h[:, 0], noise), obs=y)

    return model


def named(theta, sizes):
    """Site values of a flat theta."""
    found, start = {}, 0
    for name, shape in sites(sizes):
        size = int(np.prod(shape))
        found[name] = jnp.asarray(theta[start : start + size]).reshape(shape)
        start += size
    return found


def leapfrog(p):
    """Compiled loop of NumPyro's velocity Verlet on its own potential; and the gradient at theta."""
    sizes, x, y = p["sizes"].tolist(), jnp.asarray(p["x"]), jnp.asarray(p["y"])
    model = model_of(sizes, float(p["noise"]), fan_in=True)

    def potential(z):
        return potential_energy(model, (x, y), {}, z)

    def kinetic(inverse_mass, r):
        return 0.5 * sum(jnp.sum(v * v) for v in r.values())

    z = named(p["theta"], sizes)
    init, update = velocity_verlet(potential, kinetic)
    r = {name: jnp.ones_like(value) for name, value in z.items()}
    state = init(z, r)
    one = jnp.ones(())

    @jax.jit
    def loop(state: IntegratorState) -> IntegratorState:
        return jax.lax.fori_loop(0, CHUNK, lambda _, s: update(1e-5, one, s), state)

    gradient = jax.grad(potential)(z)
    return loop, state, -jnp.concatenate([gradient[name].ravel() for name, _ in sites(sizes)])


def svi(p):
    """Compiled loop of SVI steps with AutoNormal, as `SVI.run` does it; no result to compare."""
    sizes, x, y = p["sizes"].tolist(), jnp.asarray(p["x"]), jnp.asarray(p["y"])
    model = model_of(sizes, float(p["noise"]), fan_in=False)
    guide = AutoNormal(model, init_scale=0.01, init_loc_fn=init_to_value(values=named(p["theta"], sizes)))
    method = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    state = method.init(jax.random.PRNGKey(0), x, y)
    loss = jnp.mean(
        jnp.stack([method.evaluate(state._replace(rng_key=jax.random.PRNGKey(i)), x, y) for i in range(20)])
    )

    @jax.jit
    def loop(state):
        return jax.lax.scan(lambda s, _: method.update(s, x, y), state, None, length=CHUNK)[0]

    return loop, state, jnp.atleast_1d(loss)


def main() -> None:
    """Build, say so, and answer orders until the input ends."""
    task, path = sys.argv[1:]
    start = time.perf_counter()
    loop, state, result = {"leapfrog": leapfrog, "svi": svi}[task](np.load(path))
    jax.block_until_ready(loop(state))
    versions = {"numpyro": numpyro.__version__, "jax": jax.__version__}
    ready = {"build_seconds": time.perf_counter() - start, "result": np.asarray(result).tolist(), "versions": versions}
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        calls = int(line)
        start = time.perf_counter()
        for _ in range(max(1, calls // CHUNK)):
            state = loop(state)
        jax.block_until_ready(state)
        elapsed = time.perf_counter() - start
        print(json.dumps({"seconds": elapsed * calls / (max(1, calls // CHUNK) * CHUNK)}), flush=True)


if __name__ == "__main__":
    main()
