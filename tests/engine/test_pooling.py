"""Embeddings and scores of the served path, against transformers' and against the dense forward pass."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qjax import LLM, EngineConfig, PoolingParams, SamplingParams
from qjax.checkpoint.pooling import Pooling, find_pooling
from qjax.research import score_texts
from qjax.text.pooling import PREFIX, SUFFIX, RerankPrompt, cut, embedding_ids, shortened
from tests.engine.conftest import make_llm
from tests.models.test_qwen3 import GOLDEN
from tests.text.small_tokenizer import write_small_tokenizer

EXPECTED = np.load(GOLDEN / "pooling.npz")
LENGTHS = EXPECTED["lengths"].tolist()
CLOSE = {"rtol": 0, "atol": 2e-5}  # float32, sums in another order
# Steps of 32 tokens and pages of 16: longer inputs come in chunks.
FEW_SHAPES = {"max_num_batched_tokens": 32, "max_num_seqs": 8, "max_model_len": 256}
END = 486  # <|endoftext|> of the small tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return write_small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def embedder(tiny_folder):
    return make_llm(tiny_folder, runner="pooling", **FEW_SHAPES)


@pytest.fixture(scope="module")
def reranker(tiny_folder):
    return make_llm(tiny_folder, hf_overrides={"classifier_from_token": ["n", "y"]}, **FEW_SHAPES)


def golden_ids(name):
    return [EXPECTED[f"{name}.ids.{n}"].tolist() for n in LENGTHS]


def load(folder, tokenizer_folder, **options):
    return LLM(str(folder), tokenizer=str(tokenizer_folder), kv_cache_memory_bytes="4MiB", **FEW_SHAPES, **options)


def vectors(outputs):
    return np.array([output.outputs.embedding for output in outputs])


class TestGolden:
    @pytest.mark.parametrize("name", ["tied_gqa2"])  # the other's come below
    def test_embeddings_are_those_of_transformers(self, name, tokenizer_folder):
        llm = load(GOLDEN / name, tokenizer_folder, runner="pooling")
        assert llm.engine.model_config.tie_word_embeddings  # no output layer is loaded
        np.testing.assert_allclose(vectors(llm.embed(golden_ids(name))), EXPECTED[f"{name}.embeddings"], **CLOSE)

    @pytest.mark.parametrize("name", ["tied_gqa2", "untied_gqa4"])
    def test_scores_are_those_of_transformers(self, name, tokenizer_folder, monkeypatch):
        """The two tokens have no text in the small vocabulary, so their ids are given."""
        overrides = {"classifier_from_token": ["n", "y"]}
        ids = dict(zip(("n", "y"), EXPECTED["tokens"].tolist(), strict=True))
        monkeypatch.setattr("qjax.engine.pooling._token_ids", lambda pooling, _: tuple(ids[t] for t in pooling.tokens))
        llm = load(GOLDEN / name, tokenizer_folder, hf_overrides=overrides)
        requests = [(token_ids, None) for token_ids in golden_ids(name)]
        scores = [output.outputs.score for output in llm._pool(requests, PoolingParams(), False)]
        np.testing.assert_allclose(scores, EXPECTED[f"{name}.scores"], **CLOSE)

    def test_a_checkpoint_without_prefix_and_output_layer(self, tokenizer_folder, tmp_path):
        """As Qwen3-Embedding-8B was saved; its files say that it is an embedder."""
        name = "untied_gqa4"
        config = json.loads((GOLDEN / name / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        (tmp_path / "config.json").write_text(json.dumps(config))
        tensors = load_file(GOLDEN / name / "model.safetensors")
        bare = {key.removeprefix("model."): t for key, t in tensors.items() if key != "lm_head.weight"}
        save_file(bare, tmp_path / "model.safetensors")
        write_sentence_transformers(tmp_path)
        llm = load(tmp_path, tokenizer_folder)
        np.testing.assert_allclose(vectors(llm.embed(golden_ids(name))), EXPECTED[f"{name}.embeddings"], **CLOSE)

    def test_a_converted_reranker(self, tokenizer_folder, tmp_path):
        """Its classifier is the difference of the two rows, so its scores are the original's."""
        name = "untied_gqa4"
        config = json.loads((GOLDEN / name / "config.json").read_text())
        (tmp_path / "config.json").write_text(
            json.dumps(config | {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 1})
        )
        tensors = load_file(GOLDEN / name / "model.safetensors")
        head = tensors.pop("lm_head.weight").astype(np.float32)
        no, yes = EXPECTED["tokens"]
        save_file(tensors | {"score.weight": (head[yes] - head[no])[None]}, tmp_path / "model.safetensors")
        llm = load(tmp_path, tokenizer_folder)
        outputs = llm._pool([(ids, None) for ids in golden_ids(name)], PoolingParams(), False)
        np.testing.assert_allclose([o.outputs.score for o in outputs], EXPECTED[f"{name}.scores"], **CLOSE)
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"score.weight is missing, expected \[1, 64\]"):
            load(tmp_path, tokenizer_folder)


