"""`python -m e3va_cli`."""

from e3va_cli.cli import main

main()
