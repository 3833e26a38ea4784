"""JSON schemas of the replies, as OpenAPI components; tests check real replies against them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowprefill.server.openapi.fields import ANY_OBJECT, IDS, TEXT, Schema, ref

INT: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOL: Schema = {"type": "boolean"}
NONE: Schema = {"type": "null"}
MS: Schema = {"type": ["number", "null"], "description": "Milliseconds; null where there was none."}
TEXT_OR_NULL: Schema = {"type": ["string", "null"]}


def obj(required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> Schema:
    """Return the schema of an object; the second fields may be missing."""
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **(optional or {})},
    }


def list_of(schema: Schema) -> Schema:
    """Return the schema of a list."""
    return {"type": "array", "items": schema}


def or_null(schema: Schema) -> Schema:
    """Return the schema with null."""
    return {"anyOf": [schema, NONE]}


_REASONS: Schema = {"enum": ["stop", "length", "tool_calls", None]}
_OPTIONAL = {
    "service_tier": TEXT, "metrics": ref("Metrics"), "choice_metrics": list_of(ref("Metrics")),
}  # fmt: skip


_PROMPT_LOGPROBS = list_of(
    {
        "description": "By token id; null for the first token.",
        "type": ["object", "null"],
        "additionalProperties": obj({"logprob": NUMBER, "rank": INT, "decoded_token": TEXT}),
    }
)


def _envelope(kind: str, choice: str, usage: Schema | None) -> Schema:
    """Return the schema of a reply, or of an event of its stream if usage is None."""
    fields = {
        "id": TEXT, "object": {"const": kind}, "created": INT, "model": TEXT,
        "system_fingerprint": TEXT, "choices": list_of(ref(choice)),
    }  # fmt: skip
    if usage is not None:
        optional = {**_OPTIONAL, "prompt_logprobs": _PROMPT_LOGPROBS}
        return obj({**fields, "usage": usage}, optional)
    return obj(fields, {**_OPTIONAL, "usage": or_null(ref("Usage"))})


def _choice(own: Mapping[str, Any], logprobs: str) -> Schema:
    fields = {"index": INT, **own, "logprobs": or_null(ref(logprobs)), "finish_reason": _REASONS}
    return obj(fields, {"token_ids": IDS, "prompt_logprobs": _PROMPT_LOGPROBS})


_CALL = obj({"name": TEXT, "arguments": TEXT})
_TOKEN = {"token": TEXT, "logprob": {"type": ["number", "null"]}, "bytes": list_of(INT)}
_GENERATION: dict[str, Schema] = {
    "Completion": _envelope("text_completion", "CompletionChoice", ref("Usage")),
    "CompletionChunk": _envelope("text_completion", "CompletionChoice", None),
    "CompletionChoice": _choice({"text": TEXT}, "CompletionLogprobs"),
    "CompletionLogprobs": obj(
        {
            "tokens": list_of(TEXT),
            "token_logprobs": list_of({"type": ["number", "null"]}),
            "top_logprobs": list_of({"type": ["object", "null"], "additionalProperties": NUMBER}),
            "text_offset": list_of(INT),
        }
    ),
    "ChatCompletion": _envelope("chat.completion", "ChatChoice", ref("Usage")),
    "ChatChunk": _envelope("chat.completion.chunk", "ChatChunkChoice", None),
    "ChatChoice": _choice({"message": ref("ReplyMessage")}, "ChatLogprobs"),
    "ChatChunkChoice": _choice({"delta": ref("Delta")}, "ChatLogprobs"),
    "ReplyMessage": obj(
        {"role": {"const": "assistant"}, "content": TEXT_OR_NULL, "refusal": NONE},
        {"reasoning_content": TEXT, "tool_calls": list_of(ref("ReplyCall"))},
    ),
    "ReplyCall": obj({"id": TEXT, "type": {"const": "function"}, "function": _CALL}),
    "Delta": obj(
        {},
        {
            "role": {"const": "assistant"},
            "content": TEXT,
            "reasoning_content": TEXT,
            "tool_calls": list_of(ref("CallDelta")),
        },
    ),
    "CallDelta": obj(
        {"index": INT, "function": obj({"arguments": TEXT}, {"name": TEXT})},
        {"id": TEXT, "type": {"const": "function"}},
    ),
    "ChatLogprobs": obj(
        {
            "content": list_of(obj({**_TOKEN, "top_logprobs": list_of(obj(_TOKEN))})),
            "refusal": NONE,
        }
    ),
    "Embeddings": obj(
        {
            "object": {"const": "list"},
            "data": list_of(
                obj(
                    {
                        "object": {"const": "embedding"},
                        "index": INT,
                        "embedding": {"anyOf": [list_of(NUMBER), TEXT]},
                    }
                )
            ),
            "model": TEXT,
            "usage": obj(
                {
                    "prompt_tokens": INT,
                    "total_tokens": INT,
                    "prompt_tokens_details": obj({"cached_tokens": INT}),
                }
            ),
        },
        {"metrics": ref("Metrics"), "choice_metrics": list_of(ref("Metrics"))},
    ),
    "Usage": obj(
        {
            "prompt_tokens": INT,
            "completion_tokens": INT,
            "total_tokens": INT,
            "prompt_tokens_details": obj({"cached_tokens": INT}),
        },
        {"completion_tokens_details": obj({"reasoning_tokens": INT})},
    ),
    "Metrics": obj(
        {
            "queue_time_ms": MS,
            "preprocess_time_ms": MS,
            "waiting_time_ms": MS,
            "prefill_run_ms": MS,
            "suspended_ms": MS,
            "preemptions": INT,
            "time_to_first_token_ms": MS,
            "predicted_ttft_ms": MS,
            "generation_time_ms": MS,
            "mean_itl_ms": MS,
            "tokens_per_second": {"type": ["number", "null"]},
            "total_time_ms": MS,
            "slo_met": {"type": ["boolean", "null"]},
        }
    ),
}
_STATUS: Schema = {"enum": ["in_progress", "completed", "incomplete"]}
_RESPONSES: dict[str, Schema] = {
    "ResponseDeleted": obj(
        {"id": TEXT, "object": {"const": "response"}, "deleted": {"const": True}}
    ),
    "Response": obj(
        {
            "id": TEXT,
            "object": {"const": "response"},
            "created_at": INT,
            "status": _STATUS,
            "error": NONE,
            "incomplete_details": or_null(obj({"reason": {"const": "max_output_tokens"}})),
            "model": TEXT,
            "output": list_of(ref("OutputItem")),
            "store": BOOL,
            "usage": or_null(ref("ResponseUsage")),
            "instructions": TEXT_OR_NULL,
            "max_output_tokens": {"type": ["integer", "null"]},
            "parallel_tool_calls": BOOL,
            "previous_response_id": TEXT_OR_NULL,
            "temperature": NUMBER,
            "text": ANY_OBJECT,
            "tool_choice": {"anyOf": [TEXT, ANY_OBJECT]},
            "tools": list_of(ANY_OBJECT),
            "top_p": NUMBER,
            "metadata": ANY_OBJECT,
        },
        {"metrics": ref("Metrics")},
    ),
    "ResponseUsage": obj(
        {
            "input_tokens": INT,
            "input_tokens_details": obj({"cached_tokens": INT, "cache_write_tokens": INT}),
            "output_tokens": INT,
            "output_tokens_details": obj({"reasoning_tokens": INT}),
            "total_tokens": INT,
        }
    ),
    "OutputItem": {
        "oneOf": [ref("OutputMessage"), ref("OutputCall"), ref("OutputReasoning")],
    },
    "OutputMessage": obj(
        {
            "type": {"const": "message"},
            "id": TEXT,
            "status": _STATUS,
            "role": {"const": "assistant"},
            "content": list_of(ref("OutputText")),
        }
    ),
    "OutputText": obj(
        {
            "type": {"const": "output_text"},
            "text": TEXT,
            "annotations": list_of(ANY_OBJECT),
            "logprobs": list_of(ANY_OBJECT),
        }
    ),
    "OutputCall": obj(
        {
            "type": {"const": "function_call"},
            "id": TEXT,
            "status": _STATUS,
            "call_id": TEXT,
            "name": TEXT,
            "arguments": TEXT,
        }
    ),
    "OutputReasoning": obj(
        {
            "type": {"const": "reasoning"},
            "id": TEXT,
            "summary": list_of(ANY_OBJECT),
            "content": list_of(obj({"type": {"const": "reasoning_text"}, "text": TEXT})),
        }
    ),
    "ResponseEvent": obj(
        {"type": {"type": "string", "pattern": "^response\\."}, "sequence_number": INT},
        {
            "response": ref("Response"),
            "item": ref("OutputItem"),
            "part": ref("OutputText"),
            "item_id": TEXT,
            "output_index": INT,
            "content_index": INT,
            "delta": TEXT,
            "text": TEXT,
            "name": TEXT,
            "arguments": TEXT,
            "logprobs": list_of(ANY_OBJECT),
        },
    ),
}
_SETTINGS: Schema = {"description": "Every setting but secrets.", "type": "object"}
_OTHERS: dict[str, Schema] = {
    "Error": obj(
        {"error": obj({"message": TEXT, "type": TEXT, "param": TEXT_OR_NULL, "code": TEXT})}
    ),
    "Model": obj(
        {
            "id": TEXT,
            "object": {"const": "model"},
            "created": INT,
            "owned_by": TEXT,
            "root": TEXT,
            "max_model_len": INT,
        }
    ),
    "ModelList": obj({"object": {"const": "list"}, "data": list_of(ref("Model"))}),
    "Health": obj({"status": {"enum": ["ok", "failed"]}}, {"reason": TEXT}),
    "Ready": {
        **obj(
            {"status": {"enum": ["ready", "loading", "closing", "failed", "not ready"]}},
            {"model": TEXT, "reason": TEXT, "device": TEXT},
        ),
        "additionalProperties": {"description": "What the device says of itself."},
    },
    "Version": obj({"version": TEXT, "system_fingerprint": TEXT_OR_NULL}),
    "Load": obj({"server_load": INT}, {"running": INT, "waiting": INT, "suspended": INT}),
    "ServerInfo": {
        **obj(
            {
                "version": TEXT,
                "model": TEXT,
                "max_model_len": INT,
                "vocab_size": INT,
                "device": TEXT,
                "engine_settings": _SETTINGS,
                "server_settings": _SETTINGS,
            }
        ),
        "additionalProperties": {"description": "What the device says of itself."},
    },
    "Tokens": obj(
        {"count": INT, "max_model_len": INT, "tokens": IDS}, {"token_strs": list_of(TEXT)}
    ),
    "Text": obj({"prompt": TEXT}),
    "Trace": obj(
        {
            "displayTimeUnit": TEXT,
            "otherData": obj({"origin_s": INT}),
            "traceEvents": list_of(ANY_OBJECT),
        }
    ),
    "Decisions": obj({"decisions": list_of(ANY_OBJECT)}),
    "Requests": obj({"requests": list_of(ANY_OBJECT)}),
    "Story": {**obj({"id": TEXT, "events": list_of(ANY_OBJECT)}), "additionalProperties": True},
    "Live": obj(
        {
            "now_s": NUMBER,
            "window_s": NUMBER,
            "outcomes_s": NUMBER,
            "max_model_len": INT,
            "configured_classes": list_of(TEXT),
            "bars": list_of(ANY_OBJECT),
            "preemptions": list_of(ANY_OBJECT),
            "classes": list_of(ANY_OBJECT),
            "goodput": obj({"met": INT, "requests": INT, "per_s": NUMBER}),
            "engine": ANY_OBJECT,
        }
    ),
}
REPLIES: Mapping[str, Schema] = {**_GENERATION, **_RESPONSES, **_OTHERS}
