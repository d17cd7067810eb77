"""Errors a user can act on, and the exit codes they end with."""


class ShakedownError(Exception):
    """An error a user can act on: one line that says what, where and what to do.

    Notebooks show that line instead of a traceback; the command line prints it and exits with
    `exit_code`.
    """

    exit_code = 1

    def _render_traceback_(self) -> list[str]:  # IPython calls this in place of the traceback
        return [f"{type(self).__name__}: {self}"]


class BadInput(ShakedownError):
    """The params, the data or the machine are not what the run needs."""

    exit_code = 2


class GateFailed(ShakedownError):
    """A stage ran to its end and its verdict is "failed"."""

    exit_code = 3


class BudgetReached(ShakedownError):
    """The run was stopped at `budget`; its last checkpoint is saved."""

    exit_code = 4


class Interrupted(ShakedownError):
    """The run was asked to stop; its last checkpoint is saved."""

    exit_code = 5
