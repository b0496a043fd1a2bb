"""POST /v1/score and /v1/rerank: how well documents answer a query, by a reranker or by the cosine of embeddings."""

import time
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar

from aiohttp import web

from qjax.outputs import PoolingRequestOutput, ScoringOutput
from qjax.pooling_params import PoolingParams
from qjax.server.errors import bad_request, from_value_error
from qjax.server.generation import answer_id, read_json
from qjax.server.pooling import MAX_INPUTS, PoolingFields, check_kind, json_answer, pool, tokenized, usage_of
from qjax.server.schema import Refused, body_field, parse
from qjax.server.state import STATE, ServerState
from qjax.text.pooling import RerankPrompt, cosine, embedding_ids, instructed, pairs, shortened

QUERIES = ("text_1", "queries", "data_1")  # one of these and one of those
DOCUMENTS = ("text_2", "documents", "data_2", "items")


@dataclass(frozen=True, kw_only=True)
class ScoringFields(PoolingFields):
    """What scores and reranking share."""

    instruction: str | None = body_field("What makes a document relevant; absent: that it answers a web search")
    max_tokens_per_query: int | None = body_field("Tokens of a query that are read", minimum=1)
    max_tokens_per_doc: int | None = body_field("Tokens of a document that are read", minimum=1)

    REFUSED: ClassVar[dict[str, Refused]] = {
        **PoolingFields.REFUSED,
        "truncation_side": Refused("the end of the document is cut off.", ("right",)),
        "chat_template": Refused("the server does not trust templates of requests; use --chat-template."),
        "chat_template_kwargs": Refused("use instruction.", ({},)),
        "add_special_tokens": Refused("the model decides it."),
    }


@dataclass(frozen=True, kw_only=True)
class ScoreRequest(ScoringFields):
    """POST /v1/score: one query with each document, or each with its own."""

    text_1: str | list[str] | None = body_field("The query, or one for each document")
    text_2: str | list[str] | None = body_field("The documents")
    queries: str | list[str] | None = body_field("Another name of text_1")
    documents: str | list[str] | None = body_field("Another name of text_2")
    data_1: str | list[str] | None = body_field("Another name of text_1")
    data_2: str | list[str] | None = body_field("Another name of text_2")
    items: str | list[str] | None = body_field("Another name of text_2")

    def texts(self, names: tuple[str, ...]) -> list[str]:
        """The texts under the one of these names that is given."""
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise bad_request(f"Exactly one of {', '.join(names)} is needed, got {given or 'none'}.", names[0])
        value = getattr(self, given[0])
        return [value] if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True)
class RerankDocument:
    text: str = body_field("The document's text", MISSING)


@dataclass(frozen=True, kw_only=True)
class RerankRequest(ScoringFields):
    """POST /v1/rerank, as Jina and Cohere have it."""

    query: str = body_field("What is looked for", MISSING)
    documents: list[str] | list[RerankDocument] = body_field("Texts, or objects with a text", MISSING)
    top_n: int = body_field("Results to return, the best; 0: all", 0, minimum=0)
    return_documents: bool = body_field("Return each document's text with its result", True)


async def score(request: web.Request) -> web.Response:
    state = request.app[STATE]
    body = parse(ScoreRequest, await read_json(request))
    model = state.check_model(body.model)
    queries, documents = body.texts(QUERIES), body.texts(DOCUMENTS)
    request_id = answer_id(request, body, "score")  # type: ignore[arg-type]
    scores, usage = await _scores(state, request.path, body, queries, documents, request_id)
    answer = {
        "id": request_id,
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [{"index": i, "object": "score", "score": number} for i, number in enumerate(scores)],
        "usage": usage,
    }
    return await json_answer(answer, len(scores))


async def rerank(request: web.Request) -> web.Response:
    state = request.app[STATE]
    body = parse(RerankRequest, await read_json(request))
    model = state.check_model(body.model)
    documents = [d if isinstance(d, str) else d.text for d in body.documents]
    request_id = answer_id(request, body, "rerank")  # type: ignore[arg-type]
    scores, usage = await _scores(state, request.path, body, [body.query], documents, request_id)
    best = sorted(enumerate(scores), key=lambda pair: -pair[1])[: body.top_n or None]
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": number} for i, number in best]
    if body.return_documents:
        results = [{"document": {"text": documents[result["index"]]}, **result} for result in results]
    return await json_answer({"id": request_id, "model": model, "results": results, "usage": usage}, len(results))


async def _scores(
    state: ServerState, path: str, body: ScoringFields, queries: list[str], documents: list[str], request_id: str
) -> tuple[list[float], dict[str, Any]]:
    """The score of each document, and the usage."""
    kind = check_kind(state, path, ("embed", "score"))
    if len(documents) > MAX_INPUTS:
        raise bad_request(f"There can be at most {MAX_INPUTS} documents, got {len(documents)}.", "documents")
    try:
        matched = pairs(queries, documents)
    except ValueError as error:
        raise from_value_error(error) from None
    limit, tokenizer = body.token_limit(state), state.engine.tokenizer
    params = PoolingParams(use_activation=body.use_activation)
    size = sum(map(len, queries)) + sum(map(len, documents))

    def cut() -> tuple[list[str], list[str]]:
        return (
            [shortened(tokenizer, query, body.max_tokens_per_query) for query in queries],
            [shortened(tokenizer, document, body.max_tokens_per_doc) for document in documents],
        )

    queries, documents = await tokenized(cut, size)
    if kind == "embed":
        if not body.use_activation:
            raise bad_request("use_activation cannot be false: a cosine is of vectors of length 1.", "use_activation")
        texts = [instructed(query, body.instruction) for query in queries] + documents
        ids = await tokenized(lambda: [embedding_ids(tokenizer, text, limit=limit) for text in texts], size)
        vectors = await pool(state, ids, params, body, request_id)
        return [_score_of(cosine(vectors[i], vectors[len(queries) + j])) for i, j in matched], usage_of(vectors)
    prompt = RerankPrompt(tokenizer, body.instruction, state.chat_template, limit)
    size *= len(documents) if len(queries) == 1 else 1
    ids = await tokenized(lambda: [prompt.token_ids(queries[i], documents[j]) for i, j in matched], size)
    outputs = await pool(state, ids, params, body, request_id)
    return [_score_of(output) for output in outputs], usage_of(outputs)


def _score_of(output: PoolingRequestOutput[ScoringOutput]) -> float:
    if output.outputs is None:
        raise RuntimeError("a score is missing")
    return output.outputs.score
