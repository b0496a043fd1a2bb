"""The figures of made-up answers, computed by hand; the table and the arrival times."""

import numpy as np
import pytest

from qjax.bench.client import Answer
from qjax.bench.config import ServeBenchConfig
from qjax.bench.report import figures, table
from qjax.bench.serve import arrivals

ANSWERS = [
    Answer(10, start=1.0, ttft=0.1, itls=[0.02, 0.04], latency=0.16, output_len=3, text="abc"),
    Answer(20, start=1.5, ttft=0.3, itls=[], latency=0.3, output_len=1, text="d"),
    Answer(30, start=1.55, ttft=0.5, itls=[0.7], latency=1.2, text="two words"),  # a server that counts nothing
    Answer(40, start=3.0, error="400 Bad Request"),
]


def measured(**options):
    return figures(ServeBenchConfig(**options), ANSWERS, 2.0, lambda text: len(text.split()))


def test_figures():
    out = measured(metric_percentiles="50,99.9", goodput=["ttft:400", "tpot:29.9"])
    assert (out["completed"], out["failed"], out["duration"]) == (3, 1, 2.0)
    assert (out["total_input_tokens"], out["total_output_tokens"]) == (60, 6)
    assert (out["request_throughput"], out["output_throughput"], out["total_token_throughput"]) == (1.5, 3.0, 33.0)
    assert out["mean_ttft_ms"] == pytest.approx(300) and out["median_ttft_ms"] == pytest.approx(300)
    assert out["mean_tpot_ms"] == pytest.approx((30 + 700) / 2), "the answer of one token has no TPOT"
    assert out["mean_itl_ms"] == pytest.approx((20 + 40 + 700) / 3) and out["p50_itl_ms"] == pytest.approx(40)
    assert out["median_e2el_ms"] == pytest.approx(300)
    assert out["std_e2el_ms"] == pytest.approx(np.std([160, 300, 1200]))
    assert out["p99.9_e2el_ms"] == pytest.approx(np.percentile([160, 300, 1200], 99.9))
    assert out["request_goodput"] == 0.5, "the second alone: 30 ms a token is too slow, 500 ms to the first too late"
    assert out["max_output_tokens_per_s"] == 4 and out["max_concurrent_requests"] == 2
    assert "ttfts" not in out


def test_details():
    out = measured(save_detailed=True)
    assert out["output_lens"] == [3, 1, 2, 0] and out["errors"] == ["", "", "", "400 Bad Request"]
    assert out["itls"] == [[0.02, 0.04], [], [0.7], []] and out["generated_texts"][2] == "two words"


def test_table():
    options = {"percentile_metrics": "ttft,tpot", "max_concurrency": 4, "request_rate": 2.5}
    lines = table(ServeBenchConfig(**options), measured(**options)).splitlines()
    assert all(len(line) == 51 or len(line) == 50 for line in lines)
    assert [line.rstrip() for line in lines] == [
        "============ Serving Benchmark Result ============",
        "Successful requests:                     3",
        "Failed requests:                         1",
        "Maximum request concurrency:             4",
        "Request rate configured (RPS):           2.50",
        "Benchmark duration (s):                  2.00",
        "Total input tokens:                      60",
        "Total generated tokens:                  6",
        "Request throughput (req/s):              1.50",
        "Output token throughput (tok/s):         3.00",
        "Peak output token throughput (tok/s):    4.00",
        "Peak concurrent requests:                2.00",
        "Total token throughput (tok/s):          33.00",
        "---------------Time to First Token----------------",
        "Mean TTFT (ms):                          300.00",
        "Median TTFT (ms):                        300.00",
        "P99 TTFT (ms):                           496.00",
        "-----Time per Output Token (excl. 1st token)------",
        "Mean TPOT (ms):                          365.00",
        "Median TPOT (ms):                        365.00",
        "P99 TPOT (ms):                           693.30",
        "==================================================",
    ]


def test_nothing_answered():
    config = ServeBenchConfig()
    out = figures(config, ANSWERS[3:], 1.0, len)
    assert (out["completed"], out["mean_ttft_ms"], out["max_concurrent_requests"]) == (0, 0.0, 0)
    assert "Successful requests:                     0" in table(config, out)


def test_arrivals():
    assert not arrivals(ServeBenchConfig(num_prompts=5)).any()
    times = arrivals(ServeBenchConfig(num_prompts=400, request_rate=8.0))
    assert times[-1] == pytest.approx(50) and (np.diff(times) > 0).all()
    spread = {
        b: np.diff(arrivals(ServeBenchConfig(num_prompts=400, request_rate=8.0, burstiness=b))).std()
        for b in (0.2, 1, 9)
    }
    assert spread[0.2] > 1.5 * spread[1] and spread[1] > 2 * spread[9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"request_rate": 0}, "request_rate must be above 0"),
        ({"max_concurrency": 0}, "max_concurrency must be at least 1"),
        ({"percentile_metrics": "ttft,prefill"}, "percentile_metrics knows ttft, tpot, itl, e2el, got 'prefill'"),
        ({"metric_percentiles": "x"}, "metric_percentiles must be numbers"),
        ({"metric_percentiles": "101"}, r"metric_percentiles must be in \[0, 100\]"),
        ({"goodput": ["ttft"]}, "goodput must be pairs such as ttft:200, got 'ttft'"),
        ({"goodput": ["ttft:x"]}, "goodput must be pairs such as ttft:200"),
        ({"goodput": ["itl:3"]}, "goodput knows ttft, tpot and e2el, got 'itl'"),
        ({"header": ["x"]}, "header must be pairs KEY=VALUE"),
        ({"backend": "tgi"}, "backend must be one of openai, openai-chat, vllm, got 'tgi'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ServeBenchConfig(**options)
