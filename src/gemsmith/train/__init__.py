"""Training of a decoder: data, loss, optimizers and the loop. Knows nothing of any recipe."""
