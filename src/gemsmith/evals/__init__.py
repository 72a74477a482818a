"""Measuring what a model can do. Scores only; speed and memory are in benchmarks/."""
