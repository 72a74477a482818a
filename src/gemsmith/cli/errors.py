"""What becomes of an error in a command: a line, an exit code."""

from typing import Any

import typer
from typer.core import TyperGroup

from gemsmith.errors import GemsmithError


class Commands(TyperGroup):
    """Every error ends here: as one line, or with --debug as a traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take --debug wherever it stands before a `--`."""
        end = args.index("--") if "--" in args else len(args)
        if "--debug" in args[:end]:
            args.remove("--debug")
            args.insert(0, "--debug")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo(err=True)  # what was being written ends its line
            raise typer.Exit(130) from None
        except Exception as error:
            # The command line's own exceptions know their exit code; a closed pipe is no error.
            quiet = isinstance(error, BrokenPipeError) or hasattr(error, "exit_code")
            if quiet or ctx.params["debug"]:
                raise
            if isinstance(error, GemsmithError | OSError):
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(2) from None
            kind = type(error).__name__
            typer.echo(f"internal error: {kind}: {error}\nSee where with --debug.", err=True)
            raise typer.Exit(1) from None
