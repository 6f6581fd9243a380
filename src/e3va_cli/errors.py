"""UserError: what a user can fix, which commands print in one line before they exit with code 2."""

import sys


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has no message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class UserError(ValueError):
    """An error that the user can fix. Each message is one line: what is wrong, where, and what to do."""

    def __init__(self, *messages: str) -> None:
        if len(messages) == 1 and messages[0].startswith("Caught UserError in "):
            # Raised in a loader process: torch raises it again here, with the traceback as its message.
            messages = (messages[0].rpartition("UserError: ")[2].strip(),)
        super().__init__("\n".join(messages))
        self.messages = list(messages)


def print_errors(error: UserError, program: str = "e3va") -> None:
    """Print the messages to standard error, one line each."""
    for message in error.messages:
        print(f"{program}: error: {message}", file=sys.stderr)
