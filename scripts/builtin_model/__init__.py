"""Data, tokenizer, evaluation and card of the built-in model: `build` makes the data, `evaluate` scores it."""
