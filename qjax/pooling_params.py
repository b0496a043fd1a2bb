"""`PoolingParams`: what is made of a prompt's last hidden state. Names are vLLM's."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolingParams:
    """Options of one embedding or score.

    Args:
      dimensions: length of the embedding: its first numbers, scaled to length 1 again (Matryoshka representations,
        Kusupati et al., 2022); None: the model's hidden size.
      use_activation: scale an embedding to length 1, and make a score a probability; when false, the hidden state and
        the logit are given as they are.

    Raises:
      ValueError: an option is out of range; the message names it.
    """

    dimensions: int | None = None
    use_activation: bool = True

    def __post_init__(self) -> None:
        number = self.dimensions
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise ValueError(f"dimensions must be an integer of at least 1, got {number!r}.")
        if not isinstance(self.use_activation, bool):
            raise ValueError(f"use_activation must be true or false, got {self.use_activation!r}.")
