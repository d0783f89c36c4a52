"""Shards of images that a measurement needs: what is not in the cache is made, by as many processes as it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console

from fewstep.lab.context import Interrupted
from fewstep.lab.progress import SamplingProgress, Tell, unheard
from fewstep.lab.shards import ShardCache
from fewstep.lab.workers import spread


class Chunk(NamedTuple):
    """Images start, ..., stop - 1 of the set that `key` stands for.

    label: for progress. nfe: network evaluations per image. arguments: of what makes them.
    """

    label: str
    nfe: int
    key: Mapping[str, Any]
    start: int
    stop: int
    arguments: tuple[Any, ...]


def make_missing(
    chunks: Sequence[Chunk],
    make: Callable[..., float],
    cache: ShardCache,
    workers: int,
    console: Console,
    stopping: Callable[[], bool],
    *,
    bar: bool = True,
    tell: Tell = unheard,
) -> None:
    """Have every chunk in `cache`: `make` puts one there and returns the seconds that it took, see `spread`.

    tell: is told of network evaluations.

    Raises:
        Interrupted: `stopping` said so; finished chunks are kept.
    """
    total = sum((chunk.stop - chunk.start) * chunk.nfe for chunk in chunks)
    missing, made = [], 0
    with SamplingProgress(console, total, bar=bar) as shown:
        for chunk in chunks:
            if cache.get(chunk.key, chunk.start, chunk.stop) is None:
                missing.append(chunk)
            else:
                shown.advance(chunk.label, chunk.stop - chunk.start, chunk.nfe, 0.0, cached=True)
        tell(shown.made, total)
        for i, seconds in spread(make, [chunk.arguments for chunk in missing], workers, stopping):
            shown.advance(missing[i].label, missing[i].stop - missing[i].start, missing[i].nfe, seconds)
            tell(shown.made, total)
            made += 1
    if made < len(missing):
        raise Interrupted(f"stopped with {made} of {len(missing)} chunks made; they are kept")
