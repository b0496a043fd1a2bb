"""A small tokenizer of Qwen3's kind (byte-level BPE, the same 26 added tokens and template) for tests without a model.

Any text can be encoded: all 256 bytes are in the vocabulary. The official vocabulary's pre-tokenizer, normalizer,
post-processor and decoder are used, so text is split at the same places.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
PLAIN_ADDED_TOKENS = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
NUM_ADDED = len(SPECIAL_TOKENS) + len(PLAIN_ADDED_TOKENS)
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = """
What is the capital of France? The capital of France is Paris, and the capital of Norway is Oslo.
system user assistant You are a helpful assistant. Let me think about the question step by step.
Hello! How are you today? I am fine, thank you. Please write a short poem about the sea and the mountains.
The quick brown fox jumps over the lazy dog; the five boxing wizards jump quickly, while nobody is watching them.
def add(a, b):\n    return a + b\n\nfor index in range(10):\n    print(add(index, 1), index * index)\n
{"name": "get_weather", "arguments": {"city": "Oslo", "unit": "celsius", "days": 3, "hourly": false}}
One, two, three, four, five, six, seven, eight, nine and ten are the first numbers that children learn to count.
Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Příliš žluťoučký kůň úpěl ďábelské ódy.
你好，世界。今天天气很好，我们一起去公园散步吧。日本の首都は東京です。안녕하세요 세계. Привет, мир! 🙂🎉👩‍🚀🇳🇴
"""


def build_small_tokenizer(vocab_size: int = 512) -> Tokenizer:
    """A `tokenizers.Tokenizer` with `vocab_size` ids, the 26 added tokens last, as in Qwen3."""
    num_ordinary = vocab_size - NUM_ADDED
    if num_ordinary < 256:
        raise ValueError(f"vocab_size must be at least {256 + NUM_ADDED}, got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=num_ordinary,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    if tokenizer.get_vocab_size() != num_ordinary:
        raise ValueError(f"vocab_size can be at most {tokenizer.get_vocab_size() + NUM_ADDED}, got {vocab_size}.")
    tokenizer.add_tokens(
        [AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS]
        + [AddedToken(t, special=False, normalized=False) for t in PLAIN_ADDED_TOKENS]
    )
    return tokenizer


def write_small_tokenizer(folder: str | Path, vocab_size: int = 512) -> Path:
    """Writes the tokenizer as a Hugging Face folder: tokenizer.json, tokenizer_config.json, chat_template.jinja.

    With the default 512 ids the added tokens are 486..511: `<|endoftext|>` 486, `<|im_end|>` (EOS) 488.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    build_small_tokenizer(vocab_size).save(str(folder / "tokenizer.json"))
    config = {
        "add_prefix_space": False,
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    template = Path(__file__).parent / "golden" / "chat_template.jinja"
    (folder / "chat_template.jinja").write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    return folder
