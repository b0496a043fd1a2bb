"""Experts of FP8, AWQ and GPTQ checkpoints, and those that are quantised while they are loaded."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from safetensors.numpy import save_file

from qjax import LLM, SamplingParams
from qjax.checkpoint.convert import convert
from qjax.checkpoint.names import leaf_of
from qjax.checkpoint.safetensors import load_params, open_folder
from qjax.config import EngineConfig
from qjax.engine.memory import Device, plan
from qjax.kernels.fp8_matmul import grouped_fp8_matmul
from qjax.kernels.fp8_matmul.reference import dequantize as dequantize_fp8
from qjax.kernels.grouped_matmul import group_rows
from qjax.kernels.int4_matmul import dequantize as dequantize_int4
from qjax.kernels.int4_matmul import grouped_int4_matmul
from qjax.models.config import ModelConfig
from qjax.models.qwen3 import abstract_model
from tests.models.stepper import Stepper, mesh_of
from tests.models.test_moe import LARGE
from tests.quantization.checkpoints import CONFIG, QUANTIZATION, write_pair
from tests.quantization.test_quantized import IDS, config_of
from tests.server.serving import serving
from tests.text.small_tokenizer import write_small_tokenizer
from tests.tiny import MOE, write_checkpoint

METHODS = ["fp8", "awq", "gptq"]
# 384 = 2 x 192 = 4 x 96: FP8's blocks between the devices are halves and quarters; int4's groups must stay whole.
SIZES = {"fp8": 384, "awq": 512, "gptq": 512}
KINDS = ("gate_up_proj", "down_proj")


def sizes_of(method: str) -> dict:
    return MOE | {"moe_intermediate_size": SIZES[method], "vocab_size": 640}


@pytest.fixture(scope="module", params=METHODS)
def pair(request, tmp_path_factory):
    pair = write_pair(tmp_path_factory.mktemp(request.param), request.param, **sizes_of(request.param))
    for folder in pair:
        write_small_tokenizer(folder)
    return pair


def leaves_of(folder, tp: int = 1, dtype: str = "float32", **changes):
    """Config, mesh, definition and leaves; `changes` of the config."""
    config, mesh = dataclasses.replace(config_of(folder), **changes), mesh_of(tp)
    modeldef, _ = abstract_model(config, dtype, mesh)
    return config, mesh, modeldef, load_params(folder, config, mesh, dtype, progress=False)


def logits_of(folder, tp: int = 1, **changes) -> np.ndarray:
    return Stepper(*leaves_of(folder, tp, **changes)).run({}, {0: IDS})


def numbers_of(leaves: dict[str, jax.Array]) -> np.ndarray:
    """Leaves of a projection of all experts → [E, (2,) outputs, inputs]."""
    arrays = {name: jnp.asarray(np.asarray(leaf)) for name, leaf in leaves.items()}
    if "weight" in arrays:
        return np.asarray(dequantize_fp8(arrays["weight"], arrays["weight_scale_inv"], "float32"))
    words, scales = arrays["words"], arrays["scales_zeros"]
    (E, groups), outputs = scales.shape[:2], scales.shape[2:]
    flat = words.reshape(E, groups, -1, words.shape[-1]), scales.reshape(E, groups, -1)
    return np.stack([dequantize_int4(*one, "float32") for one in zip(*flat, strict=True)]).reshape(E, *outputs, -1)


def expected_of(folder, kind: str, layer: int) -> np.ndarray:
    tensors = open_folder(folder)
    names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
    owner = f"model.layers.{layer}.mlp.experts"
    stacked = np.stack([np.stack([tensors[f"{owner}.{e}.{name}.weight"] for name in names]) for e in range(8)])
    return stacked if kind == "gate_up_proj" else stacked[:, 0]


def of_projection(modeldef, leaves, kind: str, layer: int) -> dict[str, jax.Array]:
    owner = f"layers.{layer}.mlp.experts.{kind}."
    return {
        path.removeprefix(owner): leaf
        for path, leaf in zip(modeldef.paths, leaves, strict=True)
        if path.startswith(owner)
    }


@pytest.mark.parametrize("changes", [{}, {"expert_parallel": True}], ids=["tensor", "expert"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_loaded_experts_are_the_dequantised_ones(pair, tp: int, changes: dict):
    """Bit by bit, in parts of each expert and in whole experts."""
    quantised, plain = pair
    config, _, modeldef, leaves = leaves_of(quantised, tp, **changes)
    for kind in KINDS:
        own = of_projection(modeldef, leaves, kind, layer=1)
        assert len(own) == 2
        np.testing.assert_array_equal(numbers_of(own), expected_of(plain, kind, layer=1), err_msg=kind)
        for name, leaf in own.items():
            parts = {shard.data.shape for shard in leaf.addressable_shards}
            assert len(parts) == 1 and next(iter(parts))[0] == (8 // tp if changes else 8)
            assert sum(shard.data.size for shard in leaf.addressable_shards) == leaf.size, name
    if tp == 1:
        assert sum(leaf.nbytes for leaf in leaves) == config.weights_bytes(4)


plain_logits: dict = {}


@pytest.mark.parametrize(("tp", "changes"), [(1, {}), (2, {}), (4, {}), (4, {"expert_parallel": True})])
def test_logits_equal_those_of_the_dequantised_model(pair, tp: int, changes: dict):
    quantised, plain = pair
    if plain not in plain_logits:
        plain_logits[plain] = logits_of(plain)
    expected = plain_logits[plain]
    assert expected.std() > 0.3
    np.testing.assert_allclose(logits_of(quantised, tp, **changes), expected, rtol=0, atol=1e-4)


def test_each_device_reads_only_its_part(pair, monkeypatch):
    """Every byte of every expert's tensors once, and nothing twice (GPTQ's g_idx is looked at by all)."""
    quantised, _ = pair
    tensors, read = open_folder(quantised), {}

    class Counted(np.ndarray):
        def __getitem__(self, index):
            part = super().__getitem__(index)
            if getattr(self, "of", None) and isinstance(part, np.ndarray):
                read[self.of] = read.get(self.of, 0) + np.asarray(part).nbytes
            return np.asarray(part)

        @property
        def T(self):
            return named(np.asarray(self).T, self.of)

    def named(array: np.ndarray, name: str) -> np.ndarray:
        array = array.view(Counted)
        array.of = name
        return array

    config = dataclasses.replace(config_of(quantised), num_key_value_heads=2)
    modeldef, abstract = abstract_model(config, "float32", mesh_of(2))
    for kind in KINDS:
        for path, leaf in zip(modeldef.paths, abstract, strict=True):
            if path.startswith(f"layers.0.mlp.experts.{kind}."):
                rule = leaf_of(path, config, 2, 2)
                own = {name: named(np.asarray(tensors[name]), name) for name in rule.shapes}
                half = leaf.shape[rule.axis] // 2
                for part in range(2):
                    rule.read(own, part * half, (part + 1) * half)
    is_block = lambda name: name.endswith("_inv")  # of blocks that are cut both parts are read
    for name, num_bytes in read.items():
        assert tensors[name].nbytes <= num_bytes <= tensors[name].nbytes * (2 if is_block(name) else 1), name
    experts = [x for x in tensors if ".layers.0.mlp.experts." in x and not x.endswith("g_idx")]
    assert set(experts) <= set(read) | {x for x in experts if "qzeros" in x and x not in read}


def test_a_missing_scale_of_one_expert_is_named(tmp_path, pair):
    quantised, _ = pair
    scale = {"fp8": "weight_scale_inv", "awq": "qzeros", "gptq": "scales"}[quantised.name]
    missing = f"model.layers.1.mlp.experts.6.up_proj.{scale}"
    save_file({k: v for k, v in open_folder(quantised).items() if k != missing}, tmp_path / "model.safetensors")
    config = config_of(quantised)
    with pytest.raises(ValueError, match=f"tensor {missing} .* is missing"):
        load_params(tmp_path, config, mesh_of(1), "float32", progress=False)


def test_experts_that_are_not_quantised(tmp_path):
    """Qwen lists the routers; whole layers' experts may be left alone too."""
    skip = ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "model.layers.0.mlp.experts", "lm_head")
    quantised, plain = write_pair(tmp_path, "fp8", skip, **sizes_of("fp8"))
    _, _, modeldef, leaves = leaves_of(quantised)
    assert list(of_projection(modeldef, leaves, "down_proj", 0)) == ["kernel"]
    assert len(of_projection(modeldef, leaves, "down_proj", 1)) == 2
    assert sum(leaf.nbytes for leaf in leaves) == config_of(quantised).weights_bytes(4)
    np.testing.assert_allclose(logits_of(quantised), logits_of(plain), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["fp8", "int4"])
