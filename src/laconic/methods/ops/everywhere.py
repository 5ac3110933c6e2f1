"""Methods that decide on the number of tokens themselves, at every block."""

from __future__ import annotations

from laconic.methods.ops.alone import NoKeepRate


class EveryBlock(NoKeepRate):
    """A method without a keep rate that works at every block unless the blocks are given."""

    def blocks(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))
