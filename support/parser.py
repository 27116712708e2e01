"""A command line that answers a mistake in one line."""

import argparse
import difflib

from support.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and which flag may have been meant."""

    def error(self, message: str):
        raise UsageError(f"{message}; see --help")

    def parse(
        self, argv: list[str] | None, gone: dict[str, str] | None = None
    ) -> argparse.Namespace:
        """gone: what to say of flags that there were once."""
        args, unknown = self.parse_known_args(argv)
        if not unknown:
            return args
        flag = unknown[0].split("=")[0]
        if positive := {flag, flag.replace("--no-", "--")} & set(gone or {}):
            raise UsageError(f"{flag} {gone[positive.pop()]}")
        known = [option for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(flag, known, 1)
        hint = f": did you mean {close[0]}?" if close else ": see --help"
        raise UsageError(f"unknown flag {unknown[0]}{hint}")
