"""Pieces of work that worker processes can import."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch


def threads_and(n: int) -> tuple[int, int, int]:
    return n, torch.get_num_threads(), os.getpid()


def die(n: int) -> None:
    os._exit(3)


def touch_after(folder: str, seconds: float, name: str) -> None:
    time.sleep(seconds)
    (Path(folder) / name).touch()
