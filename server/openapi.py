"""The description of the API (OpenAPI 3.1) at `/openapi.json`, made of the table of routes and the request types."""

import dataclasses
import re
from http import HTTPStatus
from typing import Any, get_type_hints

from aiohttp import web

from qjax.server.answer_schemas import ERROR, EVENT, MESSAGES_ERROR, STRING
from qjax.server.json_schema import Definitions, Schema
from qjax.server.protocol import REQUEST_ID
from qjax.server.request_id import HEADER
from qjax.server.routes import Route
from qjax.server.version import VERSION

OPENAPI: web.AppKey[dict[str, Any]] = web.AppKey("openapi", dict)
_SCHEMAS = "#/components/schemas/"
_REASONS = {
    400: "The request is wrong; `param` names the field",
    401: "The API key is missing or wrong",
    404: "There is no such model",
    413: "The body is larger than --max-body-size",
    415: "The body is compressed in a way that is not supported",
    417: "Expect is something else than 100-continue",
    500: "The server or the engine failed",
    503: "Not ready: loading, stopping, asleep, without a step for long, or the queue is full",
}


async def openapi(request: web.Request) -> web.Response:
    return web.json_response(request.app[OPENAPI])


def describe(routes: list[Route], root_path: str, needs_key: bool) -> dict[str, Any]:
    """An OpenAPI document. Its paths begin after `root_path`."""
    definitions = Definitions(_SCHEMAS)
    paths: dict[str, Any] = {}
    for route in routes:
        path = re.sub(r"{(\w+)[^}]*}", r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, definitions, needs_key)
    schemas = {**definitions.schemas, "Error": ERROR, "MessagesError": MESSAGES_ERROR}
    components: dict[str, Any] = {"schemas": schemas}
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "qjax", "version": VERSION, "description": "An inference engine for the Qwen3 models"},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": components,
        "security": [{"key": []}] if needs_key else [],
    }


def _operation(route: Route, definitions: Definitions, needs_key: bool) -> dict[str, Any]:
    words = re.findall(r"\w+", re.sub(r":[^}]*}", "}", route.path))
    operation: dict[str, Any] = {
        "operationId": "_".join((route.method.lower(), *words)),
        "summary": route.summary,
        "parameters": [*_path_parameters(route), *_query_parameters(route, definitions), _REQUEST_ID],
    }
    if route.bodies:
        schemas = [definitions.reference(body) for body in route.bodies]
        content = {"application/json": {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}}
        operation["requestBody"] = {"required": True, "content": content}
    operation["responses"] = {"200": _success(route)} | {
        str(status): _error(route, status) for status in sorted(_statuses(route, needs_key))
    }
    if route.is_open:
        operation["security"] = []
    return operation


_REQUEST_ID = {
    "name": HEADER,
    "in": "header",
    "schema": STRING,
    "description": f"Comes back with the response if it matches ^{REQUEST_ID.pattern}$; else a random one does",
}
_ID_HEADER = {HEADER: {"schema": STRING, "description": "The request's own, else a random one"}}


def _path_parameters(route: Route) -> list[dict[str, Any]]:
    names = re.findall(r"{(\w+)", route.path)
    return [{"name": name, "in": "path", "required": True, "schema": STRING} for name in names]


def _query_parameters(route: Route, definitions: Definitions) -> list[dict[str, Any]]:
    if route.query is None:
        return []
    hints = get_type_hints(route.query)
    parameters = []
    for f in dataclasses.fields(route.query):
        schema: Schema = definitions.of_field(hints[f.name], f)
        description = schema.pop("description")
        parameters.append({"name": f.name, "in": "query", "description": description, "schema": schema})
    return parameters


def _statuses(route: Route, needs_key: bool) -> set[int]:
    """What a route answers when it does not succeed, as it follows from what it takes."""
    statuses = {417, 500, *route.statuses, *route.other_answers}
    if needs_key and not route.is_open:
        statuses.add(401)
    if route.bodies:
        statuses |= {400, 413, 415}
    if route.query is not None:
        statuses.add(400)
    if any("model" in body.__dataclass_fields__ for body in route.bodies):
        statuses.add(404)
    if route.needs_engine:
        statuses.add(503)
    return statuses


def _success(route: Route) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if isinstance(route.answer, str):
        content[route.answer] = {"schema": STRING}
    else:
        content["application/json"] = {"schema": route.answer or {"type": "object"}}
    if route.streams:
        content["text/event-stream"] = {"schema": EVENT}
    description = "The answer; with `stream`, as server-sent events" if route.streams else "The answer"
    return {"description": description, "headers": _ID_HEADER, "content": content}


def _error(route: Route, status: int) -> dict[str, Any]:
    name = "MessagesError" if route.path.startswith("/v1/messages") else "Error"
    description = _REASONS.get(status, HTTPStatus(status).phrase)
    schema = route.other_answers.get(status, {"$ref": _SCHEMAS + name})
    content = {"application/json": {"schema": schema}}
    return {"description": description, "headers": _ID_HEADER, "content": content}
