"""Names of classes as pictures write them."""

LONGEST = 24  # letters


def as_label(name: str) -> str:
    """A name as far as there is room, with nothing that matplotlib takes for mathematics."""
    short = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"
    return short.replace("$", r"\$")
