"""Small random models that take clips, and what the tests need to run them."""

from __future__ import annotations

import torch

from families import BEFORE, CLASS_SCORED, METHODS, OF_CLIPS, VARIABLE, fill
from laconic.core.backbone import find_host
from laconic.core.token_reduction import reduction_of

FRAMES, SIDE, TUBELET, PATCH = 8, 32, 2, 8
GRID = (FRAMES // TUBELET, SIDE // PATCH, SIDE // PATCH)
PATCHES = 64
WIDTH = dict(hidden_size=48, num_hidden_layers=4, num_attention_heads=3, patch_size=PATCH, tubelet_size=TUBELET, num_labels=10)
VIDEOMAE = WIDTH | dict(intermediate_size=96, image_size=SIDE, num_frames=FRAMES)
PREDICTOR = dict(pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=2)
VJEPA = WIDTH | PREDICTOR | dict(mlp_ratio=2, crop_size=SIDE, frames_per_clip=FRAMES, num_pooler_layers=2)
CLIPS = {  # model class, config class, config
    "videomae": ("VideoMAEForVideoClassification", "VideoMAEConfig", VIDEOMAE),
    "videomae-model": ("VideoMAEModel", "VideoMAEConfig", VIDEOMAE),
    "videomae-norm": ("VideoMAEModel", "VideoMAEConfig", VIDEOMAE | dict(use_mean_pooling=False)),
    "vjepa2": ("VJEPA2ForVideoClassification", "VJEPA2Config", VJEPA),
    "vjepa2-model": ("VJEPA2Model", "VJEPA2Config", VJEPA),
}
CLASSIFIERS = ("videomae", "vjepa2")
AT = (1, 2, 3)
# these have their result in a class token, or work on the grid of an image
REFUSED = {"avit": "class token", "adaptive-patch": "takes clips", "spatial-pool": "takes clips"}
SERVED = sorted({*METHODS, *OF_CLIPS} - set(REFUSED))


def make(name, **changes):
    """A small random model in evaluation mode, the same one each time."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model, config, arguments = CLIPS[name]
    return fill(getattr(transformers, model)(getattr(transformers, config)(**{**arguments, **changes})).eval())


def clips(batch=3, frames=FRAMES):
    """Random clips, the same ones each time."""
    return torch.randn(batch, frames, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def arguments(method):
    """The arguments of `laconic.reduce_` for a method on these models, which have no class token."""
    given = {"score": "mean-query"} if method in CLASS_SCORED else {}
    given |= {} if method in VARIABLE else {"keep": 0.6}
    return given if method in BEFORE | OF_CLIPS else {**given, "at": AT}


def reduced(name, method, **more):
    """A reduced model; what its method learns is random, the same each time."""
    import laconic

    given = {**arguments(method), **more}
    if given.get("schedule") is not None:
        given = {key: value for key, value in given.items() if key not in ("keep", "at")}
    model = laconic.reduce_(make(name), method, **given)
    torch.manual_seed(2)
    fill(reduction_of(model))
    return model


def answer(model, x, **more):
    """The logits, or the features; of V-JEPA 2 without its predictor."""
    if type(model).__name__ == "VJEPA2Model":
        more = {"skip_predictor": True, **more}
    with torch.no_grad():
        out = model(x, **more)
    return out.logits if "logits" in out else out.last_hidden_state


def pooled(model, x):
    """The logits, or the mean of the features."""
    out = answer(model, x)
    return out if out.dim() == 2 else out.mean(1)


def blocks(model):
    """The blocks that laconic reduces."""
    host, entry = find_host(model)
    return entry.blocks(host)
