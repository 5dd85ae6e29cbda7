"""Memory of other hosts, read without their work: Mooncake's TransferEngine (TCP or RDMA). Without torch.

It knows no secret: whoever reaches its ports may read what is registered. Between nodes they belong behind a firewall.
"""

import importlib
import logging
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, NamedTuple

from elastic_moe.background import start_worker
from elastic_moe.config import BackupConfig

log = logging.getLogger(__name__)


class Read(NamedTuple):
    """So many bytes, from an address there to one here."""

    here: int
    there: int
    size: int


class RemoteMemory:
    """The engine of this process."""

    def __init__(self, host: str, protocol: str, device: str) -> None:
        """Start it.

        Raises:
            ImportError: the library, or one that it needs, is not installed.
            OSError: it does not start.
        """
        self._engine: Any = importlib.import_module("mooncake.engine").TransferEngine()
        code = self._engine.initialize(host, "P2PHANDSHAKE", protocol, device)
        if code:
            raise OSError(f"the TransferEngine does not start with protocol {protocol!r}, device {device!r}: {code}")
        self.session = f"{host}:{self._engine.get_rpc_port()}"
        """By which others read from here."""
        self._worker = start_worker("mooncake")

    def register(self, address: int, size: int) -> None:
        """Memory that is read from, or into. Once, for it takes a while.

        Raises:
            OSError: it cannot be.
        """
        if code := self._engine.register_memory(address, size):
            raise OSError(f"the TransferEngine cannot use {size} bytes of memory: {code}")

    def read(self, session: str, reads: Sequence[Read], within_s: float) -> bool:
        """Whether all have come, in time; if not, what lies here may change for a while yet."""
        here, there, sizes = (list(column) for column in zip(*reads, strict=True))
        running = self._worker.submit(self._engine.batch_transfer_sync_read, session, here, there, sizes)
        try:
            return running.result(within_s) == 0
        except FutureTimeout:
            self._worker = start_worker("mooncake")  # that one waits as long as the library likes
            return False


def remote_memory(config: BackupConfig, host: str) -> RemoteMemory | None:
    """The engine of this process, if `config` asks for one and there is one."""
    if config.transport != "mooncake":
        return None
    try:
        return RemoteMemory(host, config.mooncake_protocol, config.mooncake_device)
    except (ImportError, OSError) as error:
        log.warning(
            "backup.transport=mooncake: %s. Backups go from node to node over ZMQ, which is slower; install "
            "elastic_moe[mooncake] and its system packages (apt-get install libibverbs1 librdmacm1 libnuma1)",
            error,
        )
        return None
