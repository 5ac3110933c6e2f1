"""``laconic embed``: vectors of a collection of pictures, resumable and the same every time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from laconic.analysis import machine
from laconic.analysis.diagnose import shared_copy
from laconic.analysis.timing import Setting
from laconic.api import restore_
from laconic.cli.eval_input import command
from laconic.cli.export_input import UNTRAINED, open_weights
from laconic.cli.output import NONE, Report, Table
from laconic.cli.outputs import holds
from laconic.cli.variants import parse_methods, reduced
from laconic.core.files import Refusal
from laconic.core.method import METHODS
from laconic.core.optional_deps import need
from laconic.core.token_reduction import find_reduction
from laconic.embed.check import Check, check
from laconic.embed.collection import open_collection
from laconic.embed.embedder import Embedder, Output
from laconic.embed.features import Kind
from laconic.embed.fleet import run_in_ray
from laconic.embed.run import question, run
from laconic.embed.vectors import Result, VectorFolder
from laconic.models.scenes import load_scorer

KEEP = 0.7  # the default
FAILED = 3  # the exit code where some pictures could not be read


@dataclass(frozen=True)
class EmbedReport(Report):
    """The vectors of a collection, the pictures that could not be read, and the check if there was one."""

    output: str
    weights: str
    question: dict[str, Any]
    result: Result | None  # None where the check failed and nothing was embedded
    here: int  # pictures of this run; the others were there
    seconds: float
    ignored: int
    check: Check | None
    environment: dict[str, Any]
    command: str

    @property
    def exit_code(self) -> int:
        """0, or 3 where some pictures could not be read."""
        return FAILED if self.result is not None and self.result.failed else 0

    def parts(self) -> Iterator[str | Table]:
        if self.check is not None:
            yield _check_table(self.check)
        if self.result is not None:
            yield from self._vectors(self.result)
        yield f"{self.weights[0].upper()}{self.weights[1:]}."
        here = self.environment
        yield f"{here['device']}, {here['dtype']}, torch {here['torch']}, timm {here['timm']}, {here['date']}"

    def _vectors(self, result: Result) -> Iterator[str | Table]:
        shape = " x ".join(map(str, self.question["shape"]))
        rate = f"{self.here / self.seconds:,.1f} pictures/s" if self.here else NONE
        facts = (f"{result.pictures - result.failed:,}", f"{result.failed:,}", f"{self.here:,}", rate)
        header = ("vectors", "failed", "in this run", "speed")
        yield Table(
            f"{self.output}: {shape} {self.question['vectors']}, {self.question['features']}", header, (facts,), words=0
        )
        if result.failed:
            rows = tuple((f"{count:,}", why) for why, count in result.reasons.most_common(10))
            yield Table("Pictures that could not be read", ("pictures", "reason"), rows, words=2)
            yield f"Such as {', '.join(name for name, _ in result.examples)}; the column error of the files has all."
        if self.ignored:
            yield f"{self.ignored:,} other files are no pictures by their names, and were ignored."

    def to_json(self) -> dict[str, Any]:
        facts = {"output": self.output, "weights": self.weights, "command": self.command, "manifest": self.question}
        done = None
        if self.result is not None:
            named = [{"id": name, "reason": why} for name, why in self.result.examples]
            counts = {"pictures": self.result.pictures, "failed": self.result.failed, "in_this_run": self.here}
            done = {**counts, "seconds": self.seconds, "reasons": dict(self.result.reasons), "examples": named}
        checked = None if self.check is None else self.check.to_json()
        return {**facts, "result": done, "ignored": self.ignored, "check": checked, "environment": self.environment}


def _check_table(found: Check) -> Table:
    cells = [
        f"{found.pictures:,}",
        *(f"{mean.mean:.4f} ± {mean.half:.4f}" for mean in (found.cosine, found.recall)),
        f"{found.worst:.4f}",
        f"{found.speedup.median:.2f}x ({found.speedup.low:.2f}-{found.speedup.high:.2f})",
    ]
    header = ("pictures", "cosine", "recall@10", "worst cosine", "speed-up")
    return Table(
        "To the unreduced model (± half of the 95 % interval; quartiles of the speed-up)", header, (tuple(cells),), words=0
    )


@holds(folder="output")
def embed(
    model: str,
    /,
    *,
    data: Path,
    output: Path,
    method: str | None = None,
    keep: float | None = None,
    options: tuple[str, ...] = (),
    weights: Path | None = None,
    model_args: tuple[str, ...] = (),
    features: Kind = "pooled",
    vectors: Output = "float32",
    batch_size: int = 64,
    forward_size: int | None = None,
    shard_size: int | None = None,
    workers: int = 2,
    engine: Literal["local", "ray"] = "local",
    check: int = 0,
    least_cosine: float | None = None,
    least_recall: float | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> EmbedReport:
    """Embed a collection of pictures; the same command goes on where it was stopped.

    Exit code 3: done, but some pictures could not be read; each has a row with the reason.

    Args:
        model: timm name, or a directory that laconic.save, laconic train, laconic tune or transformers wrote.
        data: a folder of pictures, a .tar or .parquet file or a folder of these, or a text file with a path in each line.
        output: folder of the vectors: parquet files with id, source, width, height, error, vector, and a manifest.
        method: reduce the model by this method.
        keep: keep rate of every reducing block (default: 0.7).
        options: option of the method, as NAME=VALUE.
        weights: weights of the model, a .safetensors file or a checkpoint of torch (default: timm's pretrained ones).
        model_args: argument of timm.create_model, as NAME=VALUE.
        features: pooled (the vector that the classifier reads), class (the class token), or patches (restored).
        vectors: dtype of the vectors.
        batch_size: pictures that a worker prepares at once; no vector depends on it.
        forward_size: pictures in a forward (default: 8 on a CPU, 64 on CUDA; 1 on a CPU for a method with a count for each
            image); the last bits of vectors depend on it.
        shard_size: pictures in a file, rounded down to whole forwards; a run that is killed repeats those of its last file
            (default: as fit into 32 MB, at most 4,096).
        workers: processes that decode pictures, or actors of Ray; no vector depends on it.
        engine: this machine, or Ray Data (RAY_ADDRESS, else a local one).
        check: embed this number of pictures by the unreduced model too, and compare, before all others.
        least_cosine: least mean cosine to the unreduced model's vectors; refuse below it.
        least_recall: least share of the 10 nearest neighbours that stay; refuse below it.
        device: cuda where there is one, else cpu.
        dtype: of weights and images.

    Raises:
        Refusal: no such model, an output of other vectors, a check below what was wanted, a file that cannot be written.
        LookupError, TypeError, ValueError, OSError: as `laconic.reduce_` and `laconic.embed.collection.open_collection`.
    """
    asked = {name: value for name, value in locals().items() if name != "model"}
    _check_options(asked)
    need("pyarrow", "embed")
    if engine == "ray":
        need("ray.data", "ray")
    machine.keep_pages()
    collection = open_collection(data)
    base, own, line = _models(model, asked)
    how: dict[str, Any] = {"features": features, "output": vectors, "device": device, "dtype": dtype}
    how |= {"forward_size": forward_size}
    embedder = Embedder(own, **how)
    facts = question(embedder, collection, shard_size)
    folder, start = VectorFolder(output, facts), time.perf_counter()
    environment = machine.environment(Setting(rounds=1, device=device, dtype=dtype))

    def report(result: Result | None, here: int) -> EmbedReport:
        spent = time.perf_counter() - start
        told = (str(output), line, facts, result, here, spent, collection.ignored, found, environment)
        return EmbedReport(*told, command("embed", model, asked))

    found = _checked(base, embedder, collection, how, check) if check else None
    failures = found.failures(least_cosine, least_recall) if found is not None else []
    if failures:
        error: Any = Refusal(f"the reduced model is too far from the unreduced one: {'; '.join(failures)}; nothing was written")
        error.report = report(None, 0)
        raise error
    folder.begin()
    start, missing = time.perf_counter(), folder.missing()
    here = sum(len(folder.span(shard)) for shard in missing)
    _run(engine, embedder, collection, folder, missing, batch_size, workers)
    return report(folder.result(), here)


def _run(
    engine: str, embedder: Embedder, collection: Any, folder: VectorFolder, missing: list[int], size: int, workers: int
) -> None:
    from tqdm import tqdm  # type: ignore[import-untyped]

    here = sum(len(folder.span(shard)) for shard in missing)
    total, there = folder.pictures, folder.pictures - here
    with tqdm(total=total, initial=there, desc="embedding", unit="picture", leave=False, disable=None) as bar:
        how: dict[str, Any] = {"batch_size": size, "workers": workers, "tick": bar.update}
        if missing and engine == "ray":
            run_in_ray(embedder, collection.place, folder, missing, **how)
        elif missing:
            run(embedder, collection, folder, missing, **how)


def _check_options(asked: dict[str, Any]) -> None:
    for name, low in (("batch_size", 1), ("forward_size", 1), ("shard_size", 1), ("workers", 0), ("check", 0)):
        if asked[name] is not None and asked[name] < low:
            raise Refusal(f"--{name.replace('_', '-')} must be at least {low}, not {asked[name]}")
    if not asked["check"] and any(asked[name] is not None for name in ("least_cosine", "least_recall")):
        raise Refusal("--least-cosine and --least-recall need --check N, the number of pictures to compare")


def _models(name: str, asked: dict[str, Any]) -> tuple[nn.Module, nn.Module, str]:
    """Return the unreduced model, the one to embed with, and a line on their weights."""
    loaded = open_weights(name, asked["weights"], asked["model_args"])
    saved = find_reduction(loaded.model) is not None
    if asked["method"] is None:
        if asked["keep"] is not None or asked["options"]:
            raise Refusal("--keep and --options are for a method; give --method")
        base = restore_(shared_copy(loaded.model)) if saved else loaded.model
        return base, loaded.model, loaded.line
    if saved:
        raise Refusal(f"the model in {name} is reduced already; leave out --method")
    (config,) = parse_methods([asked["method"]], asked["options"])
    own = reduced(loaded.model, config, (asked["keep"] or KEEP) if config.accepts_keep else None).model
    trained = asked["weights"] is None and not loaded.random and not Path(name).is_dir() and load_scorer(own, name)
    untrained = METHODS[config.info.name].learns and not trained
    return loaded.model, own, f"{loaded.line}; {UNTRAINED}" if untrained else loaded.line


def _checked(base: nn.Module, own: Embedder, collection: Any, how: dict[str, Any], count: int) -> Check:
    if own.reduction is None:
        raise Refusal("--check compares a reduced model with the unreduced one, and this model is not reduced; give --method")
    return check(Embedder(base, **how), own, collection, count)
