"""JSON schemas of many features: a list by hand, of what users send, and random ones."""

from random import Random

WORDS = ["name", "age", "city", "tags", "note", "id", "größe", "a b", "x/y", 'quote"d']
PATTERNS = ["^[a-z]{1,5}$", "^[A-Z][a-z]+$", "[0-9]", "^\\d{3}-\\d{4}$", "^(yes|no)$", "b", "^$|^x"]
FORMATS = ["date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname", "uri", "duration"]
VALUES = [
    "a",
    "",
    "<think>",
    "</tool_call>",
    "ü🙂",
    'say "hi"\n',
    0,
    -1,
    2.5,
    10**12,
    True,
    False,
    None,
    [1],
    {"k": "v"},
]

BY_HAND = [
    {},
    {"type": "object"},
    {"type": "string"},
    {"type": "null"},
    {"type": ["string", "null"]},
    {"type": "integer", "minimum": 5, "maximum": 7},
    {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 3, "multipleOf": 2},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": 0.5, "maximum": 2.25},
    {"const": {"a": [1, None, "x"]}},
    {"enum": ["red", "green", 3, None, True]},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "boolean"}], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [{"const": 1}], "items": {"type": "null"}, "maxItems": 3},
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 1},
    {"type": "object", "minProperties": 1, "additionalProperties": {"type": "boolean"}},
    {"type": "object", "patternProperties": {"^x_": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["b"]},
    {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/node"}},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
                "required": ["next"],
                "additionalProperties": False,
            }
        },
    },
    {"definitions": {"s": {"type": "string", "maxLength": 4}}, "type": "array", "items": {"$ref": "#/definitions/s"}},
    {"anyOf": [{"type": "integer", "maximum": 3}, {"type": "string", "maxLength": 2}]},
    {"oneOf": [{"type": "integer"}, {"type": "string"}]},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "string", "maxLength": 3}}, "required": ["b"]},
        ]
    },
    {"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 4}]},
    {"type": "object", "properties": {"kind": {"const": "cat"}}, "anyOf": [{"required": ["kind"]}]},
    {"type": "array", "uniqueItems": True, "items": {"enum": [1, 2, 3]}},
    {"not": {"type": "string"}},
    {"if": {"type": "string"}, "then": {"minLength": 2}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "array", "contains": {"const": 1}},
    {"type": "object", "propertyNames": {"pattern": "^a"}},
    {"type": "string", "pattern": "^(?=a)a"},
    {"type": "string", "format": "nope"},
    {"$ref": "https://example.com/schema.json"},
    {"$ref": "#/$defs/missing"},
    {"$ref": "#"},
    {"enum": []},
    {"type": "nope"},
    {"type": "integer", "minimum": 5, "maximum": 4},
    {"type": "object", "properties": {"a": False}, "required": ["a"]},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {
        "title": "T",
        "description": "d",
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "boolean",
        "default": True,
        "examples": [False],
    },
    {
        "type": "object",
        "properties": {"q": {"type": "string", "description": "x"}},
        "required": ["q"],
        "x-guidance": {"lenient": True},
    },
]


def random_schema(random: Random, depth: int = 3) -> dict:
    """A schema of some features; it may be one that nothing can satisfy, or that is refused."""
    kinds = ["string", "string", "integer", "number", "boolean", "null", "enum", "const", "format", "pattern", "ref"]
    if depth:
        kinds += ["object"] * 6 + ["array"] * 3 + ["anyOf", "oneOf", "allOf", "types"]
    kind = random.choice(kinds)
    low, high = sorted(random.choices(range(-20, 60), k=2))
    if kind == "string":
        bounds = {"minLength": random.randrange(4), "maxLength": random.randrange(4, 9)}
        return {"type": "string", **_some(random, bounds)}
    if kind in ("integer", "number"):
        least, most = random.choice(["minimum", "exclusiveMinimum"]), random.choice(["maximum", "exclusiveMaximum"])
        bounds = {least: low, most: high}
        if random.random() < 0.2:
            bounds["multipleOf"] = random.choice([2, 5, 7])
        return {"type": kind, **_some(random, bounds)}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "enum":
        return {"enum": random.sample(VALUES, random.randrange(1, 5))}
    if kind == "const":
        return {"const": random.choice(VALUES)}
    if kind == "format":
        return {"type": "string", "format": random.choice(FORMATS)}
    if kind == "pattern":
        return {"type": "string", "pattern": random.choice(PATTERNS)}
    if kind == "array":
        extra = {"minItems": random.randrange(3), "maxItems": random.randrange(3, 5)}
        if random.random() < 0.3:
            extra["prefixItems"] = [random_schema(random, depth - 1)]
        return {"type": "array", "items": random_schema(random, depth - 1), **_some(random, extra)}
    if kind in ("anyOf", "oneOf", "allOf"):
        return {kind: [random_schema(random, depth - 1) for _ in range(random.randrange(1, 4))]}
    if kind == "types":
        return {"type": random.sample(["string", "integer", "null", "boolean", "array"], 2)}
    if kind == "ref":
        return {"$ref": "#/$defs/d"}
    names = random.sample(WORDS, random.randrange(1, 5))
    schema = {"type": "object", "properties": {name: random_schema(random, depth - 1) for name in names}}
    schema["required"] = random.sample(names, random.randrange(len(names) + 1))
    schema["additionalProperties"] = random.choice([False, False, True, {"type": "integer"}])
    return schema if random.random() < 0.8 else {**schema, "additionalProperties": False, "maxProperties": len(names)}


def schemas(seed: int = 0, num: int = 250) -> list[dict]:
    random = Random(seed)
    defs = {"$defs": {"d": {"type": "object", "properties": {"x": {"type": "number"}}, "additionalProperties": False}}}
    return BY_HAND + [random_schema(random) | defs for _ in range(num - len(BY_HAND))]


def _some(random: Random, fields: dict) -> dict:
    return {name: value for name, value in fields.items() if random.random() < 0.5}
