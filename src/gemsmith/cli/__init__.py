"""The command `gemsmith`."""
