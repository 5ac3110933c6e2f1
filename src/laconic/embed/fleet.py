"""Embed a collection under Ray Data: every actor embeds whole shards and writes them, so that shards are the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from laconic.core.optional_deps import need
from laconic.embed.collection import open_collection
from laconic.embed.embedder import Embedder
from laconic.embed.run import Tick, run
from laconic.embed.vectors import VectorFolder


class ShardTask:
    """An actor of Ray Data: a batch of shard numbers in, the same out when the shards are written.

    The collection and the folder are opened in the actor, and must be at the same place on every machine.
    """

    def __init__(self, embedder: Any, place: Path, output: Path, question: Mapping[str, Any], batch_size: int) -> None:
        self.embedder: Embedder = need("ray", "ray").get(embedder)
        self.collection, self.folder = open_collection(place), VectorFolder(output, question)
        self.batch_size = batch_size

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Embed and write the shards of a batch."""
        shards = [int(shard) for shard in batch["shard"]]
        run(self.embedder, self.collection, self.folder, shards, batch_size=self.batch_size)
        return {"pictures": np.array([len(self.folder.span(shard)) for shard in shards])}


def run_in_ray(
    embedder: Embedder,
    place: Path,
    folder: VectorFolder,
    shards: Sequence[int],
    *,
    batch_size: int = 64,
    workers: int = 2,
    tick: Tick = lambda count: None,
) -> None:
    """Embed the pictures of some shards by actors of Ray Data, each with one CPU, and one GPU where the embedder uses it.

    An own local Ray is started and stopped unless there is one already (``ray.init``, or the variable RAY_ADDRESS).

    Args:
        embedder: the model.
        place: the pictures, as for `laconic.embed.collection.open_collection`, at the same path on every machine.
        folder: where the vectors go, at the same path on every machine.
        shards: the numbers of the shards.
        batch_size: pictures that are decoded at once.
        workers: actors.
        tick: gets the number of pictures after each shard.

    Raises:
        ImportError: Ray is not installed.
    """
    ray, data = need("ray", "ray"), need("ray.data", "ray")
    own = not ray.is_initialized()
    if own:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        data.DataContext.get_current().enable_progress_bars = False
        arguments = (ray.put(embedder), place.absolute(), folder.path.absolute(), folder.question, batch_size)
        rows = data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
        done = rows.map_batches(
            ShardTask,
            fn_constructor_args=arguments,
            batch_size=1,
            compute=data.ActorPoolStrategy(size=min(max(workers, 1), len(shards))),
            num_cpus=1,
            num_gpus=1 if embedder.device.type == "cuda" else 0,
        )
        for row in done.iter_rows():
            tick(int(row["pictures"]))
    finally:
        if own:
            ray.shutdown()
