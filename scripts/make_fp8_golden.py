"""Makes tests/golden/fp8.npz: a weight, what transformers makes of it in FP8, and what it takes that for.

Runs where torch and transformers are installed, neither of which qjax needs: `python scripts/make_fp8_golden.py`. Its
conversion runs on a CPU. For AWQ transformers has none of its own: it calls gptqmodel's kernels.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

PATH = Path(__file__).parent.parent / "tests" / "golden" / "fp8.npz"


def main() -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(20261123)).to(torch.bfloat16) * 0.02
    weight[3, 5], weight[:128, 128:256] = 2.0, 0  # an outlier, a block of zeros
    config = transformers.FineGrainedFP8Config(weight_block_size=(128, 128))
    quantizer = SimpleNamespace(quantization_config=config)
    name = "model.layers.0.mlp.up_proj.weight"
    made = Fp8Quantize(quantizer).convert({name: weight})
    quantised, scale = made[name], made[name + "_scale_inv"]
    numbers = Fp8Dequantize(quantizer)._dequantize_one(quantised, scale, torch.bfloat16)
    np.savez_compressed(
        PATH,
        weight=weight.view(torch.uint16).numpy(),
        quantised=quantised.view(torch.uint8).numpy(),
        scale=scale.numpy(),
        numbers=numbers.view(torch.uint16).numpy(),
        transformers=transformers.__version__,
    )
    print(f"{PATH}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
