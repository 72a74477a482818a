"""Measurements at real dimensions. See README.md; results are in docs/numbers.md."""
