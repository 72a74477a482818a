"""Measurements at real dimensions. See README.md; results are in docs/numbers.md."""

import gemsmith as gemsmith  # before PyTorch, which reads then how long its threads wait busily
