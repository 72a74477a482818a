"""Files that came to harm on their way, for tests of what reads them."""

import numpy as np


def damaged(data: bytes, seed: int, count: int) -> list[bytes]:
    """Copies cut short, with bytes changed, and with a stretch of noise, in turn."""
    random = np.random.default_rng(seed)
    made = []
    for index in range(count):
        changed = bytearray(data)
        if index % 3 == 0:
            del changed[int(random.integers(1, len(data))) :]
        elif index % 3 == 1:
            reach = len(data) if index % 2 else min(200, len(data))  # headers are where it hurts
            for place in random.integers(0, reach, random.integers(1, 12)):
                changed[place] = random.integers(256)
        else:
            start = int(random.integers(0, len(data)))
            changed[start : start + 64] = random.bytes(64)
        made.append(bytes(changed))
    return made