class TestEmbed:
    def test_a_crowd_of_lengths_equals_the_dense_forward_pass(self, embedder):
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, 480, n).tolist() for n in (2, 3, 15, 16, 17, 32, 33, 130, 200, 255)]
        prompts += [prompts[8][:97] + prompts[3], prompts[8]]  # beginnings that are in the prefix cache by then
        dense = [scores.hidden_states[-1] for scores in score_texts(embedder, prompts, with_hidden_states=True)]
        dense = np.array([h / np.linalg.norm(h) for h in dense])
        outputs = embedder.embed(prompts, use_tqdm=False)
        np.testing.assert_allclose(vectors(outputs), dense, **CLOSE)
        again = embedder.embed(prompts, use_tqdm=False)
        assert [o.num_cached_tokens for o in again][-3:] == [240, 112, 192]  # whole pages, short of the last token
        np.testing.assert_allclose(vectors(again), dense, **CLOSE)
        assert [o.finish_reason for o in outputs] == ["stop"] * len(prompts)
        embedder.engine.scheduler.check_integrity()

    def test_dimensions_and_the_plain_hidden_state(self, embedder):
        plain = vectors(embedder.embed("Hello", pooling_params=PoolingParams(use_activation=False), use_tqdm=False))[0]
        (whole,) = vectors(embedder.embed("Hello", use_tqdm=False))
        (short,) = vectors(embedder.embed("Hello", pooling_params=PoolingParams(dimensions=8), use_tqdm=False))
        assert abs(np.linalg.norm(plain) - 1) > 0.1 and plain.shape == (64,) and short.shape == (8,)
        np.testing.assert_allclose(whole, plain / np.linalg.norm(plain), **CLOSE)
        np.testing.assert_allclose(short, plain[:8] / np.linalg.norm(plain[:8]), **CLOSE)

    def test_texts_are_closed_and_token_ids_are_not(self, embedder):
        text, ids, salted = embedder.embed(
            ["Hello", [393, 299], {"prompt": "Hello", "cache_salt": "a"}], use_tqdm=False
        )
        assert text.prompt_token_ids == salted.prompt_token_ids == [393, 299, END]
        assert ids.prompt_token_ids == [393, 299]
        (cut_text,) = embedder.embed("Hello " * 9, truncate_prompt_tokens=4, use_tqdm=False)
        assert len(cut_text.prompt_token_ids) == 4 and cut_text.prompt_token_ids[-1] == END

    def test_the_whole_context_can_be_used(self, embedder):
        full = [5] * 256
        assert np.isfinite(vectors(embedder.embed([full], use_tqdm=False))).all()
        with pytest.raises(ValueError, match=r"maximum context length is 256 .* contains 257 tokens"):
            embedder.embed([full, [*full, 5]], use_tqdm=False)
        assert not embedder.engine.has_unfinished
        (fits,) = embedder.embed("a b " * 900, truncate_prompt_tokens=-1, use_tqdm=False)
        assert len(fits.prompt_token_ids) == 256

    def test_cosine_of_an_embedder(self, embedder):
        scores = embedder.score("Paris", ["Paris", "Oslo is in Norway."], use_tqdm=False)
        query, first, second = vectors(embedder.embed(["Paris", "Paris", "Oslo is in Norway."], use_tqdm=False))
        np.testing.assert_allclose([s.outputs.score for s in scores], [query @ first, query @ second], **CLOSE)
        (asked,) = embedder.score("Paris", "Paris", instruction="Find it", use_tqdm=False)
        (written,) = embedder.embed("Instruct: Find it\nQuery:Paris", use_tqdm=False)
        np.testing.assert_allclose(asked.outputs.score, vectors([written])[0] @ first, **CLOSE)

    def test_refusals(self, embedder, llm):
        with pytest.raises(ValueError, match="--runner generate"):
            embedder.generate("Hello", SamplingParams(max_tokens=1), use_tqdm=False)
        with pytest.raises(ValueError, match='runner="pooling"'):
            llm.embed("Hello")
        with pytest.raises(ValueError, match="dimensions must be at most 64"):
            embedder.embed("Hello", pooling_params=PoolingParams(dimensions=65))
        with pytest.raises(ValueError, match="empty"):
            embedder.embed([[]])
        with pytest.raises(ValueError, match="0 to 639"):
            embedder.embed([[640]])
        for wrong in (0, -1, True, 1.5):
            with pytest.raises(ValueError, match="dimensions must be"):
                PoolingParams(dimensions=wrong)

    def test_an_aborted_request_leaves_nothing(self, embedder):
        engine = embedder.engine
        engine.add_pooling_request("a", [5] * 200, PoolingParams())
        engine.add_pooling_request("b", [6] * 10, PoolingParams())
        engine.step()
        assert engine.abort("a").finish_reason == "abort"
        outputs = [o for _ in range(5) for o in engine.step()]
        assert [(o.request_id, o.finish_reason) for o in outputs] == [("b", "stop")]
        assert not engine.has_work and not engine._params and not engine._hidden
        engine.scheduler.check_integrity()


