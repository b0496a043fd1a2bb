"""Rebuilds countries.json and words.json from the packages that they come from.

npm pack countries-list@3.4.1 && tar xzf countries-list-3.4.1.tgz
apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wordnet
python -m scripts.builtin_model.sources.rebuild package wordnet/usr/share/wordnet
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NUM_WORDS = 2400
MAX_DEFINITION = 56  # characters
MAX_EVERYDAY = 90
EVERYDAY = frozenset(  # words that people try first: longer definitions are allowed
    [
        "cat", "dog", "horse", "cow", "bird", "fish", "house", "water", "tree", "car", "book", "sun", "moon",
        "star", "apple", "bread", "milk", "table", "chair", "door", "window", "river", "mountain", "sea",
        "ocean", "lake", "island", "flower", "grass", "rain", "snow", "wind", "cloud", "fire", "stone", "gold",
        "silver", "iron", "glass", "paper", "pen", "knife", "spoon", "cup", "plate", "bed", "lamp", "clock",
        "phone", "computer", "bicycle", "train", "boat", "ship", "plane", "road", "bridge", "city", "village",
        "school", "teacher", "doctor", "nurse", "farmer", "king", "queen", "friend", "family", "mother",
        "father", "brother", "sister", "child", "baby", "hand", "foot", "head", "eye", "ear", "nose", "mouth",
        "heart", "brain", "music", "song", "dance", "picture", "letter", "word", "number", "day", "night",
        "morning", "year", "summer", "winter", "spring", "autumn", "eat", "drink", "sleep", "run", "walk",
        "swim", "read", "write", "speak", "sing", "laugh", "cry", "buy", "sell", "give", "take", "make",
        "build", "break", "happy", "sad", "big", "small", "old", "young", "new", "hot", "cold", "fast", "slow",
        "good", "bad", "red", "blue", "green", "white", "black", "cheese", "egg", "rice", "sugar", "salt",
        "coffee", "tea", "lion", "tiger", "elephant", "mouse", "rabbit", "bear", "wolf", "fox", "snake", "frog",
        "bee", "spider", "rose", "forest", "garden", "kitchen", "bottle", "shirt", "shoe", "hat", "coat",
        "ball", "game", "language", "planet", "desert", "volcano", "museum", "library", "hospital", "airport",
        "banana", "orange",
    ]
)  # fmt: skip
KINDS = {"noun": "n", "verb": "v", "adj": "a"}
KIND_OF_KEY = {"1": "noun", "2": "verb", "3": "adj", "5": "adj"}
AVOIDED = re.compile(
    r"sex|genital|drug|slave|kill|murder|death|naked|excre|feces|penis|vagin|breast|prostitut|offensive|obscene|racial"
    r"|nazi|holocaust|rape|suicide|intercourse|anus|buttocks|urin|torture|whore|terroris|negro|ethnic|\bhell\b|damn|jew|islam|christ"
)


def countries(package: Path) -> list[dict[str, Any]]:
    """States with one capital; parts of others and places without a capital are left out."""

    def read(name: str) -> dict[str, Any]:
        return json.loads((package / f"{name}.min.json").read_text(encoding="utf-8"))

    continents, languages, currencies = read("continents"), read("languages"), read("currencies")
    out = []
    for code, entry in sorted(read("countries").items()):
        if not entry["capital"] or "partOf" in entry or not entry["languages"] or not entry["phone"]:
            continue
        out.append(
            {
                "code": code,
                "name": entry["name"],
                "capital": entry["capital"],
                "continent": continents[entry["continent"]],
                "currency": currencies[entry["currency"][0]]["name"],
                "currency_code": entry["currency"][0],
                "languages": [languages[c]["name"] for c in entry["languages"]],
                "calling_code": entry["phone"][0],
            }
        )
    return out


def words(folder: Path) -> list[dict[str, str]]:
    """The most frequent words by WordNet's tagged texts, each with its first sense where that is short."""
    counts: Counter[tuple[str, str]] = Counter()
    for line in (folder / "cntlist.rev").read_text(encoding="utf-8").splitlines():
        key, _, count = line.split()
        lemma, _, rest = key.partition("%")
        kind = KIND_OF_KEY.get(rest[0])
        if kind and re.fullmatch(r"[a-z]{3,10}", lemma):
            counts[lemma, kind] += int(count)
    index = {kind: _index(folder, kind) for kind in KINDS}
    best: dict[str, tuple[int, str]] = {}
    for (lemma, kind), count in counts.items():
        best[lemma] = max(best.get(lemma, (0, "")), (count, kind))
    out: list[dict[str, str]] = []
    for lemma, (_, kind) in sorted(best.items(), key=lambda item: (item[0] not in EVERYDAY, -item[1][0], item[0])):
        limit = MAX_EVERYDAY if lemma in EVERYDAY else MAX_DEFINITION
        definition = _definition(folder, kind, index[kind].get(lemma), limit)
        if definition and not AVOIDED.search(definition) and not AVOIDED.search(lemma):
            out.append({"word": lemma, "kind": KINDS[kind], "definition": definition})
        if len(out) == NUM_WORDS:
            break
    return sorted(out, key=lambda w: w["word"])


def _index(folder: Path, kind: str) -> dict[str, int]:
    """Lemma -> offset of its first sense in the data file."""
    out = {}
    for line in (folder / f"index.{kind}").read_text(encoding="utf-8").splitlines():
        if not line.startswith(" "):
            fields = line.split()
            out[fields[0]] = int(fields[-int(fields[2])])  # the offsets stand last, one a sense
    return out


def _definition(folder: Path, kind: str, offset: int | None, limit: int, _data: dict[Path, bytes] = {}) -> str | None:  # noqa: B006
    if offset is None:
        return None
    path = folder / f"data.{kind}"
    data = _data.setdefault(path, path.read_bytes())
    gloss = data[offset : data.index(b"\n", offset)].decode("utf-8").split("|", 1)[1]
    text = re.sub(r"\([^()]*\)", "", gloss.split('"')[0])
    text = re.sub(r"\s+", " ", text.split(";")[0]).strip(" :,")
    is_short = 8 <= len(text) <= limit and text.isascii() and not re.search(r"[()`0-9]", text)
    return text if is_short else None


def _write(name: str, rows: list[Any]) -> None:
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (HERE / name).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{name}: {len(rows)} entries")


if __name__ == "__main__":
    _write("countries.json", countries(Path(sys.argv[1])))
    _write("words.json", words(Path(sys.argv[2])))
