"""Fuzzes a target of `tests/fuzz/targets.py` with atheris: `python scripts/fuzz.py answers -max_total_time=600`.

Needs `pip install -e '.[fuzz]'`. Options behind the target's name are libFuzzer's. An input that fails is written to a
file `crash-…`; make a test of it in `tests/fuzz/test_targets.py`.
"""

import sys
from pathlib import Path


def main() -> None:
    import atheris

    sys.path.insert(0, str(Path(__file__).parent.parent))
    with atheris.instrument_imports(include=["qjax.text", "qjax.server", "qjax.sampling_params"]):
        from tests.fuzz.targets import TARGETS, tokenizer
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python scripts/fuzz.py {'|'.join(TARGETS)} [-max_total_time=SECONDS]")
    tokenizer()
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
