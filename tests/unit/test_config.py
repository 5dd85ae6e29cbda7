"""conf/ and overrides into the schema: what each mistake is told, and what --help says."""

import dataclasses
from pathlib import Path

import pytest

from elastic_moe.config import ServeConfig, describe
from launch.config import CONF, groups, help_text, load


def mistake(*overrides: str) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - each test looks at the message
        load(ServeConfig, "config", list(overrides))
    message = str(refused.value)
    assert message
    assert "\n" not in message
    return message


def test_the_defaults_serve_the_demo_model():
    config = load(ServeConfig, "config", [])
    assert config.model.name == "demo"
    assert (Path(config.model.path) / "model.safetensors").is_file()
    assert type(config.model).__name__ == "ModelConfig"  # the schema itself, not a dict like it


def test_conf_and_the_schema_say_the_same():
    """Two places hold the defaults: conf/ for people, the schema for the code."""
    config = load(ServeConfig, "config", [])
    for key, default, _ in describe(ServeConfig):
        if not key.startswith("model."):  # the group's own
            value = config
            for name in key.split("."):
                value = getattr(value, name)
            assert value == default, key


def test_overrides_are_typed():
    config = load(ServeConfig, "config", ["server.port=0", "elastic.slots_per_rank=5", "serving.prefix_caching=false"])
    assert (config.server.port, config.elastic.slots_per_rank, config.serving.prefix_caching) == (0, 5, False)
    assert load(ServeConfig, "config", ["elastic.slots_per_rank=null"]).elastic.slots_per_rank is None


@pytest.mark.parametrize("mode", ["off", "sync", "async"])
def test_a_mode_is_a_word_and_off_no_boolean(mode: str):
    assert load(ServeConfig, "config", [f"eplb.mode={mode}"]).eplb.mode == mode


def test_every_model_has_all_keys():
    keys = {field.name for field in dataclasses.fields(type(ServeConfig().model))}
    for option in groups(ServeConfig)["model"]:
        lines = (CONF / "model" / f"{option}.yaml").read_text().splitlines()
        assert {line.partition(":")[0] for line in lines if line and line[0] not in "# "} == keys, option


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("server.prt=1", "unknown key 'server.prt'; did you mean server.port"),
        ("+server.port=1", "unknown key '+server.port'; did you mean server.port"),
        ("server=3", "unknown key 'server'; did you mean server.port"),
        ("hydra.run.dir=/tmp", "unknown key 'hydra.run.dir'"),
        (
            "=3",
            "unknown key ''; did you mean backup or elastic or eplb or exchange or log_level or model or server or "
            "serving?",
        ),
        ("--port=1", "unknown key '--port'"),
        ("~model", "'~model' is not KEY=VALUE; --help lists the keys"),
        ("model=", "model=: no such model; choose one of deepseek_v3, demo, hf, qwen3_moe"),
        ("model=demo,hf", "model=demo,hf: no such model; choose one of "),
        ("server.port=abc", "server.port: Value 'abc' of type 'str' could not be converted to Integer"),
        ("server.port=1,2", "server.port: Value '1,2'"),
        ("server.port=null", "server.port: Incompatible value 'None' for field of type 'int'"),
        ("serving.prefix_caching=maybe", "serving.prefix_caching: Value 'maybe' is not a valid bool"),
        ("model.path=${home}", "model.path: Interpolation key 'home' not found"),
        ("model.path=/a=b", "model.path=/a=b: mismatched input '='"),
        ("model.name=", "model.name='': must not be empty"),
        ("model.dtype=fp8", "model.dtype='fp8': must be one of float32, bfloat16, float16, auto"),
        ("model.device=tpu", "model.device='tpu': must be auto, cpu or cuda"),
        ("model.path=", "model.path='': must name a folder with a safetensors checkpoint"),
        ("model.path=/no/such", "model.path='/no/such': no such folder"),
        ("elastic.redundant_slots=-1", "elastic.redundant_slots=-1: must be 0 or more"),
        ("elastic.slots_per_rank=0", "elastic.slots_per_rank=0: must be null, or 1 or more"),
        ("elastic.exchange_timeout_s=0", "elastic.exchange_timeout_s=0.0: must be more than 0 seconds"),
        ("elastic.exchange_timeout_s=inf", "elastic.exchange_timeout_s=inf: must be more than 0 seconds, and finite"),
        ("elastic.start_timeout_s=nan", "elastic.start_timeout_s=nan: must be more than 0 seconds"),
        ("eplb.mode=on", "eplb.mode='on': must be one of off, sync, async"),
        ("eplb.algorithm=best", "eplb.algorithm='best': must be one of search, deepseek"),
        ("eplb.interval_s=0", "eplb.interval_s=0.0: must be more than 0, and finite"),
        ("eplb.interval_s=inf", "eplb.interval_s=inf: must be more than 0, and finite"),
        ("eplb.threshold=0.99", "eplb.threshold=0.99: must be 1 or more, and finite"),
        ("eplb.threshold=nan", "eplb.threshold=nan: must be 1 or more, and finite"),
        ("eplb.half_life_steps=0", "eplb.half_life_steps=0: must be 1 or more"),
        ("eplb.layers_per_chunk=0", "eplb.layers_per_chunk=0: must be 1 or more"),
        ("eplb.staging_mb=0", "eplb.staging_mb=0: must be 1 or more"),
        ("eplb.staging_mb=1.5", "eplb.staging_mb: "),
        ("eplb.mb_per_step=0", "eplb.mb_per_step=0.0: must be more than 0, and finite"),
        ("eplb.link_gb_per_s=-1", "eplb.link_gb_per_s=-1.0: must be more than 0, and finite"),
        ("eplb.initial_loads=/no/such", "eplb.initial_loads='/no/such': must be empty, or name a JSON file"),
        ("serving.max_model_len=1", "serving.max_model_len=1: must be null, or 2 or more"),
        ("serving.max_requests=0", "serving.max_requests=0: must be 1 or more"),
        ("serving.max_batch_tokens=0", "serving.max_batch_tokens=0: must be 1 or more"),
        ("serving.page_size=24", "serving.page_size=24: must be a power of two, 4 or more"),
        ("serving.kv_cache_tokens=63", "serving.kv_cache_tokens=63: must be at least two pages (64 tokens)"),
        ("server.port=65536", "server.port=65536: must be 0 to 65535"),
        ("server.host=no such host", "server.host='no such host': must be an IP address or a host name that resolves"),
        ("server.max_waiting=0", "server.max_waiting=0: must be 1 or more"),
        ("log_level=INFO", "log_level='INFO': must be one of debug, info, warning, error"),
    ],
)
def test_a_mistake_is_told_in_one_line(override: str, message: str):
    assert mistake(override).startswith(message)


def test_the_help_has_every_group_and_key_with_its_meaning():
    text = help_text(ServeConfig, "usage: serve").splitlines()
    assert text[0] == "usage: serve"
    for group, options in groups(ServeConfig).items():
        assert f"  {group}={'|'.join(options)}" in text
    rows = describe(ServeConfig)
    assert [key for key, _, _ in rows][:2] == ["model.name", "model.path"]
    for key, default, meaning in rows:
        (line,) = [line for line in text if line.startswith(f"  {key}=")]
        assert line.startswith(f"  {key}={'null' if default is None else default} ")
        assert line.endswith(f" {meaning}")
