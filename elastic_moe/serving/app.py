"""The HTTP application of one node: the OpenAI API, health, metrics and the state of the cluster."""

from http import HTTPStatus

import msgspec
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST

from elastic_moe.serving.api_errors import install_error_handlers
from elastic_moe.serving.gateway import Gateway
from elastic_moe.serving.openai_api import OpenAIApi
from elastic_moe.serving.served_model import ServedModel


def create_app(gateway: Gateway, model: ServedModel) -> FastAPI:
    """The application over a gateway and a model. Both are the caller's to close."""
    app = FastAPI(openapi_url=None)
    install_error_handlers(app)
    app.include_router(OpenAIApi(gateway, model).router())

    @app.get("/health")
    async def health() -> Response:
        cluster = gateway.status()
        healthy = cluster.phase == "serving"
        body = {"status": "ok"} if healthy else {"status": cluster.phase, "reason": cluster.reason}
        return _json(body, HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(gateway.metrics.render(gateway.status()), media_type=CONTENT_TYPE_LATEST)

    @app.get("/elastic/status")
    async def status() -> Response:
        return _json(gateway.status())

    return app


def _json(content: object, status: int = HTTPStatus.OK) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
