"""``python -m benchmarks.package_weights RUN NAME``: put the weights of a finished run of ``laconic train`` into the package.

For a run with a method only the tensors of the method (its scorer) are copied: the backbone was frozen. The metrics go to
results/. The weights in src/laconic/weights were made in this way::

    laconic train --recipe scenes_vit_small --output RUN && python -m benchmarks.package_weights RUN scenes_vit_small
    laconic train --recipe scenes_dtps --output RUN && python -m benchmarks.package_weights RUN scenes_vit_small.dtps
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from laconic.core.files import Refusal, write_atomically
from laconic.models.scenes import FOLDER
from laconic.training.state import METRICS

TOP = Path(__file__).parents[1]


def ship(run: Path, name: str, weights: Path = FOLDER, results: Path = TOP / "results") -> Path:
    """Copy the weights and metrics of a run; return the path of the weights.

    Raises:
        Refusal: the run is not finished.
    """
    from safetensors.torch import load, save

    source = run / "model" / "model.safetensors"
    if not source.is_file() or not (run / METRICS).is_file():
        raise Refusal(f"{run} holds no finished run of laconic train: expected {source} and {run / METRICS}")
    tensors = load(source.read_bytes())
    own = {key: value for key, value in tensors.items() if key.startswith("laconic.")}
    path = weights / f"{name}.safetensors"
    write_atomically(path, save(own or tensors))
    write_atomically(results / f"{name}.jsonl", (run / METRICS).read_text())
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Copy the run given first to the name given second, and print the path."""
    run, name = sys.argv[1:] if arguments is None else arguments
    print(ship(Path(run), name))


if __name__ == "__main__":
    main()
