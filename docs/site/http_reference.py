"""The HTTP reference: the OpenAPI document as a page, every route and field; for pages.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from flowprefill.server.openapi.document import openapi_document
from flowprefill.server.openapi.operations import OPERATIONS

Schema = dict[str, Any]


def whole_document() -> dict[str, Any]:
    """Return the document of a server with all its routes."""
    return openapi_document(OPERATIONS)


def page(document: dict[str, Any]) -> str:
    """Return the page."""
    parts = [
        "# HTTP reference",
        "",
        f"{document['info']['description']} [The guide](../docs/api.md) says more.",
        "",
        "A running server has the same as `/openapi.json`; [here is the file](openapi.json).",
        "",
    ]
    schemas = document["components"]["schemas"]
    by_tag: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            text = operation_text(f"{method.upper()} {path}", operation, schemas)
            by_tag.setdefault(operation["tags"][0], []).append(text)
    for tag, texts in by_tag.items():
        parts += [f"## {tag}", "", *texts]
    parts += ["## Objects", ""]
    for name, schema in schemas.items():
        if not name.endswith("Request") and name != "Document":
            shown = table(schema) if schema.get("properties") else [type_text(schema)]
            parts += [f"### {name}", "", schema.get("description", ""), "", *shown, ""]
    return "\n".join(parts)


def operation_text(title: str, operation: dict[str, Any], schemas: dict[str, Schema]) -> str:
    """Return the part of one route."""
    parts = [f"### {title}", "", operation["summary"], "", operation.get("description", ""), ""]
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content:
        schema = schemas[content["schema"]["$ref"].rpartition("/")[2]]
        parts += ["**Body**", "", *table(schema), "", *refused(schema)]
    parameters = operation.get("parameters", [])
    if parameters:
        parts += ["| parameter | in | type | meaning |", "|---|---|---|---|"]
        for one in parameters:
            meaning = cell(one.get("description", ""))
            kind = type_text(one["schema"])
            parts.append(f"| `{one['name']}` | {one['in']} | {kind} | {meaning} |")
        parts.append("")
    parts += ["| status | answer |", "|---|---|"]
    parts += [
        f"| {status} | {answer_text(one)} |" for status, one in operation["responses"].items()
    ]
    parts.append("")
    if content:
        for name, example in content["examples"].items():
            body = json.dumps(example["value"], indent=2).replace("\n", "\n    ")
            parts += [
                f'??? example "Body: {name}"',
                "",
                "    ```json",
                f"    {body}",
                "    ```",
                "",
            ]
    return "\n".join(parts)


def answer_text(response: dict[str, Any]) -> str:
    """Return what one status brings."""
    kinds = []
    for media, content in response["content"].items():
        schema = content["schema"]
        kinds.append(f"{type_text(schema.get('x-event', schema))} as `{media}`")
    said = response["description"].replace("\n\n", "<br>")
    shown = " or ".join(kinds)
    return shown if said == "Done." else cell(f"{said}<br>{shown}")


def table(schema: Schema) -> list[str]:
    """Return the table of an object's fields, inner ones after a dot; without empty columns."""
    cells = [["field", "type", "default", "meaning"]]
    for name, one, is_required in rows(schema):
        default = "required" if is_required else ""
        if "default" in one:
            default = f"`{json.dumps(one['default'])}`"
        shown = "`<br>`.".join(name.split("."))
        cells.append([f"`{shown}`", type_text(one), default, cell(one.get("description", ""))])
    kept = [i for i in range(4) if i < 2 or any(line[i] for line in cells[1:])]
    lines = ["| " + " | ".join(line[i] for i in kept) + " |" for line in cells]
    return [lines[0], "|---" * len(kept) + "|", *lines[1:]]


def rows(schema: Schema, prefix: str = "") -> Iterator[tuple[str, Schema, bool]]:
    """Yield each field with its schema and whether it must be there."""
    for name, one in schema["properties"].items():
        yield prefix + name, one, name in schema.get("required", ())
        if one.get("properties"):
            yield from rows(one, f"{prefix}{name}.")


def refused(schema: Schema) -> list[str]:
    """Return the fields that are refused, folded away."""
    names = schema.get("x-refused")
    if not names:
        return []
    listed = ", ".join(f"`{name}`" for name in names)
    return [
        '??? note "Fields that are refused unless they have a neutral value"',
        "",
        f"    {listed}",
        "",
    ]


def type_text(schema: Schema) -> str:
    """Return a schema in words; null, which counts as not given, is left out."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})" if name != "Document" else "this document"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(one)}`" for one in schema["enum"] if one is not None)
    if "title" in schema:
        return str(schema["title"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "anyOf" in schema or "oneOf" in schema:
        several = [type_text(one) for one in schema.get("anyOf") or schema["oneOf"]]
        return " or ".join(one for one in dict.fromkeys(several) if one != "null")
    if "allOf" in schema:
        parts = [one.get("properties", {}) or type_text(one) for one in schema["allOf"]]
        own = [one if isinstance(one, str) else fields_text(one) for one in parts]
        return " and ".join(own)
    kind = schema.get("type", "any")
    kinds = [one for one in ([kind] if isinstance(kind, str) else kind) if one != "null"]
    text = " or ".join(kinds) or "null"
    if text == "array":
        most = f", at most {schema['maxItems']:,}" if "maxItems" in schema else ""
        return f"list of {type_text(schema.get('items', {}))}{most}"
    return text + range_text(schema)


def fields_text(properties: dict[str, Schema]) -> str:
    """Return a few fields in a line."""
    return ", ".join(f"`{name}`: {type_text(one)}" for name, one in properties.items())


def range_text(schema: Schema) -> str:
    """Return the range of a number in words; a bound of 31 bits or more says nothing."""
    low, above, high = (schema.get(k) for k in ("minimum", "exclusiveMinimum", "maximum"))
    parts = []
    if low is not None and abs(low) < 2**31:
        parts.append(f"at least {low:g}")
    if above is not None:
        parts.append(f"above {above:g}")
    if high is not None and abs(high) < 2**31 - 1:
        parts.append(f"at most {high:,.10g}")
    return "".join(f", {part}" for part in parts)


def cell(text: str) -> str:
    """Return a text that can stand in a table."""
    return text.replace("|", "\\|").replace("\n", " ")
