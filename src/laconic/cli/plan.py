"""``laconic plan``: turn a budget into a schedule; measure a plan again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from laconic.analysis import machine
from laconic.analysis.evaluate import make_loader
from laconic.analysis.timing import DTYPES, Setting
from laconic.checkpoints.saved_files import digest
from laconic.cli.eval_input import EvalInput, Reading, command, open_eval_input, parse_args
from laconic.cli.models import create, open_model
from laconic.cli.outputs import holds, reported
from laconic.cli.plan_report import CheckReport, PlanReport, checked
from laconic.cli.plan_scores import Scores
from laconic.cli.record import commit
from laconic.cli.variants import parse_methods
from laconic.core.files import Refusal, write_atomically
from laconic.core.method import Method, resolve
from laconic.core.schedule import Schedule
from laconic.data.workers import batches as read_batches
from laconic.planning.budget import Target
from laconic.planning.planner import Planner
from laconic.planning.result import Plan, remarks
from laconic.planning.space import ScheduleSpace
from laconic.planning.timing import Measured, Measuring, measure


@holds("output")
def plan(
    model: str = "",
    /,
    *,
    method: str = "",
    target: str = "",
    options: tuple[str, ...] = (),
    at: tuple[int, ...] = (),
    batch_size: int = 8,
    threads: int | None = None,
    rounds: int | None = None,
    data: str = "",
    split: str = "val",
    limit: int = 512,
    workers: int = 0,
    steps: int = 60,
    seed: int = 0,
    weights: Path | None = None,
    model_args: tuple[str, ...] = (),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    output: Path | None = None,
    check: Path | None = None,
) -> PlanReport | CheckReport:
    """Find the schedule of a method that just meets a budget, and measure it next to the unreduced model.

    Without --data it is the method's default schedule with one keep rate. With images a search finds the blocks and counts
    that change the model's answers least: on half of the images, and the result is reported on the other half.

    Args:
        model: timm name, or a directory that laconic.save wrote.
        method: the method.
        target: 2.3G or 230M multiply-adds of an image, 1.6x as fast (measured), 1.6x-macs, or 12ms for a forward.
        options: option of the method, as NAME=VALUE.
        at: a block to reduce at, zero-based (default: the method's usual ones, or what the search finds).
        batch_size: images in a forward where time is measured.
        threads: CPU threads (default: as many as torch takes by itself).
        rounds: measurements of each model (default: as many as a few seconds allow).
        data: images to search with: scenes, digits, a folder, a .tar, or a timm name.
        split: of the data.
        limit: images at most (0: all); half of them are for the search.
        workers: processes that read images.
        steps: schedules that the search tries.
        seed: of the search.
        weights: weights of the model, a file (default: timm's pretrained ones).
        model_args: argument of timm.create_model, as NAME=VALUE.
        device: cuda where there is one, else cpu.
        dtype: of weights and images.
        output: write the plan (with --check, its measurement) to this JSON file; a stopped search resumes from there.
        check: measure the plan in this file again, here and now; exit code 1 if it is off by more than 10 %.

    Raises:
        Refusal: something is missing, a plan that is off, a file that cannot be read or written.
        LookupError, TypeError, ValueError, OSError: as `laconic.plan` and `laconic.data.open_images`.
    """
    asked = {name: value for name, value in locals().items() if name != "model"}
    if check is not None:
        return checked_again(check, (model, method, target, data), rounds, output)
    missing = [name for name, value in (("MODEL", model), ("--method", method), ("--target", target)) if not value]
    if missing:
        raise Refusal(f"{' and '.join(missing)} missing; e.g. laconic plan deit_small_patch16_224 --method etps --target 2.3G")
    budget, (config,) = Target.parse(target), parse_methods([method], options)
    setting = Setting(rounds=rounds or 1, threads=threads, device=device, dtype=dtype)
    reading = Reading(split=split, limit=limit, workers=workers)
    eval_input = open_eval_input(model, data, reading, weights, model_args) if data else None
    base = opened(model, model_args) if eval_input is None else eval_input.base
    base = base.to(setting.place, DTYPES[setting.dtype]).eval()
    question = {"model": model, "model_args": list(model_args), "method": config.describe(), "target": target, "at": list(at)}
    here = {"batch_size": batch_size, "threads": threads, "device": setting.place.type, "dtype": dtype}
    with machine.prepared(setting):
        measuring = Measuring(batch_size, rounds)
        facts: dict[str, Any] = {"budget": budget, "at": at or None, "measuring": measuring}
        if eval_input is None:
            found = Planner(ScheduleSpace(base, config), budget, at or None, measuring).plain()
        else:
            read = {"data": data, "split": split, "limit": limit, "seed": seed, "weights": digest(base)}
            scores = Scores(None if output is None else output.with_suffix(".search.jsonl"), {**question, **here, **read})
            found = searched(base, config, eval_input, reading, scores, steps, seed, **facts)
        found = timed(found, base, config, measuring)
        environment = {name: fact for name, fact in machine.environment(setting).items() if name not in ("rounds", "compiled")}
    about = {**question, **here, "command": command("plan", model, asked), "commit": commit(), "environment": environment}
    about["weights"] = "" if eval_input is None else eval_input.weights
    about["data"] = "" if eval_input is None else f"{data}, {split}, {len(eval_input.images)} images"
    report = PlanReport(found, about, () if eval_input is None else tuple(eval_input.notes))
    if output is not None:
        with reported(report):
            write_atomically(output, json.dumps(report.to_json(), indent=2) + "\n")
    return report


def opened(model: str, model_args: Sequence[str]) -> nn.Module:
    """Open a model without caring for its weights."""
    return create(model, **parse_args(model_args)) if model_args else open_model(model)


def searched(
    base: nn.Module,
    config: Method,
    eval_input: EvalInput,
    reading: Reading,
    scores: Scores,
    steps: int,
    seed: int,
    *,
    budget: Target,
    at: Sequence[int] | None,
    measuring: Measuring,
) -> Plan:
    """Return a plan by search on the images."""
    if eval_input.random:
        raise Refusal(f"{eval_input.weights}; a search by them would find nothing. Give --weights, or plan without --data")
    images, labels = pixels_of(base, eval_input, reading)
    planner = Planner(ScheduleSpace(base, config), budget, at, measuring, scores.table)
    scores.begin(planner.table)
    return planner.searched(images, labels, steps, seed, scores.remember)


def pixels_of(base: nn.Module, eval_input: EvalInput, reading: Reading) -> tuple[Tensor, Tensor]:
    """Return all images that can be read, as the model takes them, and their labels.

    Raises:
        Refusal: there are fewer than four.
    """
    pixels, labels, _ = readable(base, eval_input, reading)
    return pixels, labels


def readable(base: nn.Module, eval_input: EvalInput, reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
    """Return all images that can be read, as the model takes them, their labels, and their numbers in the set.

    Raises:
        Refusal: there are fewer than four.
    """
    pixels, labels, numbers = list[Tensor](), list[Tensor](), list[Tensor]()
    loader = make_loader(base, eval_input.images, reading.batch_size, reading.workers)
    for batch, names, index, failed in read_batches(loader):
        for found, values in ((pixels, batch), (labels, names), (numbers, index)):
            found.append(values[failed < 0])
    whole = torch.cat(pixels)
    if len(whole) < 4:
        raise Refusal(f"{len(whole)} images can be read; a search and its test need four or more, and better some hundreds")
    return whole, torch.cat(labels), torch.cat(numbers)


def timed(plan: Plan, base: nn.Module, config: Method, measuring: Measuring) -> Plan:
    """Return the plan with its time measured: a budget of multiply-adds says nothing of time."""
    if plan.measured is not None:
        return plan
    measured = measure(ScheduleSpace(base, config), [plan.schedule], measuring)[0]
    return dataclasses.replace(plan, measured=measured, notes=(*plan.notes, *remarks(measured, plan.target)))


# ------------------------------------------------------------------------------------------------ measured again
def checked_again(path: Path, others: Sequence[str], rounds: int | None, output: Path | None) -> CheckReport:
    """Measure a plan that was written before; write the result, then refuse a plan that is off.

    Raises:
        Refusal: the file is no plan, more was asked for, or the plan is off by more than 10 %.
    """
    if any(others):
        raise Refusal("--check measures the plan in a file, which knows its model and target; leave out everything else")
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        target, schedule = Target.parse(old["target"]["text"]), Schedule.of(old["schedule"])
        before, macs, given = Measured.of_json(old["measured"]), old["macs"], old["method"]
        named, base = (old["model"], old["model_args"]), old.get("base_seconds") or before.base_seconds.median
        setting = Setting(rounds=1, threads=old["threads"], device=old["device"], dtype=old["dtype"])
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise Refusal(f"--check {path} is not a plan that laconic wrote ({error})") from error
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in given["options"].items()}
    with machine.prepared(setting):
        model = opened(*named).to(setting.place, DTYPES[setting.dtype]).eval()
        space = ScheduleSpace(model, resolve(given["name"], options))
        now = measure(space, [schedule], Measuring(before.batch_size, rounds))[0]
        summary = space.summary(schedule)
        environment = {name: fact for name, fact in machine.environment(setting).items() if name not in ("rounds", "compiled")}
    found = None if summary is None else summary.macs
    if found != macs:
        raise Refusal(f"--check {path}: the schedule is said to take {macs} multiply-adds, and takes {found}")
    report = CheckReport(path.name, target, before, now, macs, base, environment)
    if output is not None:
        with reported(report):
            write_atomically(output, json.dumps(report.to_json(), indent=2) + "\n")
    return checked(report)
