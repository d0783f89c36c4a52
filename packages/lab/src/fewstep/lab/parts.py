"""Tensors that lie in several safetensors files, split by rows over them; and what says that they are unchanged."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


class Parts(Mapping[str, Tensor]):
    """Tensors that lie in several files, each split by rows or whole in the first; read when they are asked for.

    shapes: name -> shape of the whole tensor. split: names of those that are split: of n rows, each of P files has
    ceil(n / P) as long as there are any, as FSDP2 has it.
    """

    def __init__(self, files: list[Path], shapes: dict[str, list[int]], split: list[str]):
        self._shapes, self._split = shapes, frozenset(split)
        self._files = [safe_open(path, framework="pt") for path in files]

    def __getitem__(self, name: str) -> Tensor:
        return self.rows(name, slice(None)) if self._shapes[name] else self._files[0].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self._shapes[name])

    def rows(self, name: str, rows: slice) -> Tensor:
        """These rows of a tensor of at least one dimension."""
        if name not in self._split:
            whole: Tensor = self._files[0].get_tensor(name)
            return whole[rows]
        start, stop, _ = rows.indices(self._shapes[name][0])
        found = []
        for number, file in enumerate(self._files):
            here = part_of(self._shapes[name][0], number, len(self._files))
            first, last = max(start, here.start) - here.start, min(stop, here.stop) - here.start
            if first < last or not number:
                found.append(file.get_slice(name)[first : max(first, last)])
        return torch.cat(found)


def part_of(count: int, rank: int, world: int) -> slice:
    """The rows, of `count`, that process `rank` of `world` has where a tensor is split as FSDP2 does it."""
    size = -(-count // world)
    return slice(min(rank * size, count), min((rank + 1) * size, count))


class File(Mapping[str, Tensor]):
    """The tensors of an open safetensors file, read one at a time."""

    def __init__(self, file: Any):
        self._file = file

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = self._file.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of names, dtypes, shapes and content."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _bytes(tensors):
        digest.update(part)
    return digest.hexdigest()


def _bytes(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    for name in sorted(tensors):
        tensor = tensors[name]
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
