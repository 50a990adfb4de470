"""What --deepspeed_config may say, and what stops the run with a sentence."""

import json

import pytest

from dist_looksam.backends.zero import config as zero_config
from dist_looksam.backends.zero import file as zero_file
from dist_looksam.backends.zero import library as zero_library
from dist_looksam.backends.zero.layout import check_version
from dist_looksam.errors import ConfigError
from dist_looksam.run import dryrun
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
    "predivided at stage 3": (
        {"gradient_predivide_factor": 2.0}, ["--zero_stage", "3"], "not be the number of ranks",
    ),
    "autocast": ({"torch_autocast": {"enabled": True, "dtype": "fp16"}}, [], "got fp16, whose"),
    "autocast, default": ({"torch_autocast": {"enabled": True}}, [], "dtype bfloat16, got None"),
    "nvme": ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, [], "got nvme"),
    "groups of one rank, sharded": (
        None, ["--m", "32", "--micro_batch", "32", "--zero_stage", "2"], "m must be",
    ),
    "groups of one rank, offload": (
        None, ["--ascent", "rank", "--micro_batch", "32", "--zero_stage", "1", "--offload"], "m m",
    ),
    "groups in 16 bits at stage 1": (
        None, ["--m", "16", "--precision", "bf16", "--zero_stage", "1"], "m must be 64 on",
    ),
    "file for ddp": ({}, ["--backend", "ddp"], "deepspeed_config is of backend zero"),
    "offload and none": (
        {"zero_optimization": {"offload_optimizer": {"device": "none"}}}, ["--offload"], "drop one",
    ),
    "a name twice": ('{"fp16": {}, "fp16": {"enabled": true}}', [], "fp16 twice"),
    "old name of bf16": ({"bfloat16": {"enabled": True}}, [], "--precision bf16"),
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


@pytest.mark.parametrize("file, checks", [({}, False), ({"check_grad_overflow": True}, True)])
def test_deepspeed_looks_for_overflow_in_bf16_only_if_the_file_asks(file, checks):
    """A step knows it before; at stage 2 DeepSpeed's look is a fifth of a step's operators."""
    made = zero_config.make(
        {"bf16": file},
        stage=2,
        batch_size=4,
        micro_batch=2,
        ranks=2,
        precision="bf16",
        offload=False,
    )
    assert made["bf16"] == {"enabled": True, "check_grad_overflow": checks}


def test_the_stage_is_two_where_nobody_says():
    assert zero_config.stage_of({}, None) == 2


VALUES = {
    "null": None, "true": True, "false": False, "0": 0, "1": 1, "2": 2, "-1": -1, "2.5": 2.5,
    "NaN": float("nan"), "Infinity": float("inf"), "1e30": 1e30, "auto": "auto", "text": "x",
    "number in a text": "2", "empty text": "", "empty list": [], "list": [{"stage": 1}],
    "empty object": {}, "object": {"x": 1},
}  # fmt: skip
OTHERS = (
    *("wall_clock_breakdown", "activation_checkpointing", "communication_data_type", "fp16.x"),
    *("fp16.initial_scale_power", "zero_optimization.sub_group_size"),
)


def nested(name: str, value) -> dict:
    *sections, key = name.split(".")
    made = {key: value}
    for section in reversed(sections):
        made = {section: made}
    return made


@pytest.mark.parametrize("name", [*zero_file._KINDS, *OTHERS])
def test_a_value_of_any_json_type_is_what_deepspeed_takes_or_one_sentence(tmp_path, name):
    """`"zero_optimization": true`, `"fp16": true`, `"offload_optimizer": null`, `"stage": "auto"`
    and `"gradient_clipping": "none"` ended in tracebacks, and in a dry run
    `"reduce_bucket_size": "auto"`."""
    for words, value in VALUES.items():
        file = nested(name, value)
        try:
            settings = resolve(tmp_path, file, "--micro_batch", "64", ranks=1)
            path = str(tmp_path / "ds.json")
            flags = ["--data", "digits", "--batch_size", "64", "--backend", "zero"]
            dryrun.check(config.parse([*flags, "--deepspeed_config", path]), ranks=2)
            made = settings.backend_row.deepspeed_config(settings, 1)
            zero_library.check_config(made)
        except ConfigError as error:
            assert "\n" not in str(error), words
            says_nothing = words in ("null", "auto") and "." in name
            assert not (says_nothing and name in zero_file._KINDS), (words, error)


@pytest.mark.parametrize(("file", "stage", "clip"), [
    ({"zero_optimization": True}, 1, None),
    ({"zero_optimization": False}, 0, None),
    ({"zero_optimization": {"stage": "auto", "offload_optimizer": None}}, 2, None),
    ({"zero_optimization": {"stage": 3.0, "reduce_bucket_size": 1e6}}, 3, None),
    ({"gradient_clipping": "auto", "train_batch_size": 64.0, "fp16": {"enabled": "auto"}}, 2, None),
    ({"gradient_clipping": 1, "bf16": None, "steps_per_print": "auto"}, 2, 1.0),
])  # fmt: skip
def test_what_deepspeed_takes_in_another_form_works(tmp_path, file, stage, clip):
    settings = resolve(tmp_path, file)
    assert (settings.zero_stage, settings.clip) == (stage, clip)
    made = settings.backend_row.deepspeed_config(settings, 2)
    assert made["steps_per_print"] == 10**9 and "auto" not in json.dumps(made)


@pytest.mark.parametrize(("file", "words"), [
    ({"fp16": True}, "fp16 must be an object in the DeepSpeed config, got true"),
    ({"fp16": {"enabled": "true"}}, 'fp16.enabled must be true or false in .*, got "true"'),
    ({"gradient_clipping": "none"}, 'gradient_clipping must be a number from 0 .*, got "none"'),
    ({"zero_optimization": {"stage": True}}, "stage must be 0, 1, 2 or 3 .*, got true"),
    ({"zero_optimization": "auto"}, 'zero_optimization must be an object .*, got "auto"'),
    ({"zero_optimization": {"offload_param": 1}}, "offload_param must be an object"),
    ({"train_batch_size": True}, "train_batch_size must be a whole number"),
])  # fmt: skip
def test_a_value_of_another_type_is_named_with_what_it_must_be(tmp_path, file, words):
    with pytest.raises(ConfigError, match=words):
        resolve(tmp_path, file)
