"""What an engine refuses of a request before it is queued. Plain Python, no jax."""

from collections.abc import Sequence

from qjax.sampling_params import SamplingParams


def check(
    prompt_token_ids: Sequence[int], params: SamplingParams, *, max_model_len: int, vocab_size: int, max_logprobs: int
) -> None:
    """Raises ValueError if an engine with these limits cannot serve the request.

    Args:
      max_logprobs: -1: the whole vocabulary.
    """
    num_tokens = len(prompt_token_ids)
    if num_tokens == 0:
        raise ValueError("The prompt is empty: at least one token is needed.")
    if num_tokens >= max_model_len:
        raise ValueError(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains "
            f"{num_tokens} input tokens, which leaves no room for an answer. Please shorten the prompt, or raise "
            "--max-model-len."
        )
    for name, ids in (
        ("prompt", prompt_token_ids),
        ("stop_token_ids", params.stop_token_ids or []),
        ("allowed_token_ids", params.allowed_token_ids or []),
        ("logit_bias", params.logit_bias or {}),
    ):
        wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
        if wrong is not None:
            raise ValueError(f"{name} has the token id {wrong}; the model's ids are 0 to {vocab_size - 1}.")
    limit = vocab_size if max_logprobs == -1 else max_logprobs
    for name in ("logprobs", "prompt_logprobs"):
        asked = getattr(params, name)
        asked = vocab_size if asked == -1 else asked
        if asked is not None and asked > limit:
            raise ValueError(f"Requested {name} of {asked}, which is greater than max allowed: {limit}.")
