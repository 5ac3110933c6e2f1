"""The sections of a recipe: dataclasses whose fields are its keys; each checks its own values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


def _refuse_unless(good: Callable[[Any], bool], words: str, **values: int | float | None) -> None:
    """Raise ValueError for the first value that is not ``good``; ``words`` describe what it must be.

    In the names of values, ``__`` stands for a dot.
    """
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and good(value)):
            raise ValueError(f"{name.replace('__', '.')} must be {words}, not {value}")


def _shares(**values: int | float | None) -> None:
    _refuse_unless(lambda value: 0 <= value <= 1, "between 0 and 1", **values)


def _not_negative(**values: int | float | None) -> None:
    _refuse_unless(lambda value: value >= 0, "0 or more", **values)


def _at_least_one(**values: int | float | None) -> None:
    _refuse_unless(lambda value: value >= 1, "at least 1", **values)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


@dataclass(frozen=True)
class About:
    """The origin of a recipe and its published results. Not used in training."""

    title: str = ""
    paper: str = ""  # arXiv number and table
    source: str = ""  # the source of the settings; settings that are guessed
    top1: float | None = None  # published, in per cent
    gmacs: float | None = None  # published, as the paper counts
    hours: str = ""  # training time and hardware
    measured: str = ""  # our own result and its command


@dataclass(frozen=True)
class ModelPart:
    """The model: a timm name, whether it starts from timm's pretrained weights or from a file, and options for timm."""

    name: str = "scenes_vit_small"
    pretrained: bool = True
    weights: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodPart:
    """The token reduction; without a name there is none. The epochs of the keep-rate warm-in may be fractions.

    Options may change during training: ``later`` maps an epoch (from 0) to the options that change there, ``ramps`` maps an
    option to two numbers, between which it changes linearly over all steps. ``schedule`` replaces ``keep`` and ``at``: a
    table such as {at = [3, 6], keep_counts = [98, 49]} (see `laconic.Schedule.of`; ``laconic plan`` prints one).
    """

    name: str = ""
    keep: float | tuple[float, ...] | None = None
    at: tuple[int, ...] = ()
    schedule: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    later: dict[str, Any] = field(default_factory=dict)
    ramps: dict[str, Any] = field(default_factory=dict)
    warm_in_start: float = 0.0
    warm_in_epochs: float = 0.0

    def __post_init__(self) -> None:
        for epoch, options in self.later.items():
            if not (_is_number(epoch) and isinstance(options, dict)):
                raise ValueError(
                    f"method.later must have a table of options for an epoch, as 200 = {{...}}, not {epoch} = {options!r}"
                )
        for option, ends in self.ramps.items():
            if not (isinstance(ends, list | tuple) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)):
                raise ValueError(f"method.ramps.{option} must be two numbers, as [10.0, 0.1], not {ends!r}")
        for keep in self.keep if isinstance(self.keep, tuple) else (self.keep,):
            _refuse_unless(lambda value: 0 < value <= 1, "above 0 and at most 1", method__keep=keep)
        _not_negative(method__warm_in_start=self.warm_in_start, method__warm_in_epochs=self.warm_in_epochs)

    @property
    def warms_in(self) -> bool:
        """True if the keep rate changes during training."""
        return bool(self.warm_in_start or self.warm_in_epochs)


@dataclass(frozen=True)
class DataPart:
    """The images: "scenes", "digits", "" for an image folder, or a name of one of timm's readers; 0 images means all.

    ``sampler``: every image once an epoch, or ``balanced``: drawn with replacement, every class equally often. ``val_share`` is
    the share of the training images of each class to hold out for validation, by the seed, where the data has no split for it.
    ``val_crop`` is the share of the resized image that is cropped for validation (default: the model's setting in timm).
    """

    name: str = "scenes"
    train: str = "train"
    val: str = "val"
    train_images: int = 0
    val_images: int = 0
    val_crop: float | None = None
    sampler: Literal["uniform", "balanced"] = "uniform"
    val_share: float = 0.0

    def __post_init__(self) -> None:
        _not_negative(data__train_images=self.train_images, data__val_images=self.val_images)
        _refuse_unless(lambda value: 0 < value <= 1, "above 0 and at most 1", data__val_crop=self.val_crop)
        _refuse_unless(lambda value: 0 <= value < 1, "at least 0 and below 1", data__val_share=self.val_share)
        if not self.train:
            raise ValueError("data.train must be the name of a split, for example train")