class TestScore:
    def test_a_score_is_that_of_the_prompt(self, reranker):
        documents = ["Oslo", "Paris is a city."]
        outputs = reranker.score("Which city?", documents, use_tqdm=False)
        prompt = RerankPrompt(reranker.get_tokenizer())
        assert [o.prompt_token_ids for o in outputs] == [prompt.token_ids("Which city?", d) for d in documents]
        logits = reranker.score(
            "Which city?", documents, pooling_params=PoolingParams(use_activation=False), use_tqdm=False
        )
        scores = [1 / (1 + np.exp(-o.outputs.score)) for o in logits]
        np.testing.assert_allclose([o.outputs.score for o in outputs], scores, **CLOSE)

    def test_pairs(self, reranker):
        both = reranker.score(["a", "b"], ["c", "d"], use_tqdm=False)
        alone = [reranker.score(q, d, use_tqdm=False)[0] for q, d in (("a", "c"), ("b", "d"))]
        assert [o.prompt_token_ids for o in both] == [o.prompt_token_ids for o in alone]
        with pytest.raises(ValueError, match="1:1, 1:N or N:N"):
            reranker.score(["a", "b"], ["c"])
        with pytest.raises(ValueError, match="no embeddings"):
            reranker.embed("a")

    def test_new_weights_have_their_own_head(self, reranker):
        engine = reranker.engine
        old = list(engine.runner.leaves)
        (before,) = reranker.score("a", "b", use_tqdm=False)
        reranker.update_weights([2 * leaf for leaf in old])
        (other,) = reranker.score("a", "b", use_tqdm=False)
        assert other.outputs.score != pytest.approx(before.outputs.score, abs=1e-4)
        reranker.update_weights(old)
        (again,) = reranker.score("a", "b", use_tqdm=False)
        assert again.outputs.score == pytest.approx(before.outputs.score, abs=1e-6)

    def test_on_two_devices(self, reranker, tiny_folder):
        overrides = {"classifier_from_token": ["n", "y"]}
        split = make_llm(tiny_folder, hf_overrides=overrides, tensor_parallel_size=2, **FEW_SHAPES)
        (ours,), (theirs,) = (llm.score("Which city?", "Oslo", use_tqdm=False) for llm in (split, reranker))
        assert ours.outputs.score == pytest.approx(theirs.outputs.score, abs=1e-5)

    def test_an_answer_must_be_one_token(self, tiny_folder):
        with pytest.raises(ValueError, match=r"classifier_from_token: 'no such' is no token"):
            make_llm(tiny_folder, hf_overrides={"classifier_from_token": ["no such", "y"]})


