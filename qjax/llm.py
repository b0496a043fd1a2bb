"""`LLM`: the engine as a Python library, for many prompts at once. Names are vLLM's."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from tqdm import tqdm

from qjax.config import BUILTIN_MODEL, EngineConfig
from qjax.engine.pooling import PoolingEngine, make_engine
from qjax.outputs import (
    CompletionBuilder,
    EmbeddingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringOutput,
)
from qjax.pooling_params import PoolingParams
from qjax.sampling_params import SamplingParams
from qjax.text.answer_parser import AnswerParser
from qjax.text.pooling import RerankPrompt, cosine, cut, embedding_ids, instructed, pairs
from qjax.text.tokenizer import Tokenizer
from qjax.text.tool_grammar import ToolChoice, with_tools

if TYPE_CHECKING:
    import jax

Prompt = str | dict[str, Any] | list[int]
Messages = list[dict[str, Any]]


class LLM:
    """A loaded model that generates, or embeds and scores (`runner`).

    Args:
      model: a local folder, a name on the Hugging Face hub, or the small Qwen3 that ships with qjax.
      **options: any field of `EngineConfig`, such as `max_model_len`, `tensor_parallel_size`, `dtype`.

    Raises:
      ValueError: a wrong option or checkpoint; the message names it.
    """

    def __init__(self, model: str = BUILTIN_MODEL, **options: Any):
        if options.pop("data_parallel_size", 1) != 1:
            raise ValueError(
                "data_parallel_size: an LLM is one engine. Start a process with an LLM for each group of GPUs "
                "(CUDA_VISIBLE_DEVICES) and give each a part of the prompts, or `qjax serve --data-parallel-size`."
            )
        self.engine = make_engine(EngineConfig(model=str(model), **options))
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts; the results have the prompts' order.

        Args:
          prompts: a text, `{"prompt": text}`, `{"prompt_token_ids": ids}` (both may have a "cache_salt"), a list of
            token ids, or a list of these.
          sampling_params: one for all or one for each; None: the model's defaults.
          use_tqdm: show a progress bar with tokens per second.
          priority: one for each prompt, lower runs earlier; needs `scheduling_policy="priority"`.

        Raises:
          ValueError: a prompt cannot be served; nothing was started.
        """
        many = _as_list(prompts)
        params = self._params_for(sampling_params, len(many))
        if priority is not None and self.engine.config.scheduling_policy != "priority":
            raise ValueError('priority needs scheduling_policy="priority".')
        if priority is not None and len(priority) != len(many):
            raise ValueError(f"priority must have one value for each of the {len(many)} prompts, got {len(priority)}.")
        requests = []
        for prompt, param in zip(many, params, strict=True):
            text, token_ids, cache_salt = self._parse(prompt)
            request_id = str(next(self._ids))
            self.engine.check_request(request_id, token_ids, param)
            if param.structured_outputs is not None:
                self.engine.grammars.compile(param.structured_outputs)
            requests.append((request_id, token_ids, param, text, cache_salt))
        for i, (request_id, token_ids, param, text, cache_salt) in enumerate(requests):
            self.engine.add_request(
                request_id,
                token_ids,
                param,
                prompt=text,
                priority=priority[i] if priority else 0,
                cache_salt=cache_salt,
            )
        return self._run([request_id for request_id, *_ in requests], use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        tool_choice: str | dict[str, Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        parse: bool = False,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, rendered by the model's chat template.

        Args:
          chat_template: replaces the tokenizer's template.
          tools: function definitions that the template writes into the prompt. The arguments of a `strict` one obey
            its schema.
          tool_choice: as in OpenAI's API: "auto", "none", "required", one function, or allowed_tools; calls that it
            demands obey the functions' schemas. What `structured_outputs` asks for holds beside calls.
          chat_template_kwargs: given to the template, such as `{"enable_thinking": False}`.
          parse: also give each answer its `message`, as the server returns it: with reasoning, content and tool calls
            told apart. It can be put behind `messages` as it is.

        Raises:
          ValueError: wrong messages, or a prompt that cannot be served.
        """
        is_one = bool(messages) and isinstance(messages[0], dict)
        conversations = cast("list[Messages]", [messages] if is_one else list(messages))
        choice = ToolChoice.of(tool_choice, tools)
        params = [_with_structure(p, tools, choice) for p in self._params_for(sampling_params, len(conversations))]
        tools = None if choice.mode == "none" else tools
        prompts = [
            self.engine.tokenizer.apply_chat_template(
                conversation,
                tools=tools,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        outputs = self.generate(prompts, params, use_tqdm=use_tqdm)
        return [_with_messages(output, tools) for output in outputs] if parse else outputs

    def prompt_logprobs(self, prompts: Prompt | Sequence[Prompt], *, use_tqdm: bool = True) -> list[list[float]]:
        """Log-probability of each token of a text but the first, given those before it, by the engine's own step.

        Args:
          prompts: as in `generate`; a text must leave room for one token more.

        Raises:
          ValueError: a text cannot be scored; nothing was started.
        """
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        scored = []
        for output in self.generate(prompts, params, use_tqdm=use_tqdm):
            rows = output.prompt_logprobs or []
            pairs = zip(output.prompt_token_ids[1:], rows[1:], strict=True)
            scored.append([row[token_id].logprob for token_id, row in pairs if row is not None])
        return scored

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[PoolingRequestOutput[EmbeddingOutput]]:
        """Embeds texts with a model such as Qwen3-Embedding; the results have the prompts' order.

        Write a query as `"Instruct: {task}\\nQuery:{query}"`, a document as it is.

        Args:
          prompts: as in `generate`. A text gets `<|endoftext|>` at its end, token ids are taken as they are.
          pooling_params: `dimensions`, and whether the vectors are scaled to length 1.
          truncate_prompt_tokens: keep this many tokens of each text; -1: what fits.

        Raises:
          ValueError: the model gives no embeddings, or a prompt cannot be served; nothing was started.
        """
        engine = self._pooling_engine("embed")
        limit = engine.max_model_len if truncate_prompt_tokens == -1 else truncate_prompt_tokens
        requests = []
        for prompt in _as_list(prompts):
            encode = partial(embedding_ids, engine.tokenizer, limit=limit)
            _, token_ids, cache_salt = self._parse(prompt, encode)
            requests.append((cut(token_ids, limit, "right"), cache_salt))
        return self._pool(requests, pooling_params or PoolingParams(), use_tqdm)

    def score(
        self,
        data_1: str | list[str],
        data_2: str | list[str],
        *,
        instruction: str | None = None,
        chat_template: str | None = None,
        truncate_prompt_tokens: int | None = None,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
    ) -> list[PoolingRequestOutput[ScoringOutput]]:
        """How well documents answer queries: a reranker's probability of "yes", or the cosine of two embeddings.

        Args:
          data_1: one query, or one for each document.
          data_2: the documents; the results have their order.
          instruction: the task, for the model to read; None: the model's own for a reranker, none for an embedder.
          chat_template: a Jinja template that replaces the reranker's official prompt.
          truncate_prompt_tokens: keep this many tokens of each prompt, by cutting the document's end; -1: what fits.

        Raises:
          ValueError: the model pools nothing, or a prompt cannot be served; nothing was started.
        """
        engine = self._pooling_engine(None)
        queries = [data_1] if isinstance(data_1, str) else list(data_1)
        documents = [data_2] if isinstance(data_2, str) else list(data_2)
        matched = pairs(queries, documents)
        limit = engine.max_model_len if truncate_prompt_tokens == -1 else truncate_prompt_tokens
        params = pooling_params or PoolingParams()
        if engine.pooling.kind == "embed":
            if chat_template is not None:
                raise ValueError("chat_template is a reranker's; an embedder reads the texts as they are.")
            if not params.use_activation:
                raise ValueError("use_activation cannot be false: a cosine is of vectors of length 1.")
            texts = [instructed(query, instruction) for query in queries] + documents
            ids = [(embedding_ids(engine.tokenizer, text, limit=limit), None) for text in texts]
            vectors = self._pool(ids, params, use_tqdm)
            return [cosine(vectors[i], vectors[len(queries) + j]) for i, j in matched]
        prompt = RerankPrompt(engine.tokenizer, instruction, chat_template, limit)
        return self._pool([(prompt.token_ids(queries[i], documents[j]), None) for i, j in matched], params, use_tqdm)

    def _pooling_engine(self, kind: str | None) -> PoolingEngine:
        """Raises ValueError unless the model pools, and gives what is wanted."""
        if not isinstance(self.engine, PoolingEngine):
            raise ValueError('this model generates text; embeddings and scores need runner="pooling".')
        if kind is not None and self.engine.pooling.kind != kind:
            raise ValueError("this model is a reranker: it gives scores, no embeddings.")
        return self.engine

    def _pool(
        self, requests: Sequence[tuple[list[int], str | None]], params: PoolingParams, use_tqdm: bool
    ) -> list[PoolingRequestOutput[Any]]:
        """Runs (token ids, cache salt) through the pooling engine, in order."""
        engine = cast(PoolingEngine, self.engine)
        ids = [str(next(self._ids)) for _ in requests]
        for request_id, (token_ids, _) in zip(ids, requests, strict=True):
            engine.check_pooling_request(request_id, token_ids, params)
        for request_id, (token_ids, cache_salt) in zip(ids, requests, strict=True):
            engine.add_pooling_request(request_id, token_ids, params, cache_salt=cache_salt)
        done: dict[str, PoolingRequestOutput] = {}
        with tqdm(total=len(ids), desc="Pooling", unit="request", disable=not use_tqdm) as bar:
            try:
                while engine.has_unfinished:
                    for output in engine.step():
                        done[output.request_id] = cast("PoolingRequestOutput", output)
                        bar.update()
            except BaseException:  # Ctrl-C in a notebook must not leave requests running in the engine
                for request_id in ids:
                    engine.abort(request_id)
                raise
        failed = next((i for i in ids if done[i].outputs is None), None)
        if failed is not None:
            raise RuntimeError(f"request {failed} could not be computed: its hidden state is not a number.")
        return [done[request_id] for request_id in ids]

    def update_weights(self, params: Sequence["jax.Array"]) -> None:
        """Puts other weights into the running engine, such as `Trainer.params`: no reload, no copy through the host.

        Raises:
          ValueError: requests run, or the arrays are not this model's.
        """
        self.engine.update_weights(params)

    def sleep(self, level: int = 1) -> None:
        """Gives the devices' memory back until `wake_up`; the compiled code stays.

        Args:
          level: 1 keeps the weights in the host's memory; 2 does not, and `wake_up` reads the checkpoint again.

        Raises:
          ValueError: another level, or the engine sleeps already.
        """
        self.engine.sleep(level)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Puts back what `sleep` took. With tags, only "weights" or "kv_cache", such as to update weights in between.

        Raises:
          ValueError: an unknown tag, or the checkpoint cannot be read again.
        """
        self.engine.wake_up(tags)

    def get_tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own defaults, from `generation_config.json`."""
        return SamplingParams.from_defaults(self.engine.default_sampling_params)

    def reset_prefix_cache(self, reset_connector: bool = False) -> bool:
        """Forgets the pages kept from earlier prompts, with `reset_connector` also those in the host's memory."""
        return self.engine.reset_prefix_cache(reset_connector)

    def _params_for(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise ValueError(f"sampling_params must be one or one for each of the {count} prompts, got {len(given)}.")
        return given

    def _parse(
        self, prompt: Prompt, encode: Callable[[str], list[int]] | None = None
    ) -> tuple[str | None, list[int], str | None]:
        """(text, token ids, cache salt) of a prompt."""
        encode = encode or self.engine.tokenizer.encode
        if isinstance(prompt, str):
            return prompt, encode(prompt), None
        if isinstance(prompt, list):
            return None, prompt, None
        unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
        if unknown or not ("prompt" in prompt or "prompt_token_ids" in prompt):
            raise ValueError(
                "a prompt is a text, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids' (and "
                f"'cache_salt'); got a dict with {sorted(prompt)}."
            )
        token_ids = prompt.get("prompt_token_ids")
        if token_ids is None:
            token_ids = encode(prompt["prompt"])
        return prompt.get("prompt"), token_ids, prompt.get("cache_salt")

    def _run(self, request_ids: list[str], use_tqdm: bool) -> list[RequestOutput]:
        """Steps until all have ended, putting the deltas together."""
        done: dict[str, RequestOutput] = {}
        answers: dict[str, dict[int, CompletionBuilder]] = {request_id: {} for request_id in request_ids}
        tokens_in = tokens_out = 0
        bar = tqdm(total=len(request_ids), desc="Generating", unit="request", disable=not use_tqdm)
        try:
            while self.engine.has_unfinished:
                for output in self.engine.step():
                    for delta in output.outputs:
                        answers[output.request_id].setdefault(delta.index, CompletionBuilder()).add(delta)
                        tokens_out += len(delta.token_ids)
                    if output.finished:
                        built = answers[output.request_id]
                        done[output.request_id] = replace(output, outputs=[built[i].build() for i in sorted(built)])
                        tokens_in += len(output.prompt_token_ids)
                        seconds = max(bar.format_dict["elapsed"], 1e-9)
                        bar.set_postfix_str(
                            f"prompt {tokens_in / seconds:.0f} tokens/s, output {tokens_out / seconds:.0f} tokens/s",
                            refresh=False,
                        )
                        bar.update()
        except BaseException:  # Ctrl-C in a notebook must not leave requests running in the engine
            for request_id in request_ids:
                self.engine.abort(request_id)
            raise
        finally:
            bar.close()
        return [done[request_id] for request_id in request_ids]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    is_one = isinstance(prompts, str | dict) or (bool(prompts) and isinstance(prompts[0], int))
    return cast("list[Prompt]", [prompts] if is_one else list(prompts))


def _with_structure(params: SamplingParams, tools: list[dict[str, Any]] | None, choice: ToolChoice) -> SamplingParams:
    """The parameters of a chat: a think block may come first, then tool calls or what the content must obey."""
    structure = params.structured_outputs
    wanted = with_tools(structure and replace(structure, after_thinking=True), tools, choice)
    return params if wanted == structure else params.with_(structured_outputs=wanted)


def _with_messages(output: RequestOutput, tools: list[dict[str, Any]] | None) -> RequestOutput:
    parsed = [AnswerParser(output.prompt or "", tools=tools).parse(answer.text) for answer in output.outputs]
    pairs = zip(output.outputs, parsed, strict=True)
    return replace(output, outputs=[replace(answer, message=p.message()) for answer, p in pairs])
