"""The errors a caller may expect.

A user's mistake is a `ValueError` that names the allowed values. The small tree below is for what happens to
a healthy program in an unhealthy cluster; anything else is a bug and ends the process.
"""


class ElasticError(RuntimeError):
    """Base of every expected failure of the cluster."""


class PeerLost(ElasticError):
    """A collective or transfer broke off because a peer died, left, or missed its deadline."""


class BatchFailed(ElasticError):
    """The forward of a batch broke off because of what is in it; the rank is well, but has left its peers alone."""


class TransferFailed(ElasticError):
    """An expert could be had from no source; the message names layer, expert and each reason."""


class DigestMismatch(TransferFailed):
    """The last source of an expert has other bytes than the group loaded."""


class NotEnoughSlots(ElasticError, ValueError):
    """The live slots cannot hold every logical expert once."""


class NotEnoughMembers(ElasticError):
    """Fewer ranks are left than are to serve together."""


class CheckpointError(ElasticError, ValueError):
    """A checkpoint is missing, incomplete, or does not fit the model."""
