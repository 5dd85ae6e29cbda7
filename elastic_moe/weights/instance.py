"""The weights of an instance that runs elsewhere: who holds them, as its front ends tell."""

import logging
import urllib.error
import urllib.request
from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec

from elastic_moe.weights.holders import Holder
from elastic_moe.weights.holding import InstanceWeights, decode_instance
from elastic_moe.weights.sources import Origin
from elastic_moe.wire import Wire

ANSWER_S = 5.0
ANY_HOST = "0.0.0.0"  # noqa: S104 - what a holder says that listens on all addresses
log = logging.getLogger(__name__)


def find_holders(urls: Sequence[str], token: str = "") -> list[Holder]:
    """The holders of all instances that answer; who does not is told of in a warning.

    Args:
        urls: of front ends, `http://HOST:PORT`; several of one instance or of instances with the same weights.
        token: see `Wire.token`; needed by those that are not on this host.
    """
    found: dict[str, Holder] = {}
    for url in urls:
        try:
            instance = _ask(url.rstrip("/"), token)
        except (OSError, ValueError) as error:
            log.warning("%s tells of no weights: %s", url, error)
            continue
        wire, host = Wire(instance.key), urlsplit(url).hostname or ""
        for one in instance.holders:
            endpoint = one.address.replace(ANY_HOST, host)
            found.setdefault(endpoint, Holder(one.address, Origin.INSTANCE, wire, endpoint))
    return list(found.values())


def _ask(url: str, token: str) -> InstanceWeights:
    request = urllib.request.Request(f"{url}/elastic/weights")  # noqa: S310 - the configuration allows http only
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:  # noqa: S310
            return decode_instance(answer.read())
    except urllib.error.HTTPError as error:
        raise ValueError(_reason(error)) from error


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return f"HTTP {error.code}: {msgspec.json.decode(error.read())['error']['message']}"
    except (ValueError, KeyError, TypeError, OSError):
        return f"HTTP {error.code}"
