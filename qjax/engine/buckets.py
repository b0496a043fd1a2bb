"""Which shapes of the step are compiled: few enough to compile, close enough to waste little.

A step is padded to a `Bucket`. On a GPU a padded row costs next to nothing (decoding reads all weights for one row
as for many), and compiling costs seconds: the page tables always have full width. On a CPU every padded row and page
costs, so there the buckets follow the batch more closely.
"""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Bucket:
    """Static shape of one step: `num_decodes` rows, then `num_tokens` prompt tokens of up to `num_prefills` chunks."""

    num_decodes: int  # Bd
    num_tokens: int  # Tp, 0: no prefill part
    num_prefills: int  # Bp, 0 where Tp is 0
    num_pages: int  # W, width of the page tables

    @property
    def num_rows(self) -> int:
        """Rows of which a token may be sampled."""
        return self.num_decodes + self.num_prefills


class Buckets:
    """The shapes that an engine with these limits can meet."""

    def __init__(
        self, *, is_gpu: bool, max_num_seqs: int, max_num_batched_tokens: int, max_num_prefills: int, max_pages: int
    ):
        if is_gpu:
            self.decodes = _upto([8, 16, 32, 64, 128, 192], 256, max_num_seqs)
            self.mixed_decodes = _upto([0, 16, 64, 128], 256, max_num_seqs)
            self.tokens = _upto([16, 64, 128, 256, 512, 1024, 2048, 4096], 8192, max_num_batched_tokens)
            # A place for a chunk costs attention and sampling a little, used or not, and chunks are rarely short.
            self.prompts = [(n, min(max(4, n // 16), max_num_prefills)) for n in self.tokens[:-1]]
            self.prompts.append((self.tokens[-1], max_num_prefills))
            self.pages = [max_pages]
        else:
            self.decodes = _upto([1], 8, max_num_seqs, factor=4)
            self.mixed_decodes = sorted({0, max_num_seqs})
            self.tokens = _upto([32], 256, max_num_batched_tokens, factor=4)
            self.prompts = [(n, places) for n in self.tokens for places in _upto([1], 8, max_num_prefills, factor=8)]
            self.pages = _upto([16, 64], 256, max_pages, factor=4)

    def choose(self, num_decodes: int, num_tokens: int, num_prefills: int, num_pages: int) -> Bucket:
        """The smallest bucket that holds the batch."""
        width = _at_least(self.pages, num_pages)
        if num_tokens == 0:
            return Bucket(_at_least(self.decodes, num_decodes), 0, 0, width)
        for tokens, places in self.prompts:
            if tokens >= num_tokens and places >= num_prefills:
                return Bucket(_at_least(self.mixed_decodes, num_decodes), tokens, places, width)
        raise RuntimeError(f"no bucket holds {num_tokens} tokens of {num_prefills} chunks: {self.prompts}")

    def ahead(self) -> list[Bucket]:
        """What is compiled before the first request, most needed first: first prompts, then decoding, then the mix."""
        width = self.pages[0]
        first = [Bucket(self.mixed_decodes[0], tokens, most, width) for tokens, most in dict(self.prompts).items()]
        decode = [Bucket(n, 0, 0, width) for n in self.decodes]
        mixed = [Bucket(n, *self.prompts[-1], width) for n in self.mixed_decodes[1:]]
        return [first[-1], *decode, *mixed, *first[:-1]]


def _upto(small: list[int], step: int, limit: int, factor: int = 2) -> list[int]:
    """`small`, then `step` growing by `factor`, ending with `limit` itself."""
    sizes = [size for size in small if size < limit]
    while step < limit:
        sizes.append(step)
        step *= factor
    return [*sizes, limit]


def _at_least(sizes: list[int], needed: int) -> int:
    for size in sizes:
        if size >= needed:
            return size
    raise RuntimeError(f"no bucket holds {needed}: the largest is {sizes[-1]}")
