"""What each request field means, and the shape of those that are more than a number or a text.

Type, range and default of the others come from their readers: recorder.py. A name with a dot is a
field of an object. docs/api.md tells the same at length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowprefill.models.chat_template import REASONING
from flowprefill.request import MAX_BIAS, MAX_LOGIT_BIAS, MAX_STOP_STRINGS, POOLINGS
from flowprefill.server.openai.chat import MAX_MESSAGES, ROLES
from flowprefill.server.openai.embeddings import ENCODINGS
from flowprefill.server.openai.openai_schema import MAX_METADATA
from flowprefill.server.openai.tools import MAX_CALLS, MAX_TOOLS, MODES, TOOL_NAME
from flowprefill.server.responses.response_input import MAX_ITEMS, PART_TYPES

Schema = dict[str, Any]

TOKEN_ID: Schema = {"title": "token id", "type": "integer", "minimum": 0}
IDS: Schema = {"type": "array", "items": TOKEN_ID}
TEXT: Schema = {"type": "string"}
SOME_TEXT: Schema = {"type": "string", "minLength": 1}
ANY_OBJECT: Schema = {"type": "object"}
JSON_SCHEMA: Schema = {"anyOf": [ANY_OBJECT, SOME_TEXT]}
CHOICES: Schema = {"type": "array", "items": SOME_TEXT, "minItems": 1}


def ref(name: str) -> Schema:
    """Return a reference to a component."""
    return {"$ref": f"#/components/schemas/{name}"}


def nullable(schema: Schema) -> Schema:
    """Return the schema with null, which counts as not given."""
    if schema.get("type") == "null":
        return schema
    if isinstance(schema.get("type"), str):
        widened = {**schema, "type": [schema["type"], "null"]}
        return {**widened, "enum": [*schema["enum"], None]} if "enum" in schema else widened
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    return {"anyOf": [schema, {"type": "null"}]} if "$ref" in schema else schema


# Shapes that several fields use.
COMPONENTS: Mapping[str, Schema] = {
    "Message": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"enum": list(ROLES)},
            "content": {
                "description": "Null only where the role is assistant.",
                "anyOf": [TEXT, {"type": "array", "items": ref("TextPart")}, {"type": "null"}],
            },
            "name": nullable(TEXT),
            "tool_calls": {
                "description": "Of the assistant: calls it has made.",
                "type": ["array", "null"],
                "items": ref("ToolCall"),
                "maxItems": MAX_CALLS,
            },
            "tool_call_id": nullable(TEXT),
            **{name: nullable(TEXT) for name in REASONING},
        },
    },
    "TextPart": {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": TEXT},
    },
    "ToolCall": {
        "type": "object",
        "required": ["function"],
        "properties": {
            "id": nullable(TEXT),
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "required": ["name", "arguments"],
                "properties": {
                    "name": SOME_TEXT,
                    "arguments": {
                        "description": "A JSON object, as text or as it is.",
                        "anyOf": [TEXT, ANY_OBJECT],
                    },
                },
            },
        },
    },
    "Tool": {
        "type": "object",
        "required": ["type", "function"],
        "properties": {"type": {"const": "function"}, "function": ref("Function")},
    },
    "Function": {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": {"type": "string", "pattern": f"^{TOOL_NAME}$"},
            "description": nullable(TEXT),
            "parameters": {
                "description": "JSON schema of the arguments.",
                "type": ["object", "null"],
            },
        },
    },
    "FlatTool": {
        "allOf": [
            ref("Function"),
            {
                "type": "object",
                "required": ["type"],
                "properties": {"type": {"const": "function"}},
            },
        ],
    },
    "InputItem": {
        "description": "A message, a call, its result, or reasoning (of the message after it).",
        "type": "object",
        "properties": {
            "type": {
                "enum": ["message", "function_call", "function_call_output", "reasoning"],
                "default": "message",
            },
            "role": {"enum": list(ROLES)},
            "content": {"anyOf": [TEXT, {"type": "array", "items": ref("InputPart")}]},
            "call_id": nullable(TEXT),
            "name": TEXT,
            "arguments": TEXT,
            "output": {"anyOf": [TEXT, {"type": "array", "items": ref("InputPart")}]},
        },
    },
    "InputPart": {
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"enum": list(PART_TYPES)}, "text": TEXT, "refusal": TEXT},
    },
}

_MESSAGES: Schema = {
    "type": "array", "items": ref("Message"), "minItems": 1, "maxItems": MAX_MESSAGES,
}  # fmt: skip
_NAMED_TOOL: Schema = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"const": "function"},
        "function": {"type": "object", "required": ["name"], "properties": {"name": TEXT}},
    },
}
_NAMED_FLAT_TOOL: Schema = {
    "type": "object",
    "required": ["type", "name"],
    "properties": {"type": {"const": "function"}, "name": TEXT},
}
_CHOICE: Schema = {"enum": ["none", "auto", "required"]}


def _allowed(tool: Schema, **kind: Schema) -> Schema:
    properties: Schema = {
        **kind,
        "mode": {"enum": list(MODES)},
        "tools": {"type": "array", "items": tool, "minItems": 1, "maxItems": MAX_TOOLS},
    }
    return {"type": "object", "required": [*properties], "properties": properties}


_SUBSET: Schema = {"const": "allowed_tools"}
_ALLOWED_TOOLS: Schema = {
    "type": "object",
    "required": ["type", "allowed_tools"],
    "properties": {"type": _SUBSET, "allowed_tools": _allowed(_NAMED_TOOL)},
}
_ALLOWED_FLAT_TOOLS = _allowed({"anyOf": [_NAMED_FLAT_TOOL, _NAMED_TOOL]}, type=_SUBSET)

# Field -> what it means.
MEANINGS: Mapping[str, str] = {
    "model": "The name of the served model; another one is a 404.",
    "prompt": "Text, texts, token ids (used as they are), or several lists of them.",
    "messages": "The chat. `developer` is the same as `system`; other keys of a message are for "
    "the chat template.",
    "max_tokens": "Most tokens to generate. Without it chats go on up to the model's length. "
    "0 in completions with `echo` or `prompt_logprobs` only.",
    "max_completion_tokens": "The newer name of `max_tokens`; both may be given if they agree.",
    "min_tokens": "No stop condition counts before so many tokens.",
    "temperature": "0 is greedy. Where it is not given, the model's own default holds, else this.",
    "top_p": "Nucleus; 0 is greedy, 1 is off. The model's default holds first.",
    "min_p": "Least share of the most probable token's probability. The model's default holds "
    "first.",
    "top_k": "Only the k most probable tokens; -1 and 0 are off. The model's default holds first.",
    "seed": "The same seed draws the same tokens; choice i of a prompt uses seed + i.",
    "stop": "Texts that end generation.",
    "stop_token_ids": "Tokens that end generation.",
    "ignore_eos": "Go on after the end-of-text token.",
    "include_stop_str_in_output": "Leave the stop string in the text.",
    "presence_penalty": "Taken from the logit of each token that was generated.",
    "frequency_penalty": "Taken from a token's logit for each time that it was generated.",
    "repetition_penalty": "Divides the logits of tokens seen; 1 is off. The model's default holds "
    "first.",
    "n": "Choices for each prompt; prompts times n is at most the setting `max_choices`.",
    "best_of": "Only the value of `n`.",
    "logprobs": "Completions: how many alternatives to report for each token. Chats: whether to "
    "report log probabilities.",
    "top_logprobs": "Alternatives for each token; only with `logprobs`.",
    "echo": "Repeat the prompt; with `logprobs` those of its tokens too. `max_tokens` may be 0.",
    "prompt_logprobs": "As vLLM: log probabilities of the prompt's tokens, and so many "
    "alternatives in their places; not in streams.",
    "pooling": "The last hidden state of the last token, or the mean of all tokens'.",
    "encoding_format": "Numbers, or the bytes of float32 in base64.",
    "dimensions": "Only null: embeddings are as wide as the model.",
    "logit_bias": "Token id (as text) to what is added to its logit, after the penalties.",
    "skip_special_tokens": "Leave control tokens out of the text.",
    "tools": "Functions that the model may call.",
    "tool_choice": "`auto` is the default with tools, `none` without. `required` and a named "
    "function are enforced by a grammar. `allowed_tools` limits `auto` or `required` to some of "
    "the tools; the prompt lists all.",
    "parallel_tool_calls": "False keeps the first call only.",
    "include_reasoning": "False leaves reasoning out of the reply.",
    "continue_final_message": "The reply goes on with the last message; also where that, of the "
    "assistant, has `prefix` or `partial` true.",
    "add_generation_prompt": "Handed to the chat template; not with `continue_final_message`.",
    "stream": "Answer with server-sent events.",
    "stream_options": "Only with `stream`.",
    "stream_options.include_usage": "A last event with the token counts.",
    "stream_options.continuous_usage_stats": "Token counts in every event.",
    "stream_options.include_obfuscation": "Accepted without effect.",
    "add_special_tokens": "Let the tokenizer add its special tokens. Default true for text, false "
    "for chats, whose template writes them.",
    "chat_template": "Only null: the model's own is used.",
    "chat_template_kwargs": "Further variables of the chat template.",
    "documents": "For the chat template: objects with title and text.",
    "reasoning_effort": "For the chat template, whose `enable_thinking` and `thinking` are false "
    "with `none`, else true.",
    "enable_thinking": "For the chat template; the same in `chat_template_kwargs` goes before it.",
    "slo": "The objectives of this request. They go before headers, class and default, value by "
    "value; other keys are refused.",
    "slo.ttft_ms": "Time to first token, milliseconds.",
    "slo.tpot_ms": "Time for each later token, milliseconds.",
    "slo.class": "A configured service class, which gives the starting values.",
    "slo.on_miss": "Once the first token cannot come in time: serve the request behind those that "
    "still can, or end it with 504.",
    "service_tier": "OpenAI's; chooses a service class if the setting `service_tiers` maps it.",
    "priority": "Among equally urgent requests the smaller goes first.",
    "return_metrics": "Add `metrics` to the reply; the header `x-return-metrics: 1` does the same.",
    "return_token_ids": "Add `token_ids` to each choice.",
    "metadata": "Accepted; the Responses endpoint repeats it.",
    "modalities": "Only text.",
    "response_format": "What the text has to be.",
    "response_format.type": "Which of the three.",
    "response_format.schema": "The schema where `json_schema` is missing, as llama.cpp takes it.",
    "response_format.json_schema": "With the type `json_schema`; enforced whatever `strict` says.",
    "response_format.json_schema.schema": "The schema, draft 2020-12 as far as llguidance has it.",
    "response_format.json_schema.name": "Accepted without effect.",
    "response_format.json_schema.description": "Accepted without effect.",
    "response_format.json_schema.strict": "Accepted without effect.",
    "structured_outputs": "What the text has to be, as vLLM asks for it: one of its members.",
    "structured_outputs.json": "A JSON schema.",
    "structured_outputs.regex": "A regular expression in Rust's syntax, for the whole text.",
    "structured_outputs.choice": "One of these texts.",
    "structured_outputs.grammar": "A grammar: Lark as llguidance has it, or GBNF.",
    "structured_outputs.json_object": "Any JSON object.",
    "guided_json": "The older name of `structured_outputs.json`.",
    "guided_regex": "The older name of `structured_outputs.regex`.",
    "guided_choice": "The older name of `structured_outputs.choice`.",
    "guided_grammar": "The older name of `structured_outputs.grammar`.",
    "json_schema": "The same as `structured_outputs.json`.",
    "regex": "The same as `structured_outputs.regex`.",
    "grammar": "The same as `structured_outputs.grammar`.",
    "ebnf": "The same as `structured_outputs.grammar`.",
    "input": "A text, or a list of messages, calls, their results and reasoning. Of embeddings: "
    "what `prompt` is.",
    "instructions": "System text of this request alone.",
    "max_output_tokens": "Most tokens to generate.",
    "previous_response_id": "Continue a reply that was made here and is still kept.",
    "store": "Keep the reply for `previous_response_id`.",
    "text": "What the text has to be.",
    "text.format": "As `response_format`, the members of `json_schema` next to `type`.",
    "text.verbosity": "Only `medium`.",
    "reasoning": "How hard to think.",
    "reasoning.effort": "As chats' `reasoning_effort`.",
    "tokens": "The token ids to decode.",
    "return_token_strs": "Add the text of each token.",
}
WITHOUT_EFFECT = "Accepted without effect."

# Field -> what its reader's calls do not tell of its shape.
SHAPES: Mapping[str, Schema] = {
    "prompt": {
        "anyOf": [
            TEXT,
            {"type": "array", "items": SOME_TEXT, "minItems": 1},
            {**IDS, "minItems": 1},
            {"type": "array", "items": {**IDS, "minItems": 1}, "minItems": 1},
        ]
    },
    "messages": _MESSAGES,
    "stop": {
        "anyOf": [SOME_TEXT, {"type": "array", "items": SOME_TEXT, "maxItems": MAX_STOP_STRINGS}]
    },
    "stop_token_ids": {"items": TOKEN_ID},
    "logit_bias": {
        "type": "object",
        "maxProperties": MAX_LOGIT_BIAS,
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
    },
    "tools": {"items": ref("Tool")},
    "tool_choice": {"anyOf": [_CHOICE, _NAMED_TOOL, _ALLOWED_TOOLS]},
    "chat_template": {"type": "null"},
    "chat_template_kwargs": ANY_OBJECT,
    "documents": {"items": ANY_OBJECT},
    "metadata": {"type": "object", "maxProperties": MAX_METADATA},
    "modalities": {"type": "array", "items": {"const": "text"}, "minItems": 1, "maxItems": 1},
    "pooling": {"enum": list(POOLINGS)},
    "encoding_format": {"enum": list(ENCODINGS)},
    "dimensions": {"type": "null"},
    "slo.on_miss": {"enum": ["demote", "drop"]},
    "response_format.type": {"enum": ["text", "json_object", "json_schema"]},
    "response_format.schema": JSON_SCHEMA,
    "response_format.json_schema.schema": JSON_SCHEMA,
    "structured_outputs.json": JSON_SCHEMA,
    "structured_outputs.regex": SOME_TEXT,
    "structured_outputs.choice": CHOICES,
    "structured_outputs.grammar": SOME_TEXT,
    "structured_outputs.json_object": {"type": "boolean"},
    "guided_json": JSON_SCHEMA,
    "guided_regex": SOME_TEXT,
    "guided_choice": CHOICES,
    "guided_grammar": SOME_TEXT,
    "json_schema": JSON_SCHEMA,
    "regex": SOME_TEXT,
    "grammar": SOME_TEXT,
    "ebnf": SOME_TEXT,
    "input": {
        "anyOf": [
            TEXT,
            {"type": "array", "items": ref("InputItem"), "minItems": 1, "maxItems": MAX_ITEMS},
        ]
    },
    "text.verbosity": {"enum": ["medium", None]},
    "reasoning.effort": TEXT,
    "text.format": {
        "type": "object",
        "required": ["type"],
        "properties": {
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "schema": JSON_SCHEMA,
            "name": nullable(TEXT),
            "description": nullable(TEXT),
            "strict": {"type": ["boolean", "null"]},
        },
    },
    "tokens": IDS,
}
EMBEDDINGS_SHAPES: Mapping[str, Schema] = {"input": SHAPES["prompt"]}
# The same, where /v1/responses writes a field otherwise than chats do.
RESPONSES_SHAPES: Mapping[str, Schema] = {
    "tools": {"items": ref("FlatTool")},
    "tool_choice": {
        "anyOf": [_CHOICE, _NAMED_FLAT_TOOL, _NAMED_TOOL, _ALLOWED_FLAT_TOOLS, _ALLOWED_TOOLS]
    },
}
