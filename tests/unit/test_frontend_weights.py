"""GET /elastic/weights: what a front end tells of the weights, and to whom."""

import pytest
from starlette.requests import Request
from support.front_end import END, FakeEngine, front_end

from elastic_moe.config import ServeConfig
from elastic_moe.serving.front_end.api_errors import ApiError
from elastic_moe.serving.front_end.app import refuse_strangers
from elastic_moe.weights.holding import decode_instance

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("client", "shown", "allowed"),
    [
        ("127.0.0.1", "", True), ("::1", "", True), ("10.0.0.5", "", False), ("10.0.0.5", "token", True),
        ("10.0.0.5", "tokem", False), ("10.0.0.5", "t\u00f6ken", False), ("localhost.evil", "", False),
    ],
)  # fmt: skip
def test_weights_are_for_this_host_and_who_has_the_token(client: str, shown: str, allowed: bool):
    headers = [(b"authorization", f"Bearer {shown}".encode("latin-1"))] if shown else []
    request = Request({"type": "http", "client": (client, 1), "headers": headers})
    if allowed:
        refuse_strangers(request, "token")
        return
    with pytest.raises(ApiError, match="the token of the launch's secret"):
        refuse_strangers(request, "token")
    with pytest.raises(ApiError):
        refuse_strangers(request, "")


async def test_who_holds_the_weights_is_told(config: ServeConfig):
    async with front_end(config) as fe:
        assert (await fe.client.get("/elastic/weights")).status_code == 503
        engine = FakeEngine(3, [END])
        await fe.join(engine)
        found = decode_instance((await fe.client.get("/elastic/weights")).content)
    assert (found.model, found.key) == (config.model.name, "")
    assert [(holder.rank, holder.kind) for holder in found.holders] == [(3, "engine")]
