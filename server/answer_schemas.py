"""JSON schemas of what the server answers, for its description. A field that is not listed here may come too."""

from typing import Any

Schema = dict[str, Any]

INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
STRING: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
TEXT_OR_NULL: Schema = {"type": ["string", "null"]}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def answer(**properties: Schema) -> Schema:
    """An object that has all of these."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def optional(schema: Schema, **properties: Schema) -> Schema:
    """The object, which may have these too."""
    return schema | {"properties": {**schema["properties"], **properties}}


USAGE = answer(prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER)
FINISH_REASON = {"enum": ["stop", "length", "tool_calls", "abort", "repetition"]}
CHAT_MESSAGE = optional(
    answer(role=STRING, content=TEXT_OR_NULL), reasoning=TEXT_OR_NULL, tool_calls=array(OBJECT), refusal=TEXT_OR_NULL
)
_HEAD = {"id": STRING, "created": INTEGER, "model": STRING}
CHAT = answer(
    **_HEAD,
    object=one_of("chat.completion"),
    choices=array(answer(index=INTEGER, message=CHAT_MESSAGE, finish_reason=FINISH_REASON)),
    usage=USAGE,
)
COMPLETION = answer(
    **_HEAD,
    object=one_of("text_completion"),
    choices=array(answer(index=INTEGER, text=STRING, finish_reason=FINISH_REASON)),
    usage=USAGE,
)
RESPONSE = answer(id=STRING, object=one_of("response"), status=STRING, model=STRING, output=array(OBJECT), usage=OBJECT)
MESSAGE = answer(id=STRING, type=one_of("message"), role=one_of("assistant"), content=array(OBJECT), usage=OBJECT)
EMBEDDINGS = answer(
    **_HEAD,
    object=one_of("list"),
    data=array(
        answer(
            index=INTEGER,
            object=one_of("embedding"),
            embedding={"type": ["array", "string"], "items": NUMBER},
        )
    ),
    usage=USAGE,
)
SCORES = answer(
    **_HEAD,
    object=one_of("list"),
    data=array(answer(index=INTEGER, object=one_of("score"), score=NUMBER)),
    usage=USAGE,
)
RANKING = answer(
    id=STRING,
    model=STRING,
    results=array(optional(answer(index=INTEGER, relevance_score=NUMBER), document=answer(text=STRING))),
    usage=USAGE,
)
MODEL = answer(id=STRING, object=one_of("model"), created=INTEGER, owned_by=STRING, root=STRING, max_model_len=INTEGER)
MODELS = answer(object=one_of("list"), data=array(MODEL))
TOKENS = optional(answer(count=INTEGER, max_model_len=INTEGER, tokens=array(INTEGER)), token_strs=array(STRING))
PROMPT = answer(prompt=STRING)
INPUT_TOKENS = answer(input_tokens=INTEGER)
HEALTH = optional(answer(status=STRING), phase=STRING)
VERSION = answer(version=STRING)
LOAD = answer(server_load=INTEGER, num_queued=INTEGER, num_rejected=INTEGER)
SUCCESS = answer(success=BOOLEAN)
SLEEPING = answer(is_sleeping=BOOLEAN)
SLEEP = answer(status=one_of("sleeping"), level=INTEGER)
AWAKE = answer(status=one_of("awake", "sleeping"), tags=array(STRING))
ABORTED = answer(status=one_of("aborted"), aborted=INTEGER, request_ids=array(STRING))

EVENT = optional(answer(data=STRING), event=STRING)  # of a stream; its data is JSON, or [DONE] at the end
ERROR = answer(error=answer(message=STRING, type=STRING, param=TEXT_OR_NULL, code=INTEGER))
MESSAGES_ERROR = answer(type=one_of("error"), error=answer(type=STRING, message=STRING))
