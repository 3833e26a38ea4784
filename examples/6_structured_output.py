"""Structured output: text that is certain to be what a JSON schema, or a list of choices, says.

You should see a JSON object with two fields, then one of three words.
"""

from __future__ import annotations

import json

from flowprefill import Engine, Request, SamplingParams, StructuredOutput

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 0, "maximum": 50_000_000},
    },
    "required": ["city", "population"],
    "additionalProperties": False,
}


def ask(engine: Engine, question: str, wanted: StructuredOutput) -> str:
    """Ask one question of the packaged model; the answer is of the wanted form."""
    prompt = engine.render_chat([{"role": "user", "content": question}])
    sampling = SamplingParams(temperature=0, max_tokens=100, structured=wanted)
    return engine.submit(Request(prompt, sampling, add_special_tokens=False)).result().text


def main() -> None:
    """Ask for an object, then for a word."""
    with Engine("smollm2-135m") as engine:
        answer = ask(engine, "Describe Paris as JSON.", StructuredOutput.from_schema(CITY))
        print(json.loads(answer))
        colours = StructuredOutput.from_choices(["red", "green", "blue"])
        print(ask(engine, "What is the colour of the sky?", colours))


if __name__ == "__main__":
    main()
