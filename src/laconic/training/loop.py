"""The training loop, for one or several processes, with or without token reduction; a stopped run resumes exactly.

The randomness of a step (Gumbel noise, drop path, mixup) comes from generators seeded by the recipe's seed, the step and the
process; the augmentation of an image is seeded by the seed, the epoch and the image. A run that was killed and resumed
therefore gives the same numbers as an uninterrupted one, and the checkpoint needs no random states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from laconic.analysis.evaluate import Accuracy, Processes, evaluate
from laconic.core import signals
from laconic.core.files import check_room
from laconic.core.token_reduction import find_reduction
from laconic.training.balance import class_weights
from laconic.training.batches import Batch, Batches
from laconic.training.finite_checks import check_loss, check_weights
from laconic.training.input_pipeline import mixer, seed_everything
from laconic.training.objective import Change, Objective, Step
from laconic.training.optimization import LearningRate, make_optimizer
from laconic.training.processes import agree, gather_names, join
from laconic.training.run_config import Run
from laconic.training.schedule_changes import KeepRate, Options
from laconic.training.state import CHECKPOINT, Metrics, Progress, load_checkpoint, save_checkpoint, save_weights
from laconic.training.steps import asked_for
from laconic.training.token_labels import head_for


class Loop:
    """Trainer of one `Run`, for one call of `go`. The constructor waits for all processes."""

    def __init__(self, run: Run, resume: bool) -> None:
        self.run, self.part = run, run.recipe.optimization
        # a softly dropped token has weight 1e-30; multiplied by a small gradient it gives denormal numbers, which CPUs
        # process so slowly that a step takes three times as long
        torch.set_flush_denormal(True)
        kind, options = asked_for(run.recipe)
        reduction = find_reduction(run.model)
        learns = reduction is not None and next(reduction.parameters(), None) is not None
        unused = learns and run.recipe.method.warms_in  # while all tokens are kept, the scorers are not used
        self.accelerator = join(run.recipe, run.running, run.output, unused=unused or options.unused)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.model = run.model.to(self.accelerator.device)
        if run.teacher is not None:
            run.teacher.to(self.accelerator.device).eval().requires_grad_(False)
        seed_everything(run.recipe.seed, 2)
        self.labelled = head_for(self.model, run.recipe.loss.token_labels, len(run.train.classes))
        weights = class_weights(run.train, run.recipe.loss.class_weights)
        self.step_module: Step = kind.make(Objective(self.model, run.teacher, run.recipe.loss, self.labelled, weights), options)
        self.optimizer = make_optimizer(self.model, self.part)
        if self.labelled is not None:
            facts = {"lr": self.optimizer.param_groups[0]["lr"], "lr_scale": 1.0, "backbone": False, "weight_decay": 0.0}
            self.optimizer.add_param_group({"params": list(self.labelled.parameters()), **facts})
        grid = None if self.labelled is None else tuple(cast(Any, self.model).patch_embed.grid_size)
        pinned = self.accelerator.device.type == "cuda"
        self.batches = Batches(run, self.rank, self.world, pinned=pinned, grid=grid)
        self.steps = self.batches.steps
        self.rate = LearningRate(self.optimizer, self.part, self.steps)
        self.objective = self.accelerator.prepare(self.step_module)
        self.prepared = self.accelerator.prepare(self.optimizer)
        self.ema = self._averages()
        share = self.part.batch_size // (self.world * run.running.accumulate)
        self.mix = mixer(run.recipe.augmentation, len(run.train.classes), share)
        self.changes = self._changes()
        self.progress = self._resumed() if resume else Progress()
        self.signal, self.stopping, self.total = signals.Noted(), False, self.rate.epochs * self.steps
        if not resume:
            weights = sum(tensor.nbytes for tensor in self.model.state_dict().values())
            check_room(run.output / CHECKPOINT, 2 * weights)  # at the least, for the checkpoint and the trained model

    # -------------------------------------------------------------------------------------------- before the first step
    def _averages(self) -> Any:
        from timm.utils import ModelEmaV3  # type: ignore[attr-defined]

        return ModelEmaV3(self.model, decay=self.part.ema) if self.part.ema else None

    def _changes(self) -> list[Change]:
        """Return all per-step changes of the run, for the model and its moving average."""
        models = [self.model] if self.ema is None else [self.model, self.ema.module]
        found = [one for model in models if (one := find_reduction(model)) is not None]
        method, epochs = self.run.recipe.method, self.part.epochs
        own: list[Change] = [KeepRate(found, method, self.steps), Options(found, method, self.steps, epochs)]
        return [*own, *self.step_module.changes(models, self.steps, epochs)]

    def _states(self) -> dict[str, Any]:
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.labelled is not None:
            states["token_labels"] = self.labelled.state_dict()
        if self.ema is not None:
            states["ema"] = self.ema.module.state_dict()
        if self.accelerator.scaler is not None:
            states["scaler"] = self.accelerator.scaler.state_dict()
        return states

    def _resumed(self) -> Progress:
        progress, states = load_checkpoint(self.run.output, self.run.recipe, self.run.data)
        self.model.load_state_dict(states["model"])
        self.optimizer.load_state_dict(states["optimizer"])
        if self.labelled is not None:
            self.labelled.load_state_dict(states["token_labels"])
        if self.ema is not None:
            self.ema.module.load_state_dict(states["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(states["scaler"])
        return progress

    # -------------------------------------------------------------------------------------------- the steps
    def go(self) -> dict[str, Accuracy]:
        """Train to the end of the recipe; return the last accuracies of the model ("val") and its average ("val_ema").

        Raises:
            Stopped: SIGTERM or SIGUSR1 came; the step was finished and a checkpoint written.
        """
        metrics = Metrics(self.run.output, self.progress) if self.accelerator.is_main_process else None
        total, running = self.total, self.run.running
        with self._bar(total) as bar, signals.handling(self.signal.note):
            accuracies = self._catch_up(metrics)
            while self.progress.step < total:
                epoch, start = divmod(self.progress.step, self.steps)
                for batches in self.batches.of_steps(epoch, start):
                    row = self._step(batches)
                    bar.update()
                    bar.set_postfix(loss=f"{row['loss']:.3f}")
                    if self.progress.step % running.log_every == 0:
                        self._log(metrics, row)
                    self._stop_if_asked()
                    every = running.checkpoint_every
                    if every and self.progress.step % every == 0 and self.progress.step % self.steps:
                        self._checkpoint()
                accuracies = self._end_epoch(metrics) or accuracies
        self.run.unreadable.update(gather_names(self.accelerator, self.run.unreadable))
        if running.trackers:
            self.accelerator.end_training()
        return accuracies

    def _bar(self, total: int) -> Any:
        from tqdm import tqdm  # type: ignore[import-untyped]

        quiet = True if not self.accelerator.is_main_process else None
        return tqdm(total=total, initial=self.progress.step, desc="training", unit="step", disable=quiet, leave=False)

    def _step(self, batches: Sequence[Batch]) -> dict[str, Any]:
        step, device = self.progress.step, self.accelerator.device
        for change in self.changes:
            change.set(step)
        rate = self.rate.set(step)
        self.objective.train(not self.part.eval_mode)
        parts = list[dict[str, Tensor]]()
        for number, (pixels, labels, patches) in enumerate(batches):
            seed_everything(self.run.recipe.seed, 1, step, number, self.rank)
            pixels, target = self.mix(pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True))
            with self._synchronised(number == len(batches) - 1), self.accelerator.autocast():
                part = self.objective(pixels, target, None if patches is None else patches.to(device))
                self.accelerator.backward(part["loss"] / len(batches))
            parts.append({name: value.detach() for name, value in part.items()})
        row: dict[str, Any] = dict(self._mean(parts))
        check_loss(row, step, self.run.output)
        if self.part.clip_grad:
            row["gradient_norm"] = self.accelerator.clip_grad_norm_(self.objective.parameters(), self.part.clip_grad)
        self.prepared.step()
        self.prepared.zero_grad(set_to_none=True)
        self.progress.step = step + 1
        self.progress.unvalidated = self._due()
        if self.ema is not None:
            self.ema.update(self.model, step + 1)
        return {"step": step + 1, "epoch": step // self.steps, "lr": rate, **row}

    def _synchronised(self, last: bool) -> Any:
        """Return the context that synchronises gradients between processes at the last micro-batch only."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.objective)

    def _mean(self, parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        """Return each part of the loss, mean over micro-batches and processes; waits for the device, once per step."""
        names = list(parts[0])
        values = torch.stack([torch.stack([part[name].float() for part in parts]).mean() for name in names])
        return dict(zip(names, self._reduced(values), strict=True))

    def _reduced(self, values: Tensor) -> list[float]:
        """Return the mean of values over the processes; with them, all learn of a signal that one of them was sent."""
        asked = torch.tensor([float(self.signal.number != 0)], device=values.device)
        *means, share = self.accelerator.reduce(torch.cat([values, asked]), "mean").tolist()
        self.stopping = share > 0
        return means

    # -------------------------------------------------------------------------------------------- logging, validation, saving
    def _log(self, metrics: Metrics | None, row: dict[str, Any]) -> None:
        plain = {name: value.item() if isinstance(value, Tensor) else value for name, value in row.items()}
        if metrics is not None:
            metrics.add(plain)
        if self.run.running.trackers:
            self.accelerator.log(plain, step=plain["step"])

    def _due(self) -> bool:
        """Return True if the epoch that ends at this step is to be validated."""
        epochs, rest = divmod(self.progress.step, self.steps)
        due = epochs % self.run.running.eval_every == 0 or self.progress.step == self.total
        return self.run.val is not None and not rest and due

    def _models(self) -> dict[str, nn.Module]:
        return {"val": self.model} if self.ema is None else {"val": self.model, "val_ema": self.ema.module}

    def _catch_up(self, metrics: Metrics | None) -> dict[str, Accuracy]:
        """Do what a run that was resumed left undone after its last step: the best weights, or the validation."""
        best, found = self.progress.best_step == self.progress.step, dict[str, Accuracy]()
        if best or self.progress.unvalidated:
            for change in self.changes:
                change.set(self.progress.step - 1)
        if best:
            self._write_best()
        return self._end_epoch(metrics) if self.progress.unvalidated else found

    def _end_epoch(self, metrics: Metrics | None) -> dict[str, Accuracy]:
        """Validate, if it is time; write the checkpoint, and after it the weights if they are the best so far.

        A validation that a signal interrupts is done again when the run is resumed.
        """
        check_weights(self.model, self.progress.step, self.run.output)
        found = dict[str, Accuracy]()
        if self.progress.unvalidated:
            try:
                with signals.handling(signals.stop) if self.world == 1 else contextlib.nullcontext():
                    found = self._validate(self.run.val)
            except signals.Stopped as stopped:
                self.signal.note(stopped.number)
                self._stop_if_asked()
            self._note(found, metrics)
        self.progress.unvalidated = False
        self._checkpoint()
        if self.progress.best_step == self.progress.step:
            self._write_best()
        if self.world > 1:
            self._reduced(torch.zeros(0, device=self.accelerator.device))
        if self.progress.step < self.total:
            self._stop_if_asked()
        return found

    def _validate(self, images: Any) -> dict[str, Accuracy]:
        """Return the accuracy on the validation images, of the model and of its moving average."""
        models, out = self._models(), dict[str, Accuracy]()
        agree(self.accelerator, *models.values())
        for name, trained in models.items():
            out[name] = evaluate(
                self.step_module.product(trained),
                images,
                batch_size=min(256, max(1, self.part.batch_size // self.world)),
                workers=self.run.running.workers,
                processes=Processes(self.rank, self.world, lambda table: self.accelerator.reduce(table, "sum")),
                crop=self.run.recipe.data.val_crop,
            )
        return out

    def _note(self, accuracies: dict[str, Accuracy], metrics: Metrics | None) -> None:
        """Log accuracies, and note the best so far, once all changes of the schedule are complete."""
        step, complete = self.progress.step, all(change.arrived(self.progress.step - 1) for change in self.changes)
        for name, found in accuracies.items():
            row = {"step": step, "epoch": step // self.steps - 1, f"{name}_top1": found.top1, f"{name}_top5": found.top5}
            self._log(metrics, {**row, f"{name}_loss": found.loss})
            if found.top1 > self.progress.best and complete:
                self.progress.best, self.progress.best_step, self.progress.best_of = found.top1, step, name

    def _write_best(self) -> None:
        if self.accelerator.is_main_process:
            model = self.step_module.product(self._models()[self.progress.best_of])
            save_weights(model, self.run.output / "best", self.run.recipe.model.options)
        self.accelerator.wait_for_everyone()

    def _checkpoint(self) -> None:
        check_weights(self.model, self.progress.step, self.run.output)
        if self.accelerator.is_main_process:
            save_checkpoint(self.run.output, self.progress, self.run.recipe, self._states(), self.run.data)
        self.accelerator.wait_for_everyone()

    def _stop_if_asked(self) -> None:
        """Write a checkpoint and stop, if a signal came to this process or, after a step, to another one.

        Raises:
            Stopped: it did; the message of the main process says how to continue.
        """
        if not (self.signal.number if self.world == 1 else self.stopping):
            return
        self._checkpoint()
        path, step = self.run.output / CHECKPOINT, self.progress.step
        kept = f"after step {step} of {self.total}, which is in {path}; the same command with --resume continues from there"
        raise signals.Stopped(self.signal.number or signals.STOPPING[0], kept if self.accelerator.is_main_process else "")

    def save(self) -> Path:
        """Write the trained model and return its path.

        If there is a moving average, it is written as ``model``, and the model itself as ``unaveraged``.
        """
        for change in self.changes:
            change.finish()
        self.run.model = self.step_module.product(self.model)
        models = {"model": self.run.model}
        if self.ema is not None:
            models = {"model": self.step_module.product(self.ema.module), "unaveraged": self.run.model}
        if self.accelerator.is_main_process:
            with signals.handling(self.signal.note):  # it takes no longer than to stop
                for name, model in models.items():
                    save_weights(model, self.run.output / name, self.run.recipe.model.options)
        self.accelerator.wait_for_everyone()
        return self.run.output / "model"