def test_no_expert_is_dequantised_but_those_in_work(method: str):
    """One expert's weight at a time: what the products need beside their arguments does not grow with E."""
    D, N, k = 256, 256, 2

    def temp_bytes(E: int) -> int:
        groups = group_rows(jnp.arange(8).reshape(4, k) % E, E, 8)
        x = jnp.zeros((len(groups.source), D))
        shape = lambda dtype, *dims: jax.ShapeDtypeStruct(dims, dtype)
        if method == "fp8":
            weights = shape(jnp.float8_e4m3fn, E, 2, N, D), shape(jnp.float32, E, 2, N // 128, D // 128)
            product = grouped_fp8_matmul
        else:
            weights = shape(jnp.int32, E, D // 128, 2, N // 64, 1024), shape(jnp.int32, E, D // 128, 2, N)
            product = grouped_int4_matmul
        compiled = jax.jit(lambda *args: product(*args, is_gated=True)).lower(x, *weights, groups.work).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temp_bytes(8), temp_bytes(64)
    assert 0 < many < few + 2 * N * D and many < 16 * 2 * N * D * 4


# From the options to the answer

PROMPTS = [[7, 8, 9, 10], list(range(20, 60))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
OPTIONS = {"kv_cache_memory_bytes": "16MiB", "max_num_seqs": 4, "max_num_batched_tokens": 64, "dtype": "float32"}


def answers(llm: LLM) -> list[list[int]]:
    return [list(out.outputs[0].token_ids) for out in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


async def test_answers_in_python_and_over_http(pair):
    quantised, plain = pair
    if quantised.name == "gptq":
        pytest.skip("repacked to what AWQ's are")
    expected = answers(LLM(str(plain), **OPTIONS))
    assert len({tuple(ids) for ids in expected}) == 2 and len(set(expected[0])) > 2
    llm = LLM(str(quantised), tensor_parallel_size=2, **OPTIONS)
    assert answers(llm) == expected
    async with serving(EngineConfig(model=str(quantised), **OPTIONS), served_model_name=["moe"]) as (url, engine):
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for prompt, ids in zip(PROMPTS, expected, strict=True):
            options = {"temperature": 0, "max_tokens": len(ids), "extra_body": {"ignore_eos": True}}
            answer = await client.completions.create(model="moe", prompt=prompt, **options)
            assert answer.choices[0].text == engine.tokenizer.decode(ids)


@pytest.fixture(scope="module")
def unquantised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unquantised")
    config = CONFIG | MOE | {"moe_intermediate_size": 512, "vocab_size": 640}
    tensors = write_checkpoint(folder, dtype=np.float32, **config)
    tensors = {name: 0.4 * t if "_proj." in name else t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    write_small_tokenizer(folder)
    return folder


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize(("method", "limit"), [("fp8", 0.04), ("int4", 0.13)])
def test_made_while_loading(unquantised, method: str, limit: float, tp: int):
    quantization = config_of(unquantised).with_quantization(method).quantization
    config, _, modeldef, leaves = leaves_of(unquantised, tp, "bfloat16", quantization=quantization)
    assert tp > 1 or sum(leaf.nbytes for leaf in leaves) == config.weights_bytes(2)
    for kind in KINDS:
        own = of_projection(modeldef, leaves, kind, layer=1)
        expected = expected_of(unquantised, kind, layer=1)
        error = np.linalg.norm(numbers_of(own) - expected) / np.linalg.norm(expected)
        assert 1e-3 < error < limit
        split = of_projection(*leaves_of(unquantised, tp, quantization=quantization, expert_parallel=True)[2:], kind, 1)
        whole = of_projection(*leaves_of(unquantised, 1, quantization=quantization)[2:], kind, 1)
        for name, leaf in split.items():
            np.testing.assert_array_equal(np.asarray(leaf).view("u1"), np.asarray(whole[name]).view("u1"))


@pytest.mark.parametrize("method", ["fp8", "int4"])
def test_a_converted_folder_is_what_loading_makes(unquantised, tmp_path, method):
    convert(unquantised, tmp_path / "made", method, progress=False)
    hf_config = json.loads((tmp_path / "made" / "config.json").read_text())
    skipped = hf_config["quantization_config"]["modules_to_not_convert"]
    assert skipped == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    made = leaves_of(tmp_path / "made")[3]
    quantization = config_of(unquantised).with_quantization(method).quantization
    for found, expected in zip(made, leaves_of(unquantised, quantization=quantization)[3], strict=True):
        if found.dtype == jnp.float32:  # scales, to a rounding
            np.testing.assert_allclose(found, expected, rtol=3e-7)
        else:
            assert np.mean(np.asarray(found).view("u1") != np.asarray(expected).view("u1")) < 1e-3


@pytest.mark.parametrize(("method", "gib"), [("fp8", 29.0), ("awq", 15.7)])
def test_plan_of_the_30b(method, gib):
    model = ModelConfig.from_hf(LARGE | {"quantization_config": QUANTIZATION[method]})
    sized = plan(EngineConfig(model="x", max_model_len=4096), model, Device("gpu", 60 * 2**30))
    assert sized.weights_bytes / 2**30 == pytest.approx(gib, abs=0.3)


def test_sizes_that_are_not_split_are_named():
    large = lambda method, **changes: ModelConfig.from_hf(
        LARGE | {"quantization_config": QUANTIZATION[method], "num_hidden_layers": 1} | changes
    )
    with pytest.raises(ValueError, match=r"moe_intermediate_size=768 is no multiple of 128 × tensor_parallel_size=4"):
        abstract_model(large("awq"), "bfloat16", mesh_of(4))
    with pytest.raises(ValueError, match=r"moe_intermediate_size=320 is no multiple of 128.*fp8"):
        abstract_model(large("fp8", moe_intermediate_size=320), "bfloat16", mesh_of(1))
    whole = dataclasses.replace(large("awq"), expert_parallel=True)
    abstract_model(whole, "bfloat16", mesh_of(4))
