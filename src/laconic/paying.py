"""Does a reduction pay at all? What its reducers take beside what the blocks are spared, in closed form."""

from __future__ import annotations

import logging

from torch import nn

from laconic.cost import CONVENTIONS, block_cost
from laconic.hosts import Host
from laconic.reducer import Method
from laconic.schedule import Schedule
from laconic.staging import Staging

log = logging.getLogger(__name__)


def balance(host: nn.Module, entry: Host, config: Method, schedule: Schedule) -> tuple[int, int]:
    """(multiply-adds that the blocks are spared, multiply-adds of the reducers) of one image of the model's own size."""
    weights, shapes, blocks = CONVENTIONS["matmul"], entry.shapes(host), entry.blocks(host)
    staging = Staging(config, schedule, shapes)
    counts, sites, spared, spent, index = staging.counts(), staging.sites(), 0, 0, 0
    for shape in shapes:
        before = shape.patches
        for _ in range(shape.depth):
            left = counts[index]
            whole = block_cost(index, blocks[index], shape, None, None, shape.patches, shape.patches, weights)
            now = block_cost(index, blocks[index], shape, config, sites.get(index), before, left, weights)
            spared, spent = spared + whole.macs - now.macs, spent + now.reducer_macs
            before, index = left, index + 1
    return spared, spent


def warn_unless_it_pays(host: nn.Module, entry: Host, config: Method, schedule: Schedule) -> None:
    """Say so where tokens leave and it takes more to choose and merge them than the blocks are spared.

    Methods that decide for every image are left out: what they spare depends on the images.
    """
    if config.row.count == "variable":
        return
    spared, spent = balance(host, entry, config, schedule)
    if spared and spent >= spared:
        log.warning(
            "%s costs more than it saves with this schedule: its reducers take %.3g multiply-adds an image, and the blocks are "
            "spared %.3g. Reduce in fewer or in earlier blocks, keep fewer tokens, or take a method whose cost grows less with "
            "their number (topk, evit, etps)",
            config.row.name,
            spent,
            spared,
        )
