"""Settings for every test."""

import torch

# Tiny tensors gain nothing from threads and lose much to them on a busy machine.
torch.set_num_threads(1)
