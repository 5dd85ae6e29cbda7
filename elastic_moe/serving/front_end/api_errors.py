"""Every error a client can get, in the body that OpenAI clients understand."""

import logging
from http import HTTPStatus

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from elastic_moe.errors import ElasticError
from elastic_moe.serving.front_end.balance_desk import BalancerOff
from elastic_moe.serving.front_end.gateway import GenerationFailed, Stopping, TooManyRequests, Unavailable

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """A refusal with its HTTP status. `param` names the field that is wrong, `code` is for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        """`message` says what is wrong and what is allowed."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, object]:
        """The JSON object of the response, or of an event in a stream."""
        kind = "server_error" if self.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        if self.status == HTTPStatus.TOO_MANY_REQUESTS:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def api_error(error: Exception) -> ApiError:
    """What a client is told of `error`. A bug is not described: it is logged where it happened."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return _invalid_request(error)
        case HTTPException():
            return ApiError(error.status_code, error.detail)
        case TooManyRequests():
            return ApiError(HTTPStatus.TOO_MANY_REQUESTS, str(error), code="rate_limit_exceeded")
        case BalancerOff():
            return ApiError(HTTPStatus.CONFLICT, str(error), code="balancer_off")
        case Stopping():
            return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error), code="server_stopping")
        case Unavailable():
            return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error), code="unavailable")
        case GenerationFailed():
            return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, str(error), code="generation_failed")
        case _:
            return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; the server's log says more")


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of `app` with its `api_error`."""

    async def answer(request: Request, error: Exception) -> Response:
        told = api_error(error)
        headers = getattr(error, "headers", None)  # of a 405: what is allowed
        return Response(msgspec.json.encode(told.body), told.status, headers, media_type="application/json")

    for kind in (ApiError, RequestValidationError, HTTPException, ElasticError, Exception):
        app.add_exception_handler(kind, answer)


def _invalid_request(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a request's body, with the name of the field."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(HTTPStatus.BAD_REQUEST, f"the body is not valid JSON: {first['ctx']['error']}")
    param = ".".join(str(part) for part in first["loc"][1:])
    if not param:
        return ApiError(HTTPStatus.BAD_REQUEST, "the body must be a JSON object, of Content-Type application/json")
    reason = first.get("ctx", {}).get("error", first["msg"])
    return ApiError(HTTPStatus.BAD_REQUEST, f"{param}: {reason}", param=param)
