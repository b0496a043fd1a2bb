"""docs/performance.md and its plot are what the lines say; the floors are those worked out by hand."""

import json
import re

import pytest

from scripts import profile_table
from scripts.bench_common import random_requests
from scripts.bench_floors import MODELS, PEAKS, decode_step, least_seconds, share_of_floor, weights_read
from scripts.bench_table import (
    LINES,
    PAGE,
    PLOT,
    Run,
    all_runs,
    label,
    plot,
    ratio,
    read,
    step_table,
    table,
    updated,
    value,
)
from scripts.profile_table import kind_of, kinds_ms

H100, EIGHT, SMALL = PEAKS["H100"], MODELS["Qwen3-8B"], MODELS["Qwen3-0.6B"]
FORM = {"engine", "version", "model", "dtype", "kv", "tp", "eager", "figure"}  # the keys of the peer's lines


def test_page_and_plot_are_made_of_the_lines():
    text, runs = PAGE.read_text(encoding="utf-8"), all_runs()
    assert runs and updated(text, runs) == text, "run python scripts/bench_table.py --page"
    assert PLOT.read_text(encoding="utf-8") == plot(runs[0]), "run python scripts/bench_table.py --page"


@pytest.mark.parametrize("path", sorted(LINES.glob("*.jsonl")), ids=lambda path: path.stem)
def test_lines_say_where_they_are_from(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        assert set(line) >= FORM - ({"version", "kv", "tp", "eager"} if "kinds_ms" in line else set()), line
        assert line["engine"] == "vllm" or (line["commit"] and line["device"]), line
    assert all("H100" in line["device"] or "H200" in line["device"] for line in lines if "device" in line)


def test_models_have_their_published_sizes():
    sizes = [round(model.num_params / 1e9, 2) for model in MODELS.values() if model.quantization is None]
    assert sizes == [0.6, 1.72, 4.02, 8.19, 14.77, 32.76] and "Qwen3-14B" in MODELS


def test_bytes_of_a_step():
    """8B: 36 layers of 4096 x (4096 + 2 x 1024 + 4096 + 3 x 12288) weights and two norms, the output layer."""
    layer = 4096 * (6144 + 4096 + 3 * 12288) + 2 * 4096 + 2 * 128
    assert weights_read(EIGHT) == 2 * (36 * layer + 151936 * 4096 + 4096)
    assert weights_read(SMALL) == 2 * SMALL.num_params, "the embedding is the output layer"
    step = decode_step(EIGHT, [100, 28])
    assert step.bytes - weights_read(EIGHT) == 128 * 2 * 36 * 8 * 128 * 2
    assert step.flops == 2 * weights_read(EIGHT) + 4 * 32 * 128 * 36 * 128


@pytest.mark.parametrize(
    ("model", "figure", "ms"),
    [  # bytes / 3.0 TB/s, by hand
        (EIGHT, "decode_b1_in128_out257", 5.06),
        (EIGHT, "sampled_b32_in128_out257", 5.45),
        (EIGHT, "decode_b256_in128_out257", 8.27),
        (EIGHT, "long_b8_ctx32768", 17.93),
        (SMALL, "decode_b1_in128_out128", 0.405),
        (SMALL, "decode_b256_in128_out257", 2.91),
        (EIGHT, "ttft_b1_in128", 5.05),
        (EIGHT, "prefill_16x2048", 595.3),
        (MODELS["Qwen3-8B-FP8"], "decode_b1_in128_out257", 2.743),  # 6.95e9 weights of 1 byte, 0.62e9 of 2
        (
            MODELS["Qwen3-8B-AWQ"],
            "decode_b1_in128_out257",
            1.658,
        ),  # 6.95e9 of 0.531: 4 bits, and 2 + 2 bytes a group of 128
    ],
)
def test_floors(model, figure, ms):
    assert least_seconds(model, figure, H100) * 1e3 == pytest.approx(ms, rel=2e-3)


def test_floor_of_many_requests():
    """Every token reads the keys and values of its context; every step until the longest answer, all weights."""
    prompts, outs = random_requests(256)
    kv = sum((len(ids) + step) * 147456 for ids, out in zip(prompts, outs, strict=True) for step in range(1, out))
    decode = (kv + weights_read(EIGHT) * (max(outs) - 1)) / 3.0e12
    seconds = least_seconds(EIGHT, "throughput_256req_rand", H100)
    assert decode < seconds < decode + sum(map(len, prompts)) * 2e10 / H100.flops_per_s
    assert least_seconds(EIGHT, "startup", H100) is None and least_seconds(EIGHT, "serve_256req_rand", H100) is None


def test_shares_and_ratios():
    decode = {"model": "Qwen3-8B", "dtype": "bf16", "figure": "decode_b1_in128_out257"}
    many = decode | {"figure": "throughput_256req_rand", "seconds": 20.0}
    lines = [
        decode | {"engine": "qjax", "ms_per_step": 99.0},
        decode | {"engine": "qjax", "ms_per_step": 6.0},
        decode | {"engine": "vllm", "ms_per_step": 7.5, "version": "0.26.0"},
        many | {"engine": "qjax", "out_tok_s": 90.0},
        many | {"engine": "vllm", "out_tok_s": 100.0},
        decode | {"engine": "vllm", "figure": "done", "gpu": "NVIDIA H100 80GB HBM3"},
    ]
    run = Run("now", lines)
    rows = run.rows("Qwen3-8B")
    assert list(rows) == [decode["figure"], many["figure"]] and run.device == "NVIDIA H100 80GB HBM3"
    assert [ratio(row) for row in rows.values()] == [1.25, 0.9] and ratio({"qjax": lines[1]}) is None
    assert share_of_floor(lines[1], run.device) == pytest.approx(5.058 / 6, rel=1e-3)
    assert share_of_floor(lines[1], "CPU") is None and share_of_floor(lines[1] | {"dtype": "fp8"}, "H100") is None
    text = table(run, "Qwen3-8B")
    assert "| decode, batch 1, a step | ms | 6.00 | 7.50 | 1.25 | 5.06 | 84 % |" in text and "vLLM 0.26.0" in text


def test_latencies_are_rows_and_sampled_requests_too():
    line = {"engine": "qjax", "model": "m", "figure": "serve_256req_rand", "out_tok_s": 1.0, "sampled": True}
    rows = Run("now", [line | {"itl_ms_p99": 7.5, "ttft_ms_p50": 3.0}]).rows("m")
    name = "serve_256req_rand, sampled"
    assert list(rows) == [name, f"{name}, itl p99", f"{name}, ttft p50"]
    assert value(rows[f"{name}, itl p99"]["qjax"]) == (7.5, "ms", False)
    assert label(name) == "HTTP, 256 requests at once, sampled"
    assert label("serve_8req_rate2, itl p99") == "HTTP, 8 requests, 2 a second, itl p99"


def test_kernels_of_a_profile_by_kind():
    names = {
        "paged_decode_splits_kernel": "attention",
        "paged_prefill_kernel": "attention",
        "add_rms_norm_kernel": "norms",
        "norm_rope_write_kernel": "rotary embedding, KV write",
        "small_matmul_kernel": "products",
        "nvjet_tst_128x8_64x12_4x1_v_bz_TNT": "products",
        "gemm_fusion_dot_12": "products",
        "loop_multiply_fusion_3": "other",
    }
    assert {name: kind_of(name) for name in names} == names
    kinds = kinds_ms({"loop_fusion": 9000.0, "gemm_1": 1000.0, "gemm_2": 1500.0, "add_rms_norm": 10.0})
    assert kinds == {"products": 2.5, "norms": 0.01, "other": 9.0} and list(kinds)[-1] == "other"


def test_the_page_names_real_scripts():
    for name in re.findall(r"scripts/\w+\.(?:py|sh)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent.parent / name).exists(), name


def test_a_profile_becomes_a_line_and_a_table(tmp_path, monkeypatch, capsys):
    """20 steps of 16 layers: attention 10 us and a product 30 us a layer, one sampler of 20 us."""
    one = [("paged_decode_splits_kernel", 10e3), ("gemm_fusion_dot_1", 30e3)] * 16 + [("argmax_fusion", 20e3)]
    events = [(float(i), duration, name) for i, (name, duration) in enumerate(one * 20)]
    monkeypatch.setattr(profile_table, "kernels", lambda folder: events)
    (tmp_path / "decode_b32").mkdir()
    out = tmp_path / "lines.jsonl"
    monkeypatch.setattr("sys.argv", ["profile_table.py", str(tmp_path), "--model", "Qwen3-8B", "--out", str(out)])
    profile_table.main()
    run = read(out)
    (line,) = run.steps()
    assert (line["figure"], line["num_kernels"], line["ms_in_kernels"]) == ("step_b32_ctx144", 33, 0.66)
    assert line["kinds_ms"] == {"products": 0.48, "attention": 0.16, "other": 0.02}
    assert "19 steps of 33 kernels, 0.660 ms" in capsys.readouterr().out
    line["device"] = "NVIDIA H100 80GB HBM3"
    assert "| Qwen3-8B, batch 32, context 144 | products | 0.48 | 73 % |" in step_table(Run("now", [line]))