@dataclass(frozen=True)
class AugmentationPart:
    """timm's augmentation. By default images are only resized; a recipe names every augmentation that it uses."""

    crop: tuple[float, float] | None = None  # shares of the area, for random resized crops; None: resize and centre crop
    hflip: float = 0.0
    vflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str = ""
    erase: float = 0.0
    erase_mode: Literal["const", "rand", "pixel"] = "pixel"
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.0
    repeats: int = 1  # repeated augmentation: number of consecutive copies of an image

    def __post_init__(self) -> None:
        _shares(augmentation__hflip=self.hflip, augmentation__vflip=self.vflip, augmentation__erase=self.erase)
        _shares(augmentation__mixup_prob=self.mixup_prob, augmentation__switch=self.switch)
        _shares(augmentation__smoothing=self.smoothing)
        _not_negative(augmentation__color_jitter=self.color_jitter, augmentation__mixup=self.mixup)
        _not_negative(augmentation__cutmix=self.cutmix)
        _at_least_one(augmentation__repeats=self.repeats)
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1] <= 1:
            raise ValueError(f"augmentation.crop must be two shares of the area, as [0.08, 1.0], not {list(self.crop)}")


@dataclass(frozen=True)
class OptimizationPart:
    """The optimiser, the learning-rate schedule, and the parameters to train.

    ``batch_size`` is the size of one step's batch over all processes. ``lr`` is multiplied by batch_size / lr_base_size (0:
    ``lr`` is absolute). ``warmup``: the cosine starts with the warm-up (``within``, as in timm) or after it (``before``).
    ``update``: the learning rate changes with every step, with every epoch, or with every epoch but one epoch late (as in
    the published code of EViT). The backbone's learning rate is ``backbone_lr_scale`` times that of the scorers, at most
    ``backbone_lr_cap``, and 0 in the first ``freeze_backbone_epochs``. ``lr_scales`` maps endings of parameter names to
    factors. ``fixed`` names parameters that are never trained; ``eval_mode`` trains with the model in evaluation mode (no
    drop path).
    """

    epochs: int = 1
    batch_size: int = 64
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    lr: float = 1e-3
    lr_base_size: int = 0
    min_lr: float = 1e-5
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-6
    warmup: Literal["within", "before"] = "within"
    cooldown_epochs: int = 0
    update: Literal["step", "epoch", "epoch-late"] = "step"
    weight_decay: float = 0.05
    decay_all: bool = False  # biases and norms too
    layer_decay: float | None = None
    backbone_lr_scale: float = 1.0
    backbone_lr_cap: float | None = None
    lr_scales: dict[str, Any] = field(default_factory=dict)
    freeze_backbone_epochs: int = 0
    fixed: tuple[str, ...] = ()
    clip_grad: float = 0.0
    ema: float = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    eval_mode: bool = False
    grad_checkpointing: bool = False

    def __post_init__(self) -> None:
        _at_least_one(optimization__epochs=self.epochs, optimization__batch_size=self.batch_size)
        _refuse_unless(lambda value: value > 0, "positive", optimization__lr=self.lr)
        _refuse_unless(lambda value: 0 < value <= 1, "above 0 and at most 1", optimization__layer_decay=self.layer_decay)
        _refuse_unless(lambda value: value > 0, "positive", optimization__backbone_lr_cap=self.backbone_lr_cap)
        _refuse_unless(lambda value: 0 <= value < 1, "at least 0 and below 1", optimization__ema=self.ema)
        for beta in self.betas:
            _refuse_unless(lambda value: 0 <= value < 1, "at least 0 and below 1", optimization__betas=beta)
        names = ("lr_base_size", "min_lr", "warmup_epochs", "warmup_lr", "cooldown_epochs", "weight_decay", "clip_grad")
        for name in (*names, "backbone_lr_scale", "freeze_backbone_epochs"):
            _not_negative(**{f"optimization__{name}": getattr(self, name)})
        for ending, scale in self.lr_scales.items():
            if not (isinstance(scale, int | float) and math.isfinite(scale) and scale >= 0):
                raise ValueError(
                    f"optimization.lr_scales must have a factor of 0 or more for a parameter's name, not {ending} = {scale!r}"
                )
        most = self.epochs - (self.warmup == "before")
        if self.warmup_epochs > most:
            raise ValueError(
                f"optimization.warmup_epochs must be at most {most}, with {self.epochs} epochs and warmup {self.warmup!r}, not "
                f"{self.warmup_epochs}"
            )


@dataclass(frozen=True)
class LossPart:
    """Weights of the losses added to the cross-entropy: the method's ratio loss, distillation from the unreduced model, and
    token labelling.

    ``class_weights`` weight the classes in the cross-entropies, for data with few images of some: ``balanced``, by the inverse
    of a class's number of images, or ``square-root``, by the square root of that; the mean over the images is 1.
    """

    ratio: float = 2.0
    logits: float = 0.0
    tokens: float = 0.0
    token_kind: Literal["mse", "kl"] = "mse"
    class_weights: Literal["none", "balanced", "square-root"] = "none"
    token_labels: float = 0.0  # classify every patch, if the images have patch labels

    def __post_init__(self) -> None:
        _not_negative(loss__ratio=self.ratio, loss__logits=self.logits, loss__tokens=self.tokens)
        _not_negative(loss__token_labels=self.token_labels)


@dataclass(frozen=True)
class StepPart:
    """The kind of training step, a name in `laconic.training.steps`, and its options; by default the method's own kind."""

    kind: str = ""
    options: dict[str, Any] = field(default_factory=dict)
