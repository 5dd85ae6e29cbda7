"""Where the secret of a launch comes from: the environment or a file, else the first process of its only node."""

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "ELASTIC_MOE_SECRET"
MIN_LENGTH = 16
_NODE_FILE = "elastic_moe_secret"


def launch_secret(environ: Mapping[str, str]) -> str:
    """What `ELASTIC_MOE_SECRET` says; else one that the processes of this launch share, if all are on this node and
    torchrun has given them a folder; else none. It outlives a start, as torchrun's store does.

    Raises:
        ValueError: it is too short, or the file of the node is not ours.
    """
    if VARIABLE in environ:
        return _checked(environ[VARIABLE], VARIABLE)
    if environ.get("WORLD_SIZE", "1") == environ.get("LOCAL_WORLD_SIZE", "1") and (folder := attempt_folder(environ)):
        return _of_node(folder.parent)
    return ""


def read_secret(path: str, key: str) -> str:
    """The secret in a file that `key` names.

    Raises:
        ValueError: it cannot be read, or is too short.
    """
    try:
        return _checked(Path(path).read_text(), f"{key}={path!r}")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{key}={path!r}: cannot be read: {error}") from error


def attempt_folder(environ: Mapping[str, str]) -> Path | None:
    """What this node's processes of this start share: torchrun's folder for error files, in one that only its user may
    enter. None without torchrun."""
    error_file = Path(environ.get("TORCHELASTIC_ERROR_FILE", ""))
    return error_file.parent.parent if len(error_file.parts) > 3 else None


def _of_node(folder: Path) -> str:
    """The first to come makes it; a link makes name and content appear at once."""
    path = folder / _NODE_FILE
    with tempfile.NamedTemporaryFile("w", dir=folder) as made:  # mode 0600
        made.write(secrets.token_hex(32))
        made.flush()
        with contextlib.suppress(FileExistsError):
            os.link(made.name, path)
    with path.open() as file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o600:
            raise ValueError(f"{path}: the secret of this launch must be ours, and readable by nobody else")
        return file.read()


def _checked(secret: str, where: str) -> str:
    secret = secret.strip()
    if len(secret) < MIN_LENGTH:
        raise ValueError(f"{where}: a secret must have {MIN_LENGTH} characters or more (openssl rand -hex 32)")
    return secret
