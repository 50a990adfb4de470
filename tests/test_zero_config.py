"""What --deepspeed_config may say, and what stops the run with a sentence."""

import json

import pytest

from dist_looksam.backends.zero import config as zero_config
from dist_looksam.backends.zero.layout import check_version
from dist_looksam.errors import ConfigError
from dist_looksam.settings import config

pytestmark = pytest.mark.needs("deepspeed")


def resolve(tmp_path, file: dict | str | None, *flags: str, ranks: int = 2):
    argv = ["--data", "digits", "--batch_size", "64", "--backend", "zero", *flags]
    if file is not None:
        path = tmp_path / "ds.json"
        path.write_text(file if isinstance(file, str) else json.dumps(file))
        argv += ["--deepspeed_config", str(path)]
    settings = config.parse(argv).resolved(ranks=ranks, launcher="deepspeed", samples=1000)
    return settings


WRONG = {
    "not JSON": ("{", [], "must be JSON"),
    "a list": ("[]", [], "must be a JSON object"),
    "other stage": ({"zero_optimization": {"stage": 3}}, ["--zero_stage", "2"], "got 2 and 3"),
    "clipping twice": ({"gradient_clipping": 1.0}, ["--clip", "0.5"], "clipping must be set once"),
    "other batch": ({"train_batch_size": 128}, [], "train_batch_size must agree"),
    "other micro-batch": ({"train_micro_batch_size_per_gpu": 4}, [], "got 4"),
    "other accumulation": ({"gradient_accumulation_steps": 7}, [], "got 7"),
    "own optimizer": ({"optimizer": {"type": "Adam"}}, [], "must not have optimizer"),
    "own scheduler": ({"scheduler": {"type": "WarmupLR"}}, [], "must not have scheduler"),
    "bf16 against fp32": ({"bf16": {"enabled": True}}, [], "--precision bf16"),
    "fp16 against bf16": ({"fp16": {"enabled": True}}, ["--precision", "bf16"], "bf16 and fp16"),
    "fp16 at stage 0": (None, ["--precision", "fp16", "--zero_stage", "0"], "got stage 0"),
    "round robin": ({"zero_optimization": {"round_robin_gradients": True}}, [], "round_robin"),
    "nvme": ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, [], "got nvme"),
    "rank ascent, sharded": (None, ["--ascent", "rank", "--zero_stage", "2"], "--zero_stage 1"),
    "rank ascent, offload": (
        None, ["--ascent", "rank", "--zero_stage", "1", "--offload"], "with offload",
    ),
    "file for ddp": ({}, ["--backend", "ddp"], "deepspeed_config is of backend zero"),
    "stage 4": (None, ["--zero_stage", "4"], "0, 1, 2 or 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_would_train_wrongly_is_refused_in_one_sentence(tmp_path, name):
    file, flags, words = WRONG[name]
    if name == "file for ddp":
        file = {"steps_per_print": 5}
    with pytest.raises(ConfigError) as error:
        resolve(tmp_path, file, *flags)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        resolve(tmp_path, None, "--deepspeed_config", "nowhere.json")


def test_another_version_of_deepspeed_is_refused():
    """The seam uses private names; another version could move them and train wrongly in silence."""
    check_version("0.19.8")
    with pytest.raises(ConfigError, match=r"0\.19\.x, got 0\.20\.1"):
        check_version("0.20.1")


def test_the_file_gives_what_no_flag_says(tmp_path):
    file = {
        "zero_optimization": {"stage": 3, "sub_group_size": 1000},
        "gradient_clipping": 0.7,
        "train_batch_size": "auto",
        "wall_clock_breakdown": True,
    }
    settings = resolve(tmp_path, file)
    assert settings.zero_stage == 3
    assert settings.clip == 0.7  # clipping is ours: once, on what the base gets
    made = zero_config.make(
        file, stage=3, batch_size=64, micro_batch=16, ranks=2, precision="bf16", offload=True
    )
    assert made["gradient_clipping"] == 0.0
    assert made["zero_optimization"]["sub_group_size"] == 1000
    assert made["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert made["gradient_accumulation_steps"] == 2
    assert made["data_types"]["grad_accum_dtype"] == "fp32"  # bf16 sums would lose small gradients
    assert made["wall_clock_breakdown"] is True


def test_the_stage_is_two_where_nobody_says():
    assert zero_config.stage_of({}, None) == 2