class TestPrompts:
    def test_the_closing_token(self, embedder):
        tokenizer = embedder.get_tokenizer()
        plain = tokenizer.encode("Hello there")
        assert embedding_ids(tokenizer, "Hello there") == [*plain, END]
        assert embedding_ids(tokenizer, "Hello there<|endoftext|>") == [*plain, END]
        assert embedding_ids(tokenizer, "Hello there", add_special_tokens=False) == plain
        assert embedding_ids(tokenizer, "Hello there", limit=3) == [*plain[:2], END]
        assert embedding_ids(tokenizer, "Hello there", limit=3, side="left") == [*plain[-2:], END]
        assert embedding_ids(tokenizer, "") == [END]

    def test_a_tokenizer_that_closes_by_itself(self, tmp_path):
        """Qwen3-Embedding's: its post-processor appends the token."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import processors

        from qjax.text.tokenizer import Tokenizer

        write_small_tokenizer(tmp_path)
        backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
        closing = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", END)])
        backend.post_processor = processors.Sequence([backend.post_processor, closing])
        backend.save(str(tmp_path / "tokenizer.json"))
        tokenizer = Tokenizer.from_pretrained(tmp_path)
        plain = tokenizer.encode("Hello there")
        assert tokenizer.encode("Hello there", True) == [*plain, END]
        assert embedding_ids(tokenizer, "Hello there") == [*plain, END]
        assert embedding_ids(tokenizer, "Hello there", limit=2) == [plain[0], END]

    def test_the_rerankers_prompt(self, embedder):
        tokenizer = embedder.get_tokenizer()
        ids = RerankPrompt(tokenizer).token_ids("q", "d")
        web = "Given a web search query, retrieve relevant passages that answer the query"
        assert tokenizer.decode(ids, skip_special_tokens=False) == (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            f"<Instruct>: {web}\n<Query>: q\n<Document>: d<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
        # in three parts as the model card does it, or in one: the same tokens
        assert ids == tokenizer.encode(tokenizer.decode(ids, skip_special_tokens=False))
        own = RerankPrompt(tokenizer, instruction="Find birds").token_ids("q", "d")
        assert "<Instruct>: Find birds\n" in tokenizer.decode(own, skip_special_tokens=False)

    def test_a_limit_cuts_the_document_alone(self, embedder):
        tokenizer = embedder.get_tokenizer()
        prefix, suffix = tokenizer.encode(PREFIX), tokenizer.encode(SUFFIX)
        whole = RerankPrompt(tokenizer).token_ids("q", "word " * 50)
        short = RerankPrompt(tokenizer, limit=len(whole) - 20).token_ids("q", "word " * 50)
        assert short == whole[: len(whole) - 20 - len(suffix)] + suffix
        with pytest.raises(ValueError, match="truncate_prompt_tokens must be more than"):
            RerankPrompt(tokenizer, limit=len(prefix) + len(suffix)).token_ids("q", "d")

    def test_a_template_of_ones_own(self, embedder):
        tokenizer = embedder.get_tokenizer()
        template = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
        ids = RerankPrompt(tokenizer, "task", template).token_ids("q", "d")
        assert tokenizer.decode(ids) == "system=task;query=q;document=d;"
        with pytest.raises(ValueError, match="cannot render"):
            RerankPrompt(tokenizer, None, "{{ messages.").token_ids("q", "d")
        with pytest.raises(ValueError, match="would cut off the end"):
            RerankPrompt(tokenizer, None, template, limit=2).token_ids("q", "d")

    def test_cutting(self, embedder):
        tokenizer = embedder.get_tokenizer()
        assert cut([1, 2, 3], 2, "left") == [2, 3] and cut([1, 2, 3], 0, "left") == [] and cut([1], 5, "right") == [1]
        assert cut([1, 2, 3], -1, "right") == []
        assert shortened(tokenizer, "Hello there", None) == shortened(tokenizer, "Hello there", 99) == "Hello there"
        ids = tokenizer.encode("🙂🙂🙂🙂")
        assert all("\ufffd" not in shortened(tokenizer, "🙂🙂🙂🙂", n) for n in range(len(ids)))


def write_sentence_transformers(folder, kind="sentence_transformers.models.Pooling", **options):
    options = options or {"pooling_mode_cls_token": False, "pooling_mode_lasttoken": True}
    modules = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules.append({"idx": 1, "path": "1_Last", "type": kind})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Last").mkdir(exist_ok=True)
    (folder / "1_Last" / "config.json").write_text(json.dumps(options))


CAUSAL = {"architectures": ["Qwen3ForCausalLM"]}


class TestWhatACheckpointIsFor:
    def found(self, folder, config=None, **options):
        return find_pooling(EngineConfig(model=str(folder), **options), folder, config or CAUSAL)

    def test_by_its_files(self, tmp_path):
        assert self.found(tmp_path) is None
        write_sentence_transformers(tmp_path)
        assert self.found(tmp_path) == Pooling("embed")
        assert self.found(tmp_path, runner="generate") is None
        write_sentence_transformers(tmp_path, pooling_mode="lasttoken")
        assert self.found(tmp_path) == Pooling("embed")
        for mean in ({"pooling_mode_mean_tokens": True}, {"pooling_mode": "mean"}, {"pooling_mode": ["mean", "max"]}):
            write_sentence_transformers(tmp_path, **mean)
            with pytest.raises(ValueError, match="expected lasttoken"):
                self.found(tmp_path)
        kind = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"
        write_sentence_transformers(tmp_path, kind, true_token_id=9693, false_token_id=2152)
        assert self.found(tmp_path) == Pooling("score", (2152, 9693))
        write_sentence_transformers(tmp_path, kind, true_token_id=9454, false_token_id=None)
        with pytest.raises(ValueError, match="false_token_id=None"):
            self.found(tmp_path)

    @pytest.mark.parametrize(
        ("name", "pooling"),
        [
            ("Qwen3-Embedding-0.6B", Pooling("embed")),
            ("qwen3-reranker-4b", Pooling("score", ("no", "yes"))),
            ("Qwen3-8B", None),
        ],
    )
    def test_by_its_name(self, tmp_path, name, pooling):
        (tmp_path / name).mkdir()
        assert self.found(tmp_path / name) == pooling
        assert self.found(tmp_path / name, runner="pooling") == (pooling or Pooling("embed"))

    def test_by_its_config(self, tmp_path):
        """vLLM's overrides for the original reranker mean the same here."""
        classifier = {"architectures": ["Qwen3ForSequenceClassification"]}
        overrides = {**classifier, "classifier_from_token": ["no", "yes"], "is_original_qwen3_reranker": True}
        assert self.found(tmp_path, overrides) == Pooling("score", ("no", "yes"))
        assert self.found(tmp_path, classifier) == Pooling("score")
        assert self.found(tmp_path, {"architectures": ["Qwen3Model"]}) == Pooling("embed")
        with pytest.raises(ValueError, match="classifier_from_token must be like"):
            self.found(tmp_path, CAUSAL | {"classifier_from_token": ["yes"]})
