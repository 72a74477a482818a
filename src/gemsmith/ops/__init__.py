"""Tensor operations; `reference` holds the slow definition of each, the oracle in tests."""
