"""OpenAI request bodies to checked values: the fields both generating endpoints share.

Called by completions.py and chat.py, which add their own prompt fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowprefill.config import EngineConfig
from flowprefill.errors import InvalidRequest
from flowprefill.request import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_STRINGS,
    SLO,
    Request,
    SamplingParams,
)
from flowprefill.server.http.body import Body, check_text, whole_ids, whole_number
from flowprefill.server.openai.foreign_fields import FOREIGN, HARMLESS
from flowprefill.server.openai.structured_fields import read_structured
from flowprefill.server.slo import NO_RULES, ClientRules, slo_of

MAX_N = 128
MAX_INT = 2**31 - 1
MAX_STOP_TOKEN_IDS = 1024
MAX_METADATA = 64
METRICS_HEADER = "x-return-metrics"

# Fields that would change the output if they did anything. Ignoring them silently would be wrong,
# so anything but a neutral value is refused. None (null) is neutral everywhere. Those of other
# servers are in foreign_fields.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "moderation": (),
    "prediction": (),
    "prompt_embeds": (),
    "structural_tag": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}

# Fields of chats, which no text completion has.
CHAT_ONLY: Mapping[str, tuple[Any, ...]] = {
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}

# OpenAI and vLLM fields that say something about the caller or the transport, not about the text.
IGNORED = (
    "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "request_id",
    "safety_identifier", "spaces_between_special_tokens", "store", "user",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """What a stream carries besides text."""

    include_usage: bool = False
    continuous_usage: bool = False


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """One checked HTTP request to generate; its prompts are in the endpoint's own part.

    Attributes:
        model: as named in the body; None if it was not.
        n: choices per prompt.
        stream: None for one JSON reply.
        return_metrics: add the ``metrics`` object.
        return_token_ids: add ``token_ids`` to each choice.
        service_tier: the body's, if it chose the service class.
        priority: among equally urgent requests the smaller goes first.
        tenant: who asks; empty where the server knows no tenants.
        client: for fair shares of decode steps: the tenant, or the address.
        prompt_logprobs: alternatives of the field of that name; None: not asked for. What the
            engine is asked for is in `sampling`: an echo's logprobs want them too.
    """

    model: str | None
    sampling: SamplingParams
    slo: SLO
    n: int
    stream: StreamOptions | None
    return_metrics: bool
    return_token_ids: bool
    service_tier: str | None
    priority: int
    tenant: str = ""
    client: str = ""
    prompt_logprobs: int | None = None

    def requests(
        self, prompts: Sequence[str | list[int]], reply_id: str, *, special_tokens: bool
    ) -> list[Request]:
        """Return what to submit, prompt by prompt, named after the reply."""
        choices = [(prompt, choice) for prompt in prompts for choice in range(self.n)]
        return [
            Request(
                prompt,
                self.sampling_of(choice),
                id=reply_id if len(choices) == 1 else f"{reply_id}-{index}",
                add_special_tokens=special_tokens,
                priority=self.priority,
                tenant=self.tenant,
                client=self.client,
            )
            for index, (prompt, choice) in enumerate(choices)
        ]

    def sampling_of(self, choice: int) -> SamplingParams:
        """Return the sampling of one choice: with a seed, each choice gets its own stream.

        A prompt is scored for its first choice only, `Generation.scored`.
        """
        sampling = self.sampling
        if choice and sampling.prompt_logprobs is not None:
            sampling = dataclasses.replace(sampling, prompt_logprobs=None)
        if choice and sampling.seed is not None:
            sampling = dataclasses.replace(sampling, seed=_shifted_seed(sampling.seed, choice))
        return sampling


def _shifted_seed(seed: int, choice: int) -> int:
    shifted = seed + choice
    return shifted if shifted < 2**64 else shifted - 2**64


@dataclass(frozen=True, slots=True)
class SchemaContext:
    """What checking a body needs to know about the server.

    Attributes:
        sampling_defaults: hold where a body names none, instead of OpenAI's; ``max_new_tokens``
            among them is the most any request generates.
    """

    headers: Mapping[str, str]
    config: EngineConfig
    service_tiers: Mapping[str, str]
    vocab_size: int
    rules: ClientRules = NO_RULES
    chat_template: str = ""
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)


def read_prompt_logprobs(body: Body) -> int | None:
    """Read ``prompt_logprobs``, vLLM's field; not in streams, which have no place for them."""
    asked: int | None = body.integer("prompt_logprobs", None, 0, MAX_LOGPROBS)
    if asked is not None and body.boolean("stream"):
        body.refuse("prompt_logprobs", asked, "null with stream")
    return asked


def generation_spec(
    body: Body,
    context: SchemaContext,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    echo_logprobs: int | None = None,
) -> GenerationSpec:
    """Read every field that completions and chat share.

    Args:
        body: the request's body.
        context: headers, settings, vocabulary.
        max_tokens, logprobs: read by the endpoint, because their names and defaults differ.
        echo_logprobs: alternatives wanted for each token of a prompt that is repeated.

    Raises:
        InvalidRequest: names the field, what was given and what is allowed.
    """
    refuse_unsupported(body)
    rules = context.rules
    slo = slo_of(body, context.headers, context.config, context.service_tiers, rules)
    n = body.integer("n", 1, 1, MAX_N)
    best_of = body.integer("best_of", None, 1, MAX_INT)
    if best_of is not None and best_of != n:
        body.refuse("best_of", best_of, "null: choosing among more choices is not supported")
    tier = body.text("service_tier")
    prompt_logprobs = read_prompt_logprobs(body)
    asked = [count for count in (prompt_logprobs, echo_logprobs) if count is not None]
    sampling = sampling_params(body, context, max_tokens, logprobs)
    return GenerationSpec(
        model=body.text("model"),
        sampling=dataclasses.replace(sampling, prompt_logprobs=max(asked, default=None)),
        slo=slo,
        n=n,
        stream=_stream_options(body),
        return_metrics=wants_metrics(body, context.headers),
        return_token_ids=body.boolean("return_token_ids"),
        service_tier=tier if tier in context.service_tiers else None,
        priority=rules.check_priority(body.integer("priority", 0, -(2**31), MAX_INT)),
        tenant=rules.tenant.name,
        client=rules.client,
        prompt_logprobs=prompt_logprobs,
    )


