"""Processes that torchrun or accelerate started to work together: who is who, and what each of them found."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def rank_and_number() -> tuple[int, int]:
    """This process's rank, 0 in the main one, and how many there are."""
    together = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


def gathered(value: Result) -> list[Result]:
    """The values of all processes in order of rank; waits for all, so all have to call it."""
    _, number = rank_and_number()
    if number == 1:
        return [value]
    values = [value] * number
    dist.all_gather_object(values, value)
    return values


def exit_together() -> None:
    """Ends the group of processes, if there is one, and with it this program.

    Python is not finalised then: that aborts, now and then, a process in which a thread of PyTorch's waits for the
    interpreter.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def in_each(work: Callable[[], Result]) -> list[Result]:
    """What ``work`` gives in every process, in order of rank; all have to call it.

    Raises:
        Exception: of ``work`` here; a RuntimeError that tells of it, where it failed in another process only, so that
            nobody waits for one that is gone.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    outcomes = gathered((result, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(outcomes):
        if message is not None:
            raise RuntimeError(f"Expected all processes to succeed, but process {rank} got a {message}")
    return [result for result, _ in outcomes]
