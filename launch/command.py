"""What the commands of this folder share: help, a checked configuration, one line about a mistake, exit codes."""

import sys
from collections.abc import Callable

from launch.config import Schema, help_text, load

HELP = {"--help", "-h"}
REFUSED, INTERRUPTED = 2, 130


def run_command(
    schema: type[Schema],
    config_name: str,
    usage: str,
    call: Callable[[Schema, list[str]], int],
    expected: tuple[type[Exception], ...] = (),
) -> int:
    """The exit code of `call(config, overrides)`, with the overrides of the command line; 2, after one line about it,
    for a mistake or one of the `expected` failures."""
    overrides = sys.argv[1:]
    if HELP & set(overrides):
        print(help_text(schema, usage))
        return 0
    try:
        return call(load(schema, config_name, overrides), overrides)
    except (ValueError, *expected) as error:
        print(f"elastic_moe: {error or type(error).__name__}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
