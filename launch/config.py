"""conf/ and the command line into a validated schema, by Hydra's compose API; one clear line when that fails."""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elastic_moe.config import describe

REPO = Path(__file__).resolve().parent.parent
CONF = REPO / "conf"

Schema = TypeVar("Schema")


def load(schema: type[Schema], config_name: str, overrides: list[str]) -> Schema:
    """Compose conf/`config_name`.yaml with `overrides` and check it against `schema`.

    Raises:
        ValueError: one line that says which key or value is wrong and what is allowed.
    """
    OmegaConf.register_new_resolver("repo", lambda path: str(REPO / path), replace=True)
    _check_keys(schema, overrides)
    try:
        with initialize_config_dir(str(CONF), version_base=None):
            composed = compose(config_name, overrides=[_quoted(override) for override in overrides])
        typed = OmegaConf.merge(OmegaConf.structured(schema), composed)
        config: Any = OmegaConf.to_object(typed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_one_line(error)) from error
    config.validate()
    return config


def groups(schema: type) -> dict[str, list[str]]:
    """The config groups of conf/ that fill a section of `schema`, and their options."""
    folders = [CONF / name for name in sorted(f.name for f in dataclasses.fields(schema))]
    return {d.name: sorted(f.stem for f in d.glob("*.yaml")) for d in folders if d.is_dir()}


def help_text(schema: type, usage: str) -> str:
    """Usage, the groups with their options, and every key with its meaning and default."""
    lines = [usage, "", "Groups:"]
    lines += [f"  {name}={'|'.join(options)}" for name, options in groups(schema).items()]
    lines += ["", "Keys (default):"]
    rows = [(f"{key}={'null' if default is None else default}", meaning) for key, default, meaning in describe(schema)]
    width = max(len(left) for left, _ in rows) + 2
    lines += [f"  {left:<{width}}{meaning}" for left, meaning in rows]
    return "\n".join(lines)


def _check_keys(schema: type, overrides: list[str]) -> None:
    keys = [key for key, _, _ in describe(schema)]
    sections = {f.name for f in dataclasses.fields(schema)}  # pyright: ignore[reportArgumentType]
    options = groups(schema)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not KEY=VALUE; --help lists the keys")
        if key in options:
            if value not in options[key]:
                raise ValueError(f"{key}={value}: no such {key}; choose one of {', '.join(options[key])}")
        elif key not in keys:
            near = difflib.get_close_matches(key, keys, n=3, cutoff=0.3) or sorted(sections)
            raise ValueError(f"unknown key {key!r}; did you mean {' or '.join(near)}? --help lists all keys")


def _quoted(override: str) -> str:
    """A comma list is one string here; Hydra would take it for a sweep."""
    key, _, value = override.partition("=")
    return f"{key}='{value}'" if "," in value and value[0] not in "[{'\"" else override


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
    key = key or getattr(error, "override", None)  # of one that Hydra cannot parse
    if found := re.match(r"Could not override '([^']+)'", lines[0]):
        return f"{found[1]}: not a key of what is chosen; --help says what it is for"
    return f"{key}: {lines[0]}" if key else lines[0]
