"""`python -m gemsmith` is the command `gemsmith`."""

from gemsmith.cli.main import main

main()
