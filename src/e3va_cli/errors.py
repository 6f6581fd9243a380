"""The one exception that the command line turns into a line of text and exit code 2."""


class UserError(ValueError):
    """A mistake that the user can mend: says what, where, and what to do, in one line each."""

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = list(messages)
