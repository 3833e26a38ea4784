"""Structured output as clients ask for it: ``response_format`` and the names of other servers.

Called by the schemas of both generating endpoints; the engine compiles and enforces it.
"""

from __future__ import annotations

import json
from typing import Any

from flowprefill.errors import InvalidRequest
from flowprefill.request import StructuredOutput
from flowprefill.server.http.body import Body, check_text

# Field -> kind; OpenAI's response_format comes first, and has a function of its own.
TOP_LEVEL = {
    "guided_json": "json", "guided_regex": "regex", "guided_choice": "choice",
    "guided_grammar": "grammar", "json_schema": "json", "regex": "regex", "grammar": "grammar",
    "ebnf": "grammar",
}  # fmt: skip
# vLLM's object; its further members choose between ways that we don't have.
NESTED = ("json", "regex", "choice", "grammar", "json_object")
NESTED_OFF: dict[str, tuple[Any, ...]] = {
    "disable_any_whitespace": (False,), "disable_fallback": (False,),
    "disable_additional_properties": (False, True), "whitespace_pattern": (False,),
    "structural_tag": (False,),
}  # fmt: skip


def read_structured(body: Body) -> StructuredOutput | None:
    """Read the one field that asks for structured output; None without any.

    Raises:
        InvalidRequest: names the field; or a second one.
    """
    found = [_response_format(body), *_top_level(body), *_structured_outputs(body)]
    wanted = [one for one in found if one is not None]
    if len(wanted) > 1:
        raise InvalidRequest(
            f"{wanted[1].param}: got it together with {wanted[0].param}, expected one of the two",
            param=wanted[1].param,
        )
    return wanted[0] if wanted else None


def _response_format(body: Body) -> StructuredOutput | None:
    form = body.object("response_format")
    if form is None:
        return None
    kind = form.text("type")
    form.accept(("schema", "json_schema"))
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        form.refuse("type", kind, "'text', 'json_object' or 'json_schema'")
    bare, inner = form.raw("schema"), form.object("json_schema")
    if inner is None and bare is not None:  # as llama.cpp and some services take it
        return _json("response_format.schema", bare)
    if inner is None and kind == "json_object":
        return StructuredOutput("json_object", param="response_format")
    if inner is None:
        form.refuse("json_schema", None, "an object with name and schema")
    inner.boolean("strict")  # it is enforced either way
    inner.text("name")
    inner.text("description")
    return _json("response_format.json_schema.schema", inner.raw("schema"))


def _top_level(body: Body) -> list[StructuredOutput | None]:
    return [_of_kind(kind, name, body.raw(name)) for name, kind in TOP_LEVEL.items()]


def _structured_outputs(body: Body) -> list[StructuredOutput | None]:
    form = body.object("structured_outputs")
    if form is None:
        return []
    form.only_neutral(NESTED_OFF, "this member is not supported")
    found = [_of_kind(kind, f"structured_outputs.{kind}", form.raw(kind)) for kind in NESTED]
    form.refuse_unknown((*NESTED, *NESTED_OFF))
    if not any(found):
        body.refuse(
            "structured_outputs", body.raw("structured_outputs"), "one of: " + ", ".join(NESTED)
        )
    return found


def _of_kind(kind: str, param: str, value: Any) -> StructuredOutput | None:
    if value is None:
        return None
    if kind == "json":
        return _json(param, value)
    if kind == "json_object":
        if not isinstance(value, bool):
            raise InvalidRequest.field(param, value, "true or false")
        return StructuredOutput("json_object", param=param) if value else None
    if kind == "choice":
        if not isinstance(value, list):
            raise InvalidRequest.field(param, value, "a list of non-empty strings")
        for index, choice in enumerate(value):
            check_text(f"{param}[{index}]", choice)
        return StructuredOutput.from_choices(value, param=param)
    text = check_text(param, value)
    return StructuredOutput("regex" if kind == "regex" else "grammar", text, param=param)


def _json(param: str, schema: Any) -> StructuredOutput:
    """Take a schema that is an object, or its text."""
    if isinstance(schema, str):
        return StructuredOutput("json_schema", check_text(param, schema), param=param)
    if not isinstance(schema, dict):
        raise InvalidRequest.field(param, schema, "a JSON schema")
    check_text(param, json.dumps(schema, ensure_ascii=False))
    return StructuredOutput.from_schema(schema, param=param)
