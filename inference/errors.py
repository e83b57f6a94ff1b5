"""The errors and warnings that inference raises by name, so that callers and tests can ask for them."""


class UnsupportedModelError(ValueError):
    """The model cannot be turned into a fixed log density; the message names the site and what to change."""


class CapabilityError(NotImplementedError):
    """This posterior cannot do what was asked; the message names the backends that can."""


class NonFiniteError(ArithmeticError):
    """A log density or gradient stopped being finite; the message names the step."""


class ConvergenceWarning(UserWarning):
    """A sampler or optimiser ended before its result can be trusted; the message carries the number."""


class DivergenceWarning(UserWarning):
    """Leapfrog trajectories diverged; the message carries how many."""


class ApproximationWarning(UserWarning):
    """An approximation left the range in which it is known to hold; the message carries the number."""
