"""What an answer must obey, from the fields that say it, one of them at a time: OpenAI's `response_format`, vLLM's
`structured_outputs` and the older `guided_*`.
"""

import dataclasses
from typing import Any

from qjax.sampling_params import StructuredOutputsParams
from qjax.server.errors import bad_request
from qjax.text.grammar import format_of
from qjax.text.structural_tag import lark_source

GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
KINDS = {f.name for f in dataclasses.fields(StructuredOutputsParams)} - {"after_thinking"}


def structured_outputs(
    response_format: dict[str, Any] | None,
    structured: dict[str, Any] | None,
    guided: dict[str, Any],
    *,
    after_thinking: bool,
) -> StructuredOutputsParams | None:
    """The parameters of a request, or None if its answer is free.

    Args:
      guided: the `guided_*` fields, None where absent.
      after_thinking: a think block may come before what is constrained.

    Raises:
      ApiError: 400, a field is wrong, or two are set.
    """
    wanted: dict[str, dict[str, Any]] = {}
    if response_format is not None and (kind := _of_response_format(response_format)):
        wanted["response_format"] = kind
    if structured is not None:
        for name in structured:
            if name not in KINDS:
                raise bad_request(
                    f"structured_outputs.{name} is not supported. Supported: {', '.join(sorted(KINDS))}.",
                    f"structured_outputs.{name}",
                )
        wanted["structured_outputs"] = structured
    wanted |= {name: {GUIDED[name]: value} for name, value in guided.items() if value is not None}
    if len(wanted) > 1:
        raise bad_request(f"only one of {' and '.join(wanted)} can be set.", list(wanted)[1])
    for name, fields in wanted.items():
        try:
            params = StructuredOutputsParams(**fields, after_thinking=after_thinking)
            if params.structural_tag is not None:
                lark_source(format_of(params), {})  # its form is checked here, where the field's name is known
            return params
        except ValueError as error:
            raise bad_request(str(error), name) from None
    return None


def _of_response_format(value: dict[str, Any]) -> dict[str, Any] | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        described = value.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        if not isinstance(schema, dict):
            raise bad_request(
                "response_format.json_schema.schema must be a JSON schema (an object).", "response_format.json_schema"
            )
        return {"json": schema}
    if kind == "structural_tag":
        return {"structural_tag": value}
    raise bad_request(
        f'response_format.type must be "text", "json_object", "json_schema" or "structural_tag", got {kind!r}.',
        "response_format.type",
    )
