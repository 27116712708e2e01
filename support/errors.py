"""The one exception that is meant for the user."""


class UsageError(ValueError):
    """A mistake that the user can mend: shown as one line, without a traceback, exit code 2."""
