"""What a model must not do, each refused with the name of the site and what to change."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from inference.errors import UnsupportedModelError
from inference.observation import is_discrete, unwrap

if TYPE_CHECKING:
    from inference.sites import Site
    from inference.tracing import Model


def find_observed(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The one observed site of a run.

    Args:
        messages: Every Pyro message of the run.

    Returns:
        Its message.

    Raises:
        UnsupportedModelError: If there is none, more than one, or it is in no plate.
    """
    found = [
        m
        for m in messages
        if m["type"] == "sample" and m["is_observed"] and not (is_plate(m) or is_deterministic(m) or is_factor(m))
    ]
    if not found:
        raise UnsupportedModelError(
            "the model has no observed site: it needs one `pyro.sample(name, distribution, obs=y)` inside "
            '`pyro.plate("data", len(x))`, reached when y is given'
        )
    if len(found) > 1:
        raise UnsupportedModelError(
            f"the model has {len(found)} observed sites ({', '.join(repr(m['name']) for m in found)}); one is "
            "supported: join the targets "
            "in one distribution with `.to_event`, or move the others into a `pyro.factor`"
        )
    return found[0]


def check_support(message: dict[str, Any]) -> None:
    """Refuse targets that the declared likelihood cannot produce.

    Args:
        message: The observed site's message.

    Raises:
        ValueError: Naming the support and the first row outside it.
    """
    fn, _ = unwrap(message["fn"])
    # A support that depends on latent values (other than on their number) says nothing at one draw of them.
    if isinstance(type(fn).support, constraints._DependentProperty) and not isinstance(
        fn, dist.Categorical | dist.Binomial
    ):
        return
    inside = fn.support.check(message["value"])
    if not bool(inside.all()):
        rows = (~inside).nonzero()
        raise ValueError(
            f"{len(rows)} values of y are outside the support of site {message['name']!r}, {type(fn).__name__} on "
            f"{fn.support} (first at row {int(rows[0, 0])}); choose another likelihood or correct them"
        )


def refuse_messages(messages: list[dict[str, Any]]) -> None:
    """Refuse parameters without a prior and discrete or degenerate latent sites.

    Args:
        messages: Every Pyro message of a run.

    Raises:
        UnsupportedModelError: Naming the site.
    """
    for msg in messages:
        if msg["type"] == "param" and not isinstance(msg["value"], nn.Parameter):
            raise UnsupportedModelError(
                f"site {msg['name']!r} is a `pyro.param`, which has no prior; give it one with `pyro.sample`, or "
                "pass the value "
                "in as a constant"
            )
        if is_latent(msg) and isinstance(unwrap(msg["fn"])[0], dist.Delta):
            raise UnsupportedModelError(
                f"latent site {msg['name']!r} is a Delta, which has no density; use `pyro.deterministic` or a "
                "plain tensor"
            )
        if is_latent(msg) and msg["value"].numel() == 0:
            raise UnsupportedModelError(
                f"latent site {msg['name']!r} has no entries (shape {tuple(msg['value'].shape)}): there is nothing to "
                "infer about an empty layer; leave it out of the model"
            )
        if is_latent(msg) and is_discrete(msg["fn"].support):
            raise UnsupportedModelError(
                f"latent site {msg['name']!r} is discrete ({type(unwrap(msg['fn'])[0]).__name__}); sum it out, "
                "for instance with "
                "dist.MixtureSameFamily"
            )


def refuse_intractable_priors(messages: list[dict[str, Any]]) -> None:
    """Refuse priors that can be drawn from but whose density is not known in closed form.

    Args:
        messages: Every Pyro message of a run.

    Raises:
        UnsupportedModelError: Naming the site.
    """
    for msg in messages:
        if not is_latent(msg):
            continue
        base = unwrap(msg["fn"])[0]
        try:
            if isinstance(base, dist.Stable):  # Pyro integrates its density numerically, with branches on values
                raise NotImplementedError
            msg["fn"].log_prob(msg["value"])
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"latent site {msg['name']!r} has a prior, {type(base).__name__}, with no density in closed form, and "
                "a log density is what every backend works on; choose another prior"
            ) from error


