"""The densities that the JAX peers sample, and the functions whose draws are judged; imports nothing of bnn-zoo.

A density is declared once as a NumPyro-like table of sites with unconstrained values: log prior and log likelihood are
written out for BlackJAX; NumPyro gets its own declaration in `numpyro_sampler.py`.
"""

import jax
import jax.numpy as jnp


def layers(sizes):
    """Names and shapes of weights (out, in) and biases."""
    for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        yield f"w{i}", (b, a)
        yield f"b{i}", (b,)


def network(values, x, sizes):
    """Outputs (N,) of a tanh network."""
    h = x
    for i in range(len(sizes) - 1):
        h = h @ values[f"w{i}"].T + values[f"b{i}"]
        h = jnp.tanh(h) if i < len(sizes) - 2 else h
    return h[:, 0]


def shapes(kind, p):
    """Shapes of the sites by name."""
    if kind == "mlp":
        return dict(layers(p["sizes"].tolist()))
    if kind == "logistic":
        return {"w": (p["x"].shape[1],), "b": ()}
    if kind == "schools":
        return {"mu": (), "log_tau": (), "eta": (8,)}
    return {"w": (p["x"].shape[1],)}


def log_density(kind, p):
    """Log density in nats, up to a constant, of a dictionary of unconstrained values."""
    x, y = jnp.asarray(p["x"]), jnp.asarray(p["y"])

    def half(v):
        return -0.5 * jnp.sum(v * v)

    def mlp(v):
        sizes = p["sizes"].tolist()
        prior = sum(half(v[name]) * (shape[1] if len(shape) == 2 else 1) for name, shape in layers(sizes))
        return prior + half((y - network(v, x, sizes)) / float(p["noise"]))

    def logistic(v):
        z = x @ v["w"] + v["b"]
        return half(v["w"]) + half(v["b"]) + jnp.sum(y * z - jnp.logaddexp(0.0, z))

    def schools(v):
        tau = jnp.exp(v["log_tau"])
        prior = half(v["mu"] / 5.0) + half(v["eta"]) - jnp.log1p((tau / 5.0) ** 2) + v["log_tau"]
        return prior + half((y - v["mu"] - tau * v["eta"]) / x)

    def linear(v):
        return half(v["w"]) + half((y - x @ v["w"]) / 0.5)

    return {"mlp": mlp, "logistic": logistic, "schools": schools, "linear": linear}[kind]


def functions(kind, p):
    """Judged functions (F,) of a dictionary of unconstrained values; compiled for draws (C, S, ...)."""

    def one(v):
        if kind == "mlp":
            return network(v, jnp.asarray(p["probes"]), p["sizes"].tolist())
        if kind == "logistic":
            return jnp.asarray(p["probes"]) @ v["w"] + v["b"]
        if kind == "schools":
            tau = jnp.exp(v["log_tau"])
            return jnp.concatenate([v["mu"][None], v["log_tau"][None], v["mu"] + tau * v["eta"]])
        return v["w"]

    return jax.jit(jax.vmap(jax.vmap(one)))
