"""Unpacks the training data: python -m scripts.builtin_model.unpack build/builtin_model/packed data"""

import sys
from pathlib import Path

from scripts.builtin_model.dataset import unpack_folder

if __name__ == "__main__":
    unpack_folder(Path(sys.argv[1]), Path(sys.argv[2]))
