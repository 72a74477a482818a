"""Tools that run, and the loop between a model and them. Needs no torch."""