def refuse_mutating_modules(model: Model) -> None:
    """Refuse networks whose mode makes one datum's likelihood depend on the batch or on chance.

    Args:
        model: The Pyro callable.

    Raises:
        UnsupportedModelError: Naming the module.
    """
    for name, module in _reachable_modules(model):
        kind = type(module).__name__
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if module.training and (batch_norm or dropout):
            raise UnsupportedModelError(
                f"module {name!r} ({kind}) is in training mode, where the likelihood of one datum depends on the batch "
                "or on chance; call `.eval()` on the network first"
            )
        if batch_norm and module.running_mean is None:
            raise UnsupportedModelError(
                f"module {name!r} ({kind}) has no running statistics, so the likelihood of one datum depends on "
                "the batch; "
                "use track_running_stats=True or another normalisation"
            )


def _reachable_modules(model: Model) -> list[tuple[str, nn.Module]]:
    """Modules that a model is, holds, or reads from its closure and globals, with their names."""
    roots: dict[str, Any] = {"": model}
    while isinstance(model, functools.partial):
        roots |= {str(i): a for i, a in enumerate(model.args)} | model.keywords
        model = model.func
    if inspect.ismethod(model):
        roots |= {"self": model.__self__} | vars(model.__self__) if hasattr(model.__self__, "__dict__") else {}
        model = model.__func__
    if inspect.isfunction(model):
        seen = inspect.getclosurevars(model)
        roots |= {**seen.globals, **seen.nonlocals}
    elif not isinstance(model, nn.Module) and hasattr(model, "__dict__"):
        roots |= vars(model)
    found = []
    for name, root in roots.items():
        if isinstance(root, nn.Module):
            found += [(".".join(filter(None, (name, inner))), m) for inner, m in root.named_modules()]
    return found


def refuse_changes(first: tuple[Site, ...], second: tuple[Site, ...]) -> None:
    """Refuse models whose sites differ between two runs.

    Args:
        first: Sites of one run.
        second: Sites of another.

    Raises:
        UnsupportedModelError: Naming the first site that differs.
    """
    names, again = [s.name for s in first], [s.name for s in second]
    if names != again:
        odd = sorted(set(names) ^ set(again)) or [a for a, b in zip(names, again, strict=False) if a != b]
        raise UnsupportedModelError(
            f"the model's sites change between runs (first at {odd[0]!r}); every run must have the same sites in "
            "the same order"
        )
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            raise UnsupportedModelError(f"site {a.name!r} changes shape between runs: {a.shape}, then {b.shape}")
        if not _same_support(a.support, b.support):
            raise UnsupportedModelError(
                f"the support of site {a.name!r} depends on other random values ({a.support}, then {b.support}); "
                "sample a site "
                "with a fixed support and transform it with ordinary tensor operations"
            )


def _same_support(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    for name, left in vars(a).items():
        right = getattr(b, name, None)
        if isinstance(left, Tensor):
            if not isinstance(right, Tensor) or left.shape != right.shape or not torch.equal(left, right):
                return False
        elif isinstance(left, constraints.Constraint) and not _same_support(left, right):
            return False
    return True


def is_latent(msg: dict[str, Any]) -> bool:
    """Whether a message is a latent site."""
    return msg["type"] == "sample" and not msg["is_observed"] and not is_plate(msg)


def is_plate(msg: dict[str, Any]) -> bool:
    """Whether a message is a plate choosing its subsample."""
    return type(msg["fn"]).__name__ == "_Subsample"


def is_deterministic(msg: dict[str, Any]) -> bool:
    """Whether a message is a `pyro.deterministic` site."""
    return bool(msg["infer"].get("_deterministic"))


def is_factor(msg: dict[str, Any]) -> bool:
    """Whether a message is a `pyro.factor`."""
    return isinstance(unwrap(msg["fn"])[0], dist.Unit)
