"""JSON schemas of the kinds of the public JSON-Schema-Test-Suite, and of tools as their users write them.

Lengths are bounded, so that weights that were never trained can come to an end too.
"""

NAME = {"type": "string", "minLength": 1, "maxLength": 12}
SMALL = {"type": "integer", "minimum": 0, "maximum": 999}
ADDRESS = {
    "type": "object",
    "properties": {"street": NAME, "number": SMALL},
    "required": ["street", "number"],
    "additionalProperties": False,
}


def closed(**properties) -> dict:
    """An object with exactly these properties, as strict schemas have it."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def items(content: dict, most: int = 3, least: int = 0) -> dict:
    return {"type": "array", "items": content, "minItems": least, "maxItems": most}


SCHEMAS = {
    # kinds of the test suite
    "type: boolean": {"type": "boolean"},
    "type: null": {"type": "null"},
    "type: integer with bounds": {"type": "integer", "minimum": -5, "maximum": 250},
    "type: integer, exclusive": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10},
    "type: number with bounds": {"type": "number", "minimum": 0, "maximum": 1},
    "multipleOf": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000},
    "type: string with lengths": {"type": "string", "minLength": 2, "maxLength": 6},
    "several types": {"type": ["boolean", "null"]},
    "const": {"const": {"a": [1, None, "x"]}},
    "const: text": {"const": 'a "quoted" \\ text'},
    "enum: texts": {"enum": ["red", "green", "blue"]},
    "enum: mixed": {"enum": [1, "one", None, True, [1]]},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"},
    "pattern: alternatives": {"type": "string", "pattern": "^(north|south)-[ab]+$", "maxLength": 12},
    "format: date": {"type": "string", "format": "date"},
    "format: time": {"type": "string", "format": "time"},
    "format: uuid": {"type": "string", "format": "uuid"},
    "format: ipv4": {"type": "string", "format": "ipv4"},
    "format: email": closed(email={"type": "string", "format": "email", "maxLength": 20}),
    "items": items({"type": "integer", "minimum": 0, "maximum": 99}, 4, 2),
    "items of items": items(items({"type": "boolean"}, 2, 1), 2, 1),
    "prefixItems": {
        "type": "array",
        "prefixItems": [{"type": "boolean"}, {"enum": ["a", "b"]}],
        "items": False,
        "minItems": 2,
    },
    "minItems": items({"const": 0}, 5, 5),
    "properties": closed(a=SMALL, b={"type": "boolean"}),
    "optional properties": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "additionalProperties: a schema": {
        "type": "object",
        "properties": {"a": SMALL},
        "required": ["a"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 2,
    },
    "an empty object": {"type": "object", "additionalProperties": False},
    "names with escapes": closed(**{"a b": {"type": "boolean"}, 'ä"': {"type": "null"}}),
    "anyOf": {"anyOf": [{"type": "boolean"}, closed(a=SMALL)]},
    "anyOf: nullable": closed(a={"anyOf": [NAME, {"type": "null"}]}),
    "allOf": {"allOf": [{"type": "integer", "minimum": 10}, {"type": "integer", "maximum": 20}]},
    "$ref to $defs": {"$defs": {"address": ADDRESS}, **closed(home={"$ref": "#/$defs/address"})},
    "$ref: a chain": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"type": "boolean"}}, "$ref": "#/$defs/a"},
    "$ref: a tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "boolean"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    # as real tools and libraries write them
    "weather": closed(location=NAME, unit={"enum": ["celsius", "fahrenheit"]}),
    "a judge of MLflow": closed(result={"enum": ["yes", "no"]}, rationale={"type": "string", "maxLength": 40}),
    "a judge with a score": closed(score={"type": "integer", "minimum": 1, "maximum": 5}, reason=NAME),
    "a calendar event": closed(
        title=NAME, date={"type": "string", "format": "date"}, participants=items(NAME, 2), all_day={"type": "boolean"}
    ),
    "a pydantic model": {
        "$defs": {"Level": {"enum": ["low", "high"], "title": "Level", "type": "string"}},
        "title": "Ticket",
        "type": "object",
        "properties": {
            "title": {"title": "Title", "type": "string", "maxLength": 12},
            "level": {"$ref": "#/$defs/Level"},
            "votes": {"default": 0, "title": "Votes", "type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["title", "level", "votes"],
        "additionalProperties": False,
    },
    "steps of a solution": closed(
        steps=items(closed(explanation=NAME, output=NAME), 2, 1), final_answer={"type": "string", "maxLength": 10}
    ),
    "entities": closed(people=items(NAME, 2), places=items(NAME, 2)),
    "a classification": closed(
        label={"enum": ["positive", "neutral", "negative"]}, confidence={"type": "number", "minimum": 0, "maximum": 1}
    ),
    "a file edit": closed(path={"type": "string", "pattern": "^[a-z]{1,8}\\.py$"}, line=SMALL, text=NAME),
    "a command": closed(command={"enum": ["ls", "cat", "grep"]}, arguments=items(NAME, 2)),
    "an order": closed(
        id={"type": "string", "pattern": "^ORD-[0-9]{4}$"}, lines=items(closed(sku=NAME, quantity=SMALL), 2, 1)
    ),
    "a filter": closed(
        field={"enum": ["price", "size"]}, operator={"enum": ["<", ">", "="]}, value={"anyOf": [SMALL, NAME]}
    ),
    "a union of actions": {
        "anyOf": [
            closed(action={"const": "search"}, query=NAME),
            closed(action={"const": "stop"}, reason=NAME),
        ]
    },
    "an address book": {"$defs": {"address": ADDRESS}, **closed(entries=items({"$ref": "#/$defs/address"}, 2, 1))},
    "a colour": closed(red=SMALL, green=SMALL, blue=SMALL),
    "a phone": closed(phone={"type": "string", "pattern": "^\\+[0-9]{2} [0-9]{3}$"}),
    "a translation": closed(language={"enum": ["de", "fr", "ja"]}, text={"type": "string", "maxLength": 16}),
}
