"""The one exception that the command line turns into a line of text and exit code 2."""

import sys


def first_line(error: BaseException) -> str:
    """What an exception says, cut to one line; its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class UserError(ValueError):
    """A mistake that the user can mend: says what, where, and what to do, in one line each."""

    def __init__(self, *messages: str) -> None:
        if len(messages) == 1 and messages[0].startswith("Caught UserError in "):
            # A loader process died of one: torch raises it again here, with the process's traceback as its message.
            messages = (messages[0].rpartition("UserError: ")[2].strip(),)
        super().__init__("\n".join(messages))
        self.messages = list(messages)


def print_errors(error: UserError, program: str = "e3va") -> None:
    """Tell the user, a line for each message."""
    for message in error.messages:
        print(f"{program}: error: {message}", file=sys.stderr)