def refuse_unsupported(body: Body, own: Collection[str] = ()) -> None:
    """Refuse fields this server does not implement, and mark the harmless ones as known.

    Args:
        own: fields that the endpoint has all the same.
    """
    for fields in (REFUSED, FOREIGN):
        body.only_neutral({name: fields[name] for name in fields if name not in own})
    modalities = body.raw("modalities")
    if modalities is not None and modalities != ["text"]:
        body.refuse("modalities", modalities, "['text']: other kinds are not supported")
    metadata = body.raw("metadata", {})
    if not isinstance(metadata, dict) or len(metadata) > MAX_METADATA:
        body.refuse("metadata", metadata, f"an object of at most {MAX_METADATA} entries")
    for name in IGNORED:
        body.raw(name)
    body.accept(HARMLESS)


def sampling_params(
    body: Body, context: SchemaContext, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """Read the sampling fields; -1 and 0 both switch ``top_k`` off.

    SamplingParams checks those that have its names and ranges.
    """
    defaults = context.sampling_defaults
    top_k = body.integer("top_k", int(defaults.get("top_k", 0)), -1, MAX_INT)
    most = defaults.get("max_new_tokens")
    if most is not None:
        max_tokens = int(most) if max_tokens is None else min(max_tokens, int(most))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=whole_number(body.raw("min_tokens", 0)),
        temperature=body.raw("temperature", defaults.get("temperature", 1.0)),
        top_p=body.raw("top_p", defaults.get("top_p", 1.0)),
        top_k=max(top_k, 0),
        min_p=body.raw("min_p", defaults.get("min_p", 0.0)),
        seed=whole_number(body.raw("seed")),
        stop=_stop_strings(body, defaults.get("stop_strings", ())),
        stop_token_ids=_stop_token_ids(body, context.vocab_size),
        ignore_eos=body.boolean("ignore_eos"),
        logprobs=logprobs,
        presence_penalty=body.raw("presence_penalty", 0.0),
        frequency_penalty=body.raw("frequency_penalty", 0.0),
        repetition_penalty=body.raw("repetition_penalty", defaults.get("repetition_penalty", 1.0)),
        include_stop_str_in_output=body.boolean("include_stop_str_in_output"),
        logit_bias=_logit_bias(body, context.vocab_size),
        skip_special_tokens=body.boolean("skip_special_tokens", True),
        structured=read_structured(body),
    )


def _logit_bias(body: Body, vocab_size: int) -> dict[int, float]:
    """Read token ids, which JSON's objects have as text, with a number each."""
    given = body.raw("logit_bias", {})
    if not isinstance(given, dict) or len(given) > MAX_LOGIT_BIAS:
        body.refuse("logit_bias", given, f"an object of at most {MAX_LOGIT_BIAS} token ids")
    bias = {}
    for key, value in given.items():
        token = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
        if not 0 <= token < vocab_size:
            body.refuse("logit_bias", key, f"token ids in [0, {vocab_size - 1}] as keys")
        bias[token] = value
    return bias


def _stop_strings(body: Body, default: tuple[str, ...]) -> tuple[str, ...]:
    value = body.raw("stop", list(default))
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MAX_STOP_STRINGS:
        body.refuse("stop", value, f"a string or a list of at most {MAX_STOP_STRINGS} strings")
    for index, text in enumerate(texts):
        name = "stop" if isinstance(value, str) else f"stop[{index}]"
        if not check_text(name, text, "a non-empty string"):
            body.refuse(name, text, "a non-empty string")
    return tuple(texts)


def _stop_token_ids(body: Body, vocab_size: int) -> tuple[int, ...]:
    ids = whole_ids(body.listed("stop_token_ids", MAX_STOP_TOKEN_IDS, "token ids"))
    check_token_ids("stop_token_ids", ids, vocab_size)
    return tuple(ids)


def check_token_ids(param: str, ids: Sequence[Any], vocab_size: int) -> None:
    """Check that every element is a token of the vocabulary; the error names the first that is not.

    Cost: three passes in C for a good list; prompts may hold a million ids.
    """
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size):
        return
    for index, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocab_size:
            allowed = f"a token id in [0, {vocab_size - 1}]"
            raise InvalidRequest.field(f"{param}[{index}]", token, allowed)


def _stream_options(body: Body) -> StreamOptions | None:
    stream = body.boolean("stream")
    options = body.object("stream_options")
    if options is None:
        return StreamOptions() if stream else None
    if not stream:
        body.refuse("stream_options", body.raw("stream_options"), "null unless stream is true")
    parsed = StreamOptions(
        include_usage=options.boolean("include_usage"),
        continuous_usage=options.boolean("continuous_usage_stats"),
    )
    options.boolean("include_obfuscation")
    return parsed


def wants_metrics(body: Body, headers: Mapping[str, str]) -> bool:
    """Read whether the timings are wanted, by field or header."""
    wanted = body.boolean("return_metrics")
    header = headers.get(METRICS_HEADER)
    if header is None:
        return wanted
    if header.lower() not in ("1", "0", "true", "false"):
        raise InvalidRequest.field(METRICS_HEADER, header, "1, 0, true or false")
    return wanted or header.lower() in ("1", "true")
