"""gemsmith: run, size, serve, tune and prove Google's Gemma 4 open models."""
