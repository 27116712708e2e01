"""What ends a program in one line: the exception meant for the user, and memory that is full."""

import sys
from collections.abc import Callable


class UsageError(ValueError):
    """A mistake that the user can mend: shown as one line, without a traceback, exit code 2."""


def first_line(error: Exception) -> str:
    """What another library's exception says, as the beginning of one of our lines."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def ran_out(error: RuntimeError) -> bool:
    """Whether it says that a GPU's memory is full; cuBLAS and cuDNN have names of their own."""
    full = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    kind = type(error).__name__  # torch itself is not imported: rewards.py does without
    return kind == "OutOfMemoryError" or any(name in str(error) for name in full)


def run(main: Callable[[], None], name: str) -> None:
    """A program's main function; what a user can mend is shown as one line, without a traceback."""
    try:
        main()
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{name}: interrupted; a run goes on with --resume RUN", file=sys.stderr)
        raise SystemExit(130) from None
    except RuntimeError as error:
        if not ran_out(error):
            raise
        print(
            f"{name}: the GPU's memory is full ({first_line(error)}). What was written is whole; "
            "another process on the GPU, or a smaller model or --max-new, makes the difference",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
