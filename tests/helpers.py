"""What several test files need."""

import pytest

from support.errors import UsageError


def refused(call, *words) -> str:
    """The one line with which a call is refused; it must hold all the words."""
    with pytest.raises(UsageError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message, message
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    return message
