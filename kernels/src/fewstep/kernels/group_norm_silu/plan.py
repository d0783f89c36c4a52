"""How one call is cut into programs: which groups, channels and pixels each one takes, and how often it reads memory.

Three tiers. "resident": a program holds all pixels of its groups in registers, so memory is read once. "streamed": a
program walks over them in tiles and comes back for the result, when they are still in the caches. "two_phase": several
programs per group, each over a chunk of the pixels; a first launch leaves their statistics in a workspace where every
slot has one writer, a second one merges these and makes the result. Nothing here depends on the device, so that a call
is cut the same way everywhere.
"""

from dataclasses import dataclass
from typing import Literal

Tier = Literal["resident", "streamed", "two_phase"]

RESIDENT = {False: 16384, True: 8192}      # elements that a program holds; a backward program holds x and dy
STREAMED = 256 << 10                       # bytes that a program may come back for and find in a cache
ALONE = 32 << 10                           # bytes below which a second launch costs more than idle processors
PROCESSORS, PROGRAMS = 132, 512            # of an H200; programs to aim at when there are fewer than processors
CHUNK = 16 << 10                           # bytes that make a chunk worth a program
SECTORS = 64                               # bytes of a pixel that a channels_last program reads at least
TILE = 2048                                # elements, of tiers that walk
MOST_CHANNELS = 8192                       # of one group in channels_last, which a tile must hold
MOST_CHUNKS = 256


def power_above(n: int) -> int:
    """The power of two at or above n."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Plan:
    """The cut of one call.

    Fields:
        tier: see above.
        groups: whole groups per program.
        blocks: programs that the channels of a sample are cut into.
        channels, pixels: of a tile, powers of two.
        chunks: programs that the pixels are cut into; 1 unless two_phase.
        chunk: pixels of each, a multiple of `pixels` unless there is only one.
        warps: of a program.
        registers: the most that a thread may have; None: the compiler's choice.
    """

    tier: Tier
    groups: int
    blocks: int
    channels: int
    pixels: int
    chunks: int
    chunk: int
    warps: int
    registers: int | None = None


def groups_together(channels: int, groups: int, itemsize: int) -> int:
    """How many groups a channels_last program takes: 64 bytes of a pixel or more, few idle lanes, aligned to 16 bytes.

    The least that leaves a quarter of the lanes idle at most, else what leaves fewest idle.
    """
    size, best, most = channels // groups, 1, 0.0
    for count in range(1, groups + 1):
        span = count * size
        if span * itemsize < SECTORS and count < groups:
            continue
        if span > 256 and most > 0:
            break
        aligned = span * itemsize % 16 == 0 or channels * itemsize % 16
        used = span / power_above(span) * (1.0 if aligned else 0.5)
        if used > most:
            best, most = count, used
        if most >= 0.75:
            break
    return best


def plan(batch: int, channels: int, groups: int, pixels: int, itemsize: int, last: bool, backward: bool) -> Plan:
    """Cut a call.

    Args:
        batch, channels, pixels: sizes of x (B, C, ...), all at least 1.
        groups: divides channels.
        itemsize: bytes of an element.
        last: whether x is channels_last.
        backward: for the backward pass.
    """
    together = groups_together(channels, groups, itemsize) if last else 1
    span, blocks = together * (channels // groups), -(-groups // together)
    across, along = power_above(span), power_above(pixels)
    if across * along <= RESIDENT[backward]:
        # 16 warps leave a thread 128 registers, which a channels_last backward tile of 4,096 elements exceeds on sm_89.
        most = 8 if backward and last and across * along <= 4096 else 16
        return Plan("resident", together, blocks, across, along, 1, pixels, min(most, _warps(across * along)))
    across, along = _tile(span, pixels, last)
    held, programs = span * pixels * itemsize * (2 if backward else 1), batch * blocks
    if held <= ALONE or (held <= STREAMED and programs >= PROCESSORS):
        warps = _warps(across * along)
        many = 80 if together > 8 and not backward else None    # of many groups in a tile, ptxas aims at 64 on sm_89
        registers = many if last else registers_for(warps)
        return Plan("streamed", together, blocks, across, along, 1, pixels, warps, registers)
    chunks = min(MOST_CHUNKS, max(2, min(-(-PROGRAMS // programs), held // CHUNK), held // STREAMED))
    while pixels < chunks * along and across * along > TILE // 4 and along > 1:
        along //= 2
    chunk = -(-pixels // (chunks * along)) * along
    chunks, warps = -(-pixels // chunk), _warps(across * along)
    return Plan("two_phase", together, blocks, across, along, chunks, chunk, warps)


def _tile(span: int, pixels: int, last: bool) -> tuple[int, int]:
    """Channels and pixels of the tiles that a program walks in."""
    if last:
        across = power_above(span)
        return across, max(1, min(power_above(pixels), TILE // across))
    along = min(power_above(pixels), TILE // 2)
    most = min(power_above(span), TILE // along)
    sizes = [most >> halvings for halvings in range(3) if most >> halvings]
    return max(sizes, key=lambda across: (min(0.85, span / (-(-span // across) * across)), across)), along


def _warps(elements: int) -> int:
    """So many that a thread has 8 elements, within what a program can have: more of them spill."""
    return min(16, max(4, elements // 256))


def registers_for(warps: int) -> int | None:
    """The most registers of a thread in a program that walks: 64 of 8 warps, of which four programs fill a processor.

    Left to itself ptxas aims at more programs, with 40 or 48, and spills on one architecture or another.
    """
    return 64 if warps == 8 else None
