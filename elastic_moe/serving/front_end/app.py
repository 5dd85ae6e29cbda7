"""The HTTP application of one node: the OpenAI API, health, metrics and the state of the cluster."""

import hmac
from collections.abc import AsyncIterator
from http import HTTPStatus

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from elastic_moe.config import is_loopback
from elastic_moe.serving.front_end.api_errors import ApiError, install_error_handlers
from elastic_moe.serving.front_end.gateway import Gateway
from elastic_moe.serving.front_end.openai_api import OpenAIApi
from elastic_moe.serving.front_end.served_model import ServedModel
from elastic_moe.serving.protocol import Phase


def create_app(gateway: Gateway, model: ServedModel, token: str = "") -> FastAPI:
    """The application over a gateway and a model. Both are the caller's to close. `token`: see `refuse_strangers`."""
    app = FastAPI(openapi_url=None)
    install_error_handlers(app)
    app.include_router(OpenAIApi(gateway, model).router())

    @app.get("/health")
    async def health() -> Response:
        cluster = gateway.status()
        healthy = cluster.phase is Phase.SERVING
        body = {"status": "ok"} if healthy else {"status": cluster.phase, "reason": cluster.reason}
        return _json(body, HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(gateway.metrics.render(gateway.status()), media_type=CONTENT_TYPE_LATEST)

    @app.get("/elastic/status")
    async def status() -> Response:
        return _json(gateway.status())

    @app.get("/elastic/events")
    async def events(request: Request) -> Response:
        if "text/event-stream" in request.headers.get("accept", ""):
            return StreamingResponse(_sse(gateway), media_type="text/event-stream")
        return _json(gateway.events.all())

    @app.post("/elastic/rebalance")
    async def rebalance() -> Response:
        return _json(gateway.balance.rebalance(), HTTPStatus.ACCEPTED)

    @app.get("/elastic/ops/{name}")
    async def operation(name: str) -> Response:
        found = gateway.balance.operation(name)
        if found is None:
            raise ApiError(HTTPStatus.NOT_FOUND, f"no operation {name!r} here; POST /elastic/rebalance names one")
        return _json(found)

    @app.get("/elastic/weights")
    async def weights(request: Request) -> Response:
        refuse_strangers(request, token)
        return _json(gateway.weights(model.name))

    @app.get("/elastic/loads")
    async def loads() -> Response:
        return _json(await gateway.balance.loads())

    return app


def refuse_strangers(request: Request, token: str) -> None:
    """Only who is on this host, or shows the token of the launch, gets what is not for everybody.

    Raises:
        ApiError: 401: somebody else.
    """
    if request.client is not None and is_loopback(request.client.host):
        return
    shown = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not token or not hmac.compare_digest(shown.encode(), token.encode()):
        raise ApiError(
            HTTPStatus.UNAUTHORIZED,
            "this is for clients on this host, or that show the token of the launch's secret: Authorization: Bearer "
            "TOKEN (a server with the same ELASTIC_MOE_SECRET or elastic.secret_file does)",
        )


async def _sse(gateway: Gateway) -> AsyncIterator[bytes]:
    async for event in gateway.events.follow():
        yield b"data: " + msgspec.json.encode(event) + b"\n\n"


def _json(content: object, status: int = HTTPStatus.OK) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
