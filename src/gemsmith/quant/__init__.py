"""Low-bit weights: how they are stored, made from floats, and multiplied with."""
