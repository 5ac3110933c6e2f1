"""Settings of a short training run, as KEY=VALUE: a tiny transformer without batch norm, on 24 scenes; three steps an epoch."""

SHAPE = {"img_size": 40, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 4}
BASE = (
    "model.name=vit_tiny_patch16_224",
    "model.pretrained=false",
    *(f"model.options.{key}={value}" for key, value in SHAPE.items()),
    "data.train_images=24",
    "data.val_images=8",
    "optimization.batch_size=8",
    "optimization.epochs=2",
)
EVIT = ("method.name=evit", "method.keep=0.6", "method.at=[1, 2]")
