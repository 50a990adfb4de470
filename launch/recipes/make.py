"""Writes the recipes, so that every number stands once: here, with its source.

    python launch/recipes/make.py      # rewrites *.yaml and README.md beside this file

Change a number here, run it, look at the difference. A test holds the files equal to this.
"""

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from dist_looksam.run import dryrun
from dist_looksam.settings.config import Settings

HERE = Path(__file__).parent
METHODS = ("adamw", "lamb", "sam", "look_sam", "layer_sam", "look_layer_sam")
BATCHES = (4096, 8192, 16384, 32768, 65536)
GPUS_OF_NODE = 8
FIRST = 4096  # the batch that learning rates and warm-up belong to

# What the short names in brackets stand for. "Second-hand": read about, its tables not seen.
SOURCES = {
    "chen": "Chen et al., arXiv:2106.01548: SAM on ViTs; second-hand",
    "gsam": "big_vision, configs/proj/gsam/vit_i1k_gsam_no_aug.py: read; falls linearly",
    "look": "Liu et al., arXiv:2203.02714: LookSAM, Look-LayerSAM; second-hand",
    "vit": "Dosovitskiy et al., arXiv:2010.11929: ViT-B/16 from scratch on ImageNet",
    "m": "Foret et al., arXiv:2010.01412, section 4.1: SAM gains more as m falls",
    "colossal": "ColossalAI, examples/vit-b16: read; with dropout 0.1, which our ViT lacks",
    "deit3": "DeiT III, arXiv:2204.07118: commands and engine.py of its code, read",
    "lamb": "You et al., arXiv:1904.00962: lr as the square root of the batch",
    "mae": "He et al., arXiv:2111.06377: their code's FINETUNE.md, ViT-B: read",
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network, where it runs, and the radii that go with its size."""

    title: str
    nodes: int
    most: int  # samples per forward
    norm: float  # ||w|| of its initial weights, seed 0; a test measures it
    rho: float  # of model scope: [chen]
    m: int  # samples that climb together: a GPU's at batch 4,096


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base optimizer at batch 4,096."""

    lr: float
    weight_decay: float
    source: str


@dataclass(frozen=True, kw_only=True)
class DeiT3:
    """What DeiT III's command says of a size, at batch 2,048."""

    lr: float
    drop_path: float
    image_size: int


MODELS = {
    "vit_s16": Model(title="ViT-S/16", nodes=2, most=1024, norm=207.8, rho=0.1, m=256),
    "vit_b16": Model(title="ViT-B/16", nodes=8, most=512, norm=293.5, rho=0.2, m=64),
    "deit3_s16": Model(title="DeiT III-S/16", nodes=2, most=1024, norm=207.8, rho=0.1, m=256),
    "deit3_b16": Model(title="DeiT III-B/16", nodes=8, most=512, norm=293.5, rho=0.2, m=64),
}
DEIT3 = {
    "deit3_s16": DeiT3(lr=0.004, drop_path=0.05, image_size=224),
    "deit3_b16": DeiT3(lr=0.003, drop_path=0.2, image_size=192),
}
OF_DEIT3 = ("lamb", "look_layer_sam")
BASES = {
    "adamw": Base(lr=0.003, weight_decay=0.3, source="[chen] [gsam]"),
    "lamb": Base(lr=0.01, weight_decay=0.1, source="[look]"),
}
BASE_OF = {"adamw": "adamw", "sam": "adamw", "look_sam": "adamw"}  # the others: lamb
EPOCHS, WARMUP, CLIP, K, ALPHA = 300, 10_000, 1.0, 5, 0.7
SAVE_EVERY, KEEP = 2000, 2  # at batch 4,096

PUBLIC = ("vit_b16", "lamb_public", 32768)  # the one public recipe at such a batch

FINETUNE = ("vit_b16", "finetune", 1024)  # from given weights
PLAIN = [m for m in MODELS if m not in DEIT3]
ALL = [*((m, o, b) for m in PLAIN for o in METHODS for b in BATCHES), PUBLIC, FINETUNE]
ALL += [(m, o, b) for m in DEIT3 for o in OF_DEIT3 for b in BATCHES]
MARK = "<!-- from here on make.py writes -->"
COLUMNS = (
    "recipe", "steps", "warm-up", "lr", "decay", "rho", "precision", "passes", "GPUs", "hours",
    "GPU-hours",
)  # fmt: skip

Line = tuple[str, Any, str]  # setting, value, what a reader should know of it


def name_of(model: str, method: str, batch: int) -> str:
    return f"{model}-{method}-{batch // 1024}k"


def _rho(model: Model, method: str) -> Line:
    if "layer" not in method:
        return "rho", model.rho, "[chen]; the same at every batch: extrapolated, tune"
    rule = (
        f"no source: as long as [chen]'s {model.rho:g} at the start, / ||w|| {model.norm:g}; tune"
    )
    return "rho", round(model.rho / model.norm, 4), rule


def _sharpness(model: Model, method: str) -> list[Line]:
    if "sam" not in method:
        return []
    lines = [_rho(model, method), ("m", model.m, "[m], see above; the same at every batch: tune")]
    if "look" in method:
        lines += [
            ("k", K, "[look]"),
            ("alpha", ALPHA, "[look]"),
            ("reuse", "paper", "[look]; for look_sam above `natural` in our miniature of 64k"),
        ]
    return lines


def _public() -> list[Line]:
    """The settings of the public recipe: those of ours with its numbers."""
    model, _, batch = PUBLIC
    ours = {name: (value, said) for name, value, said in lines_of(model, "lamb", batch)}
    del ours["lr_base_batch"]
    own = {
        "augment": (
            "crop,flip,mixup",
            "[colossal]: mixup 0.2, no RandAugment; the rest ours",
        ),
        "epochs": (300, "[colossal]"),
        "lr": (0.018, "[colossal]; by our rule 0.0283 here"),
        "lr_scaling": ("none", "[colossal] gives lr for this batch"),
        "warmup_steps": (5865, "150 of the 300 epochs [colossal], which raises lr once an epoch"),
        "schedule": ("linear", "[colossal]"),
        "weight_decay": (0.1, "[colossal]"),
        "clip": (1.0, "[colossal]"),
        "precision": ("fp16", "[colossal]"),
    }
    return [(name, *line) for name, line in (ours | own).items()]


def _deit3(model: str, method: str, batch: int) -> list[Line]:
    """The settings of a recipe after DeiT III: those of ours with its numbers."""
    ours = {name: (value, said) for name, value, said in _ours(model, method, batch)}
    its, scaled = DEIT3[model], DEIT3[model].lr * sqrt(batch / 2048)
    del ours["warmup_steps"]
    smaller = its.image_size < ours["image_size"][0]
    then = ", which then fine-tunes 20 epochs at 224" if smaller else ""
    warmup = {"warmup_epochs": (5, "[deit3]; at other batches as many images: extrapolated")}
    own = {
        "image_size": (its.image_size, f"[deit3]{then}"),
        "augment": (
            "crop,flip,3augment,jitter:0.3,mixup:0.8,cutmix:1,repeat:4",
            "[deit3], which repeats 3 times: no power of two has 3",
        ),
        "epochs": (800, "[deit3]"),
        "lr": (its.lr, f"at 2,048 [deit3]; {scaled:.3g} here"),
        "lr_base_batch": (2048, ""),
        "schedule": ("cosine", "[deit3], to 1e-5; here to 0"),
        "weight_decay": (0.05, "[deit3]; its table has 0.02: second-hand"),
        "eps": (1e-8, "of timm's optimizers, as [deit3]; gradients of this loss are small"),
        "clip": (1.0, "[deit3]: FusedLAMB's"),
        "drop_path": (its.drop_path, "[deit3], in every block; here growing to it"),
        "loss": ("bce", "[deit3]"),
        "bce_target_thresh": (0, "[deit3]: both classes of a mixed image have target 1"),
    }
    return [(name, *line) for name, line in (ours | warmup | own).items()]


def _finetune() -> list[Line]:
    """The settings of the fine-tuning of MAE."""
    model, _, batch = FINETUNE
    own = "for the weights of MAE; for others"
    return [
        ("model", model, ""),
        ("init", "/data/vit_b16.safetensors", "yours: --init, also timm:NAME or a run"),
        ("data", "folder", "any images in train/CLASS and val/CLASS"),
        ("data_dir", "/data/imagenet", "yours: --data_dir"),
        ("image_size", 224, "positions of another size are interpolated"),
        ("augment", "crop,flip,randaugment,erasing:0.25,mixup:0.8,cutmix:1", "[mae]"),
        ("epochs", 100, "[mae]"),
        ("batch_size", batch, "[mae]"),
        ("micro_batch", 128, "per GPU and forward; changes no result"),
        ("ranks", GPUS_OF_NODE, "that --dry_run checks for"),
        ("optimizer", "adamw", ""),
        ("lr", 5e-4, f"[mae], at 256, 0.002 here; {own} tune"),
        ("lr_scaling", "linear", "[mae]"),
        ("lr_base_batch", 256, ""),
        ("layer_decay", 0.65, f"[mae]; {own} tune"),
        ("warmup_epochs", 5, "[mae]"),
        ("schedule", "cosine", "[mae]"),
        ("weight_decay", 0.05, "[mae]"),
        ("drop_path", 0.1, "[mae]"),
        ("label_smoothing", 0.1, "[mae]"),
        ("clip", None, "[mae] clips nothing"),
        ("precision", "bf16", ""),
        *_backend("adamw"),
        ("save_every", SAVE_EVERY, ""),
        ("keep", KEEP, "checkpoints; 0 keeps all"),
    ]


def lines_of(model: str, method: str, batch: int) -> list[Line]:
    """The settings of a recipe, in the order in which they are written."""
    if (model, method, batch) == PUBLIC:
        return _public()
    if (model, method, batch) == FINETUNE:
        return _finetune()
    return (_deit3 if model in DEIT3 else _ours)(model, method, batch)


def _ours(model: str, method: str, batch: int) -> list[Line]:
    of, base = MODELS[model], BASE_OF.get(method, "lamb")
    start, ranks, times = BASES[base], of.nodes * GPUS_OF_NODE, batch // FIRST
    there = "" if times == 1 else f", {start.lr * sqrt(times):.3g} here"
    guess = "; of an unknown batch: tune" if base == "lamb" else ""
    spread = "[gsam]" if times == 1 else "10,000 at 4,096 [gsam], as many images: extrapolated"
    half = "sam" in method
    return [
        ("model", model, ""),
        ("data", "folder", ""),
        ("data_dir", "/data/imagenet", "yours: --data_dir"),
        ("image_size", 224, ""),
        ("augment", "crop,flip", "[chen] [gsam]"),
        ("epochs", EPOCHS, "[chen] [gsam]"),
        ("batch_size", batch, ""),
        ("micro_batch", min(of.most, batch // ranks), "per GPU and forward; changes no result"),
        ("ranks", ranks, "that --dry_run checks for"),
        ("optimizer", method, ""),
        ("base", base, ""),
        ("lr", start.lr, f"at 4,096 {start.source}{there}{guess}"),
        ("lr_scaling", "sqrt", "[lamb]; for other batches and methods extrapolated: tune"),
        ("lr_base_batch", FIRST, ""),
        ("warmup_steps", WARMUP // times, spread),
        ("schedule", "cosine", "[vit]"),
        ("weight_decay", start.weight_decay, start.source),
        ("clip", CLIP, "[chen] [gsam] [look]"),
        *_sharpness(of, method),
        ("precision", "fp16" if half else "bf16", "see above" if half else ""),
        *_backend(method),
        ("save_every", SAVE_EVERY // times, "about every 6 epochs"),
        ("keep", KEEP, "checkpoints; 0 keeps all"),
    ]


def _backend(method: str) -> list[Line]:
    if "sam" in method:
        return [("backend", "ddp", "ZeRO in 16 bits cannot let so few samples climb: see above")]
    stage = ("zero_stage", 1, "sends gradients once a step, however many micro-batches")
    return [("backend", "zero", ""), stage]


def outcome_of(lines: list[Line]) -> dryrun.Outcome:
    settings = Settings(**{name: value for name, value, _ in lines})
    assert settings.ranks is not None
    return dryrun.check(settings, ranks=settings.ranks, opened=False)


def _nodes(outcome: dryrun.Outcome) -> int:
    return outcome.ranks // GPUS_OF_NODE


def _commands(name: str, nodes: int) -> list[str]:
    file = f"--config launch/recipes/{name}.yaml"
    rest = f"      --data_dir /data/imagenet --out runs/{name}"
    tasks = f"--ntasks-per-node {GPUS_OF_NODE} --gpus-per-node {GPUS_OF_NODE} --cpus-per-task 12"
    return [
        f"  deepspeed --hostfile cluster/hostfile --num_nodes {nodes} train.py \\",
        f"      {file} \\",
        f"{rest} --resume auto",
        "",
        f"  sbatch --nodes {nodes} {tasks} launch/slurm.sbatch \\",
        f"      {file} \\",
        rest,
        "",
        f"  python train.py {file} --dry_run",
    ]


def _ascent(model: Model, method: str) -> list[str]:
    if "sam" not in method:
        return []
    scope = "layer" if "layer" in method else "model"
    return [
        "",
        f"fp16, not bf16, which rounds most of a perturbation of this rho ({scope} scope) away.",
        "DDP keeps fp32 weights, but forward computes in 16 bits (README.md beside this file).",
        "train.py measures it on looks and warns; --precision fp32 loses nothing and is slow.",
        "",
        f"m: {model.m} samples climb together, a GPU's share of a batch of {FIRST:,} here.",
        "Published ViTs with SAM climb per device, 64 to 512 samples (docs/m.md). It needs a",
        "gradient of its own on every GPU: DDP, or ZeRO 1 in fp32. FSDP2 and ZeRO 2 and 3 need a",
        "--group of all GPUs' micro-batches, ZeRO 1 in fp16 the whole batch.",
    ]


def _header(
    name: str, model: Model, method: str, outcome: dryrun.Outcome, lines: list[Line]
) -> str:
    used = [s for s in SOURCES if any(f"[{s}]" in said for _, _, said in lines)]
    assert outcome.plan is not None, outcome.unplanned
    nodes = _nodes(outcome)
    per_node = outcome.plan.images_per_s / nodes
    text = [
        f"{model.title}, {method}, batch {outcome.settings.batch_size:,}, {outcome.epochs:.3g} "
        "epochs of ImageNet-1k. Not trained by us.",
        "Written by make.py, which has every number once: change it there, or by flags.",
        "",
        *_commands(name, nodes),
        "",
        f"{outcome.steps:,} steps, {outcome.passes:,} passes. Cost, computed (dist-looksam plan) "
        "and not measured:",
        dryrun.cost(outcome) + ",",
        f"if each of {nodes} nodes reads and decodes {per_node:,.0f} images/s.",
        *_ascent(model, method),
        "",
        "Sources (second-hand: its tables were not seen):",
        *(f"  [{s}] {SOURCES[s]}" for s in used),
    ]
    return "\n".join(f"# {line}".rstrip() for line in text)


def recipe(model: str, method: str, batch: int) -> str:
    """The text of one file."""
    name, lines = name_of(model, method, batch), lines_of(model, method, batch)
    header = _header(name, MODELS[model], method, outcome_of(lines), lines)
    body = []
    for setting, value, said in lines:
        number = isinstance(value, float) and "e" in str(value)  # YAML wants a dot
        text = f"{value:.1e}" if number else "null" if value is None else value
        line = f"{setting}: {text}"
        body.append(f"{line:<24}  # {said}" if said else line)
    return header + "\n\n" + "\n".join(body) + "\n"


def files() -> dict[str, str]:
    """Name and text of every recipe, and of the index."""
    made = {name_of(*which) + ".yaml": recipe(*which) for which in ALL}
    return {**made, "README.md": index()}


def _row(model: str, method: str, batch: int) -> str:
    outcome = outcome_of(lines_of(model, method, batch))
    s, name = outcome.settings, name_of(model, method, batch)
    assert outcome.plan is not None, outcome.unplanned
    hours = outcome.plan.hours
    cells = (
        f"[{name}]({name}.yaml)", f"{outcome.steps:,}", f"{s.warmup_steps:,}", f"{outcome.lr:.2g}",
        f"{s.weight_decay:g}", f"{s.rho:g}" if s.rule.ascent else "-", s.precision,
        f"{outcome.passes:,}", f"{outcome.ranks}", f"{hours:.2g}", f"{hours * outcome.ranks:.3g}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def index() -> str:
    """README.md: its text as it is, the table and the sources after the mark."""
    table = [_row(*which) for which in ALL]
    sources = [f"- [{name}] {said}." for name, said in SOURCES.items()]
    text = (HERE / "README.md").read_text(encoding="utf-8").split(MARK)[0]
    return "\n".join(
        [
            text + MARK,
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|---" * len(COLUMNS) + "|",
            *table,
            "",
            *sources,
            "",
        ]
    )


def main() -> None:
    for name, text in files().items():
        (HERE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
