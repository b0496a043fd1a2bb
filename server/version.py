"""The version that the server reports."""

import importlib.metadata

try:
    VERSION = importlib.metadata.version("qjax")
except importlib.metadata.PackageNotFoundError:  # run from a source folder that is not installed
    VERSION = "0"
FINGERPRINT = f"qjax-{VERSION}"
