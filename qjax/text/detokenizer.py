"""`Detokenizer`: one answer's tokens to text as they come, with stop strings. Bytes in, whole characters out.

Text is given out once and never taken back: the bytes of an unfinished character wait, and so does an end of the text
that may become a stop string. The tokenizer itself is not called; each token is a table look-up.
"""

import codecs
from collections.abc import Sequence

from qjax.sampling_params import SamplingParams
from qjax.text.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Decodes one answer. `append` its tokens, `flush` at its end.

    A token that ends the answer (EOS or one of `stop_token_ids`) is not appended, unless its text is wanted.

    Attributes:
      stop_match: the stop string that ended the answer; nothing comes after it.
      num_tokens: tokens taken so far, the one that completed the stop string included, none after it.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self.stop_match: str | None = None
        self.num_tokens = 0
        self._is_on = params.detokenize
        self._table = tokenizer.bytes_table(params.skip_special_tokens)
        self._decode = (decoder := _Utf8Decoder("replace")).decode
        self._decoder = decoder
        self._stops = [_StopString(s) for s in params.stop or []]
        self._stop_starts = {s.text[0] for s in self._stops}
        self._keeps_stop = params.include_stop_str_in_output
        self._held = ""  # decoded, but perhaps the first part of a stop string

    def append(self, token_ids: Sequence[int], min_tokens_reached: bool = True) -> str:
        """Takes new tokens and returns the text that they release.

        Args:
          min_tokens_reached: false while no stop string may end the answer; one that is completed then never does.
        """
        if self.stop_match is not None:
            return ""
        if not self._is_on:
            self.num_tokens += len(token_ids)
            return ""
        if not self._stops:
            self.num_tokens += len(token_ids)
            return self._decode(b"".join([self._bytes(i) for i in token_ids]))
        released = []
        for token_id in token_ids:
            self.num_tokens += 1
            released.append(self._release(self._decode(self._bytes(token_id)), min_tokens_reached))
            if self.stop_match is not None:
                break
        return "".join(released)

    def flush(self) -> str:
        """The rest of the text when the answer has ended; an unfinished character becomes U+FFFD."""
        if self.stop_match is not None:
            return ""
        text = self._held + self._decode(b"", True)
        self._held = ""
        return text

    def _bytes(self, token_id: int) -> bytes:
        # a model's vocabulary may be padded beyond the tokenizer's
        return self._table[token_id] if token_id < len(self._table) else b""

    def _release(self, new: str, may_stop: bool) -> str:
        if not self._held and self._stop_starts.isdisjoint(new):
            return new
        text = self._held + new
        for end, char in enumerate(new, len(self._held) + 1):
            for stop in self._stops:
                if stop.advance(char) and may_stop and self.stop_match is None:
                    self.stop_match = stop.text
            if self.stop_match is not None:
                self._held = ""
                return text[: end if self._keeps_stop else end - len(self.stop_match)]
        num_held = max(stop.num_matched for stop in self._stops)
        split = len(text) - num_held
        self._held = text[split:]
        return text[:split]


class _StopString:
    """Finds a string in a stream (Knuth, Morris and Pratt): each character costs the same, however long the string.

    `num_matched` is the length of the longest end of the stream that is a proper prefix of the string.
    """

    def __init__(self, text: str):
        self.text = text
        self.num_matched = 0
        self._shorter = [0] * len(text)  # [i]: the longest proper prefix of text[:i + 1] that also ends it
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self._shorter[length - 1]
            length += text[i] == text[length]
            self._shorter[i] = length

    def advance(self, char: str) -> bool:
        """Takes the next character; true if it completes the string."""
        n = self.num_matched
        while n and char != self.text[n]:
            n = self._shorter[n - 1]
        n += char == self.text[n]
        is_complete = n == len(self.text)
        self.num_matched = self._shorter[n - 1] if is_complete else n
        return is_complete
