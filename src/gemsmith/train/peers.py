"""Trainers of one model, each in a process of its own, whose weights are averaged now and then.

Between two meetings each takes its own steps on its own data (local SGD, Stich 2018). On a CPU a
process a core trains faster than one process of as many threads: within a step nothing waits.

`torchrun --nproc-per-node N` starts them and tells each of them which one it is.
"""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

MEETING_STEPS = 8
"""Between two meetings. Of steps that take a second, 3 % is spent waiting for the slower one."""


class Peers:
    """This process and those beside it. All of them must call each method in the same order."""

    def __init__(self) -> None:
        """Meet the others; raises RuntimeError where `torchrun` did not start this process."""
        dist.init_process_group("gloo")
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    @torch.no_grad()
    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """The mean of all trainers', in place, of those that are trained."""
        for parameter in parameters:
            if parameter.requires_grad:
                dist.all_reduce(parameter)
                parameter /= self.count

    def any(self, *wishes: bool) -> list[bool]:
        """Which of the wishes some trainer has."""
        found = torch.tensor(wishes, dtype=torch.uint8)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.bool().tolist()

    def first(self, number: int) -> int:
        """What the first of them has here."""
        found = torch.tensor([number])
        dist.broadcast(found, src=0)
        return int(found)


def join() -> Peers | None:
    """The trainers that `torchrun` started; None if this one is alone."""
    return Peers() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
