"""What the user asked for cannot be done: one line that says what was expected, what came and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class UsageError(ValueError):
    """A wrong name, option, file or directory; the command line shows the message alone and ends with code 2."""


@contextmanager
def usage(prefix: str = "") -> Iterator[None]:
    """Turn a refused value into a :class:`UsageError`.

    Args:
        prefix: Said before the message.

    Raises:
        UsageError: In place of any ValueError, TypeError or OSError inside.
    """
    try:
        yield
    except UsageError:
        raise
    except (ValueError, TypeError, OSError) as err:
        raise UsageError(f"{prefix}{err}") from err
