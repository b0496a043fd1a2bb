"""The shell examples of the documents: bodies that the server's checks take, and flags that the commands know."""

import json
import re
import shlex
from pathlib import Path

import pytest

from qjax.cli import make_parser
from qjax.cli.options import with_dashes
from qjax.server.app import ROUTES
from qjax.server.errors import ApiError
from qjax.server.schema import parse

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = {
    f"{path.name} {i}": block
    for path in DOCUMENTS
    for i, block in enumerate(re.findall(r"^```bash\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S))
}
CURL = re.compile(r"^curl http://localhost:8000(/\S+) [^\n]*?-d '(\{.*?\})'$", re.M | re.S)
BODIES = {f"{name}: {path}": (path, body) for name, block in SHELL.items() for path, body in CURL.findall(block)}
COMMANDS = [
    line.replace("\\\n", "") for block in SHELL.values() for line in re.findall(r"^qjax (?:.*\\\n)*.*$", block, re.M)
]


@pytest.mark.parametrize("name", BODIES)
def test_bodies_are_taken(name):
    path, text = BODIES[name]
    route = next(route for route in ROUTES if route.path == path and route.method == "POST")
    failures = []
    for kind in route.bodies:
        try:
            parse(kind, json.loads(text))
            return
        except ApiError as error:
            failures.append(str(error))
    raise AssertionError(failures)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_known(line):
    args, unknown = make_parser().parse_known_args(with_dashes(shlex.split(line, comments=True)[1:]))
    assert not unknown and args.command


def test_there_are_some():
    assert len(BODIES) >= 6 and any("bench serve" in line for line in COMMANDS)
