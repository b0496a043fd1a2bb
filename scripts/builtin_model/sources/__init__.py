"""The facts that the dialogues are made of: `countries.json` and `words.json`, rebuilt by `rebuild`."""
