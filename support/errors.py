"""The one exception that is meant for the user."""


class UsageError(ValueError):
    """A mistake that the user can mend: shown as one line, without a traceback, exit code 2."""


def first_line(error: Exception) -> str:
    """What another library's exception says, as the beginning of one of our lines."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
