"""What a supervisor tells the backup daemon first of all."""

import msgspec

from elastic_moe.config import BackupConfig
from elastic_moe.group.view import Backup
from elastic_moe.wire import Wire


class BackupStart(msgspec.Struct, tag="backup", frozen=True):
    """Supervisor -> daemon."""

    config: BackupConfig
    backup: Backup
    wire: Wire = Wire()
    log_level: str = "info"
