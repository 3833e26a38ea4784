"""What a user submits and gets back: Request, its sampling, its SLO, tokens, completions, timings.

Plain data, validated on construction; every layer may import this module, it imports only errors.
Long because all that crosses the border to users is here, each field with its check.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from flowprefill.errors import InvalidRequest

FinishReason = Literal["stop", "length", "cancelled", "expired", "failed", "rejected"]
OnMiss = Literal["demote", "drop"]
Pooling = Literal["last", "mean"]
# What a prefill gives: the last token's logits; those and scores of every token; an embedding.
RunOutput = Literal["logits", "scores", "last", "mean"]
StructuredKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STRUCTURED_CHARS = 128 * 1024
POOLINGS = ("last", "mean")
STRUCTURED_KINDS = ("json_schema", "json_object", "regex", "choice", "grammar")


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, int) or math.isfinite(value)  # an int may be too large for a float


def _check_number(
    name: str, value: Any, low: float, high: float, *, allowed: str, open_low: bool = False
) -> None:
    if not _is_number(value) or value < low or value > high or (open_low and value == low):
        raise InvalidRequest.field(name, value, allowed)


def _check_int(name: str, value: Any, low: int, high: int, *, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest.field(name, value, allowed)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise InvalidRequest.field(name, value, "text")


class Range(NamedTuple):
    """What one number of SamplingParams may be; ``allowed`` says so in errors."""

    low: float
    high: float
    allowed: str
    is_whole: bool = False
    open_low: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise InvalidRequest unless the value is in the range."""
        if self.is_whole:
            _check_int(name, value, int(self.low), int(self.high), allowed=self.allowed)
        else:
            allowed, open_low = self.allowed, self.open_low
            _check_number(name, value, self.low, self.high, allowed=allowed, open_low=open_low)


_INT_MAX = 2**31 - 1
# The one place of these ranges: the HTTP API's description is made from them too.
SAMPLING_RANGES: Mapping[str, Range] = {
    "max_tokens": Range(0, _INT_MAX, "an integer >= 0", is_whole=True),
    "min_tokens": Range(0, _INT_MAX, "an integer >= 0", is_whole=True),
    "temperature": Range(0.0, 2.0, "a number in [0, 2]"),
    "top_p": Range(0.0, 1.0, "a number in [0, 1]"),
    "top_k": Range(0, _INT_MAX, "an integer >= 0 (0 is off)", is_whole=True),
    "min_p": Range(0.0, 1.0, "a number in [0, 1]"),
    "seed": Range(-(2**63), 2**64 - 1, "a 64-bit integer", is_whole=True),
    "logprobs": Range(0, MAX_LOGPROBS, f"an integer in 0..{MAX_LOGPROBS}", is_whole=True),
    "prompt_logprobs": Range(0, MAX_LOGPROBS, f"an integer in 0..{MAX_LOGPROBS}", is_whole=True),
    "presence_penalty": Range(-2.0, 2.0, "a number in [-2, 2]"),
    "frequency_penalty": Range(-2.0, 2.0, "a number in [-2, 2]"),
    "repetition_penalty": Range(0.0, 10.0, "a number in (0, 10]", open_low=True),
}
MAX_BIAS = 100.0
_MAY_BE_NONE = ("max_tokens", "seed", "logprobs", "prompt_logprobs")


@dataclass(frozen=True, slots=True)
class SLO:
    """Latency objectives of one request.

    Attributes:
        ttft: time to first token, seconds, > 0; None means no objective (best effort).
        tpot: time per output token after the first, seconds, > 0; None means best effort.
        service_class: name under which metrics count this request, and whose weight, share and
            admission it has if the class is configured. Its objectives are those given here: for
            those of the class give `Engine.submit` its name instead of an SLO.
        on_miss: what happens once the TTFT objective cannot be met any more: ``demote`` serves the
            request behind all that can still meet theirs, ``drop`` ends it with ``DeadlinePassed``.
    """

    ttft: float | None = None
    tpot: float | None = None
    service_class: str = "default"
    on_miss: OnMiss = "demote"

    def __post_init__(self) -> None:
        for name, value in (("slo.ttft", self.ttft), ("slo.tpot", self.tpot)):
            if value is not None:
                _check_number(
                    name, value, 0.0, 86_400.0, allowed="seconds in (0, 86400]", open_low=True
                )
        _check_text("slo.service_class", self.service_class)
        if self.on_miss not in ("demote", "drop"):
            raise InvalidRequest.field("slo.on_miss", self.on_miss, "'demote' or 'drop'")

    def deadline_s(self, arrival_s: float) -> float:
        """Return when the first token is due, on the arrival's clock; inf without an objective."""
        return math.inf if self.ttft is None else arrival_s + self.ttft


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What the generated text has to be; tokens that would break it are never chosen.

    Attributes:
        kind: ``json_schema``, ``json_object``, ``regex``, ``choice`` or ``grammar``.
        text: the JSON schema; the regular expression (Rust's syntax, for the whole text); the
            choices as a JSON list of strings; the grammar (Lark as llguidance has it, or GBNF).
            Empty for ``json_object``.
        after: the text is free until this was generated, e.g. ``</think>``; empty: from the start.
        param: the field that errors name.
        lines: of a grammar made of several fields, which field each line is from, or empty; errors
            then name it, and show no lines.
    """

    kind: StructuredKind
    text: str = ""
    after: str = ""
    param: str = field(default="structured", compare=False)
    lines: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.kind not in STRUCTURED_KINDS:
            raise InvalidRequest.field(self.param, self.kind, "one of " + str(STRUCTURED_KINDS))
        if not isinstance(self.text, str) or len(self.text) > MAX_STRUCTURED_CHARS:
            allowed = f"text of at most {MAX_STRUCTURED_CHARS} characters"
            raise InvalidRequest.field(self.param, self.text, allowed)
        if self.kind != "json_object" and not self.text:
            raise InvalidRequest.field(self.param, self.text, f"a {self.kind}, not empty")

    @classmethod
    def from_schema(
        cls, schema: Mapping[str, Any], *, after: str = "", param: str = "structured"
    ) -> StructuredOutput:
        """Ask for JSON that a schema describes, its properties in the schema's order."""
        try:
            text = json.dumps(schema, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidRequest(f"{param}: not a JSON schema: {error}", param=param) from None
        return cls("json_schema", text, after, param)

    @classmethod
    def from_choices(
        cls, choices: Sequence[str], *, after: str = "", param: str = "structured"
    ) -> StructuredOutput:
        """Ask for one of several texts."""
        is_list = isinstance(choices, (list, tuple)) and len(choices) > 0
        if not is_list or not all(isinstance(choice, str) and choice for choice in choices):
            raise InvalidRequest.field(param, choices, "a list of non-empty strings")
        return cls("choice", json.dumps(list(choices)), after, param)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when generation ends; names and ranges as in OpenAI's API and vLLM.

    Attributes:
        max_tokens: most tokens to generate; 0: the prompt is computed and nothing generated; None
            means up to the model's length.
        min_tokens: no stop condition counts before this many tokens.
        temperature: 0 is greedy.
        top_p: 0 is greedy, 1 is off.
        top_k: 0 is off.
        logprobs: how many alternatives to report per token (0: only the chosen one); None is off.
        prompt_logprobs: report the log-probability of each prompt token but the first, given those
            before it, and so many alternatives; None is off.
        logit_bias: token id -> what is added to its logit, -100 to 100.
        skip_special_tokens: leave control tokens out of the text.
        structured: what the text has to be; None: anything. Its end ends generation.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        for name, range_ in SAMPLING_RANGES.items():
            value = getattr(self, name)
            if value is not None or name not in _MAY_BE_NONE:
                range_.check(name, value)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest.field(
                "min_tokens", self.min_tokens, f"at most max_tokens = {self.max_tokens}"
            )
        self._check_stops()
        self._check_bias()
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            raise InvalidRequest.field("structured", self.structured, "a StructuredOutput")

    def _check_bias(self) -> None:
        bias = self.logit_bias
        if not isinstance(bias, Mapping) or len(bias) > MAX_LOGIT_BIAS:
            allowed = f"at most {MAX_LOGIT_BIAS} token ids with a number each"
            raise InvalidRequest.field("logit_bias", bias, allowed)
        for token, value in bias.items():
            _check_int("logit_bias", token, 0, 2**31 - 1, allowed="token ids >= 0")
            _check_number(
                "logit_bias", value, -MAX_BIAS, MAX_BIAS, allowed="numbers in [-100, 100]"
            )

    def _check_stops(self) -> None:
        if not isinstance(self.stop, (tuple, list)):  # a string would count letter by letter
            raise InvalidRequest.field("stop", self.stop, "a tuple of strings")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest.field("stop", self.stop, f"at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequest.field("stop", text, "non-empty strings")
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0, 2**31 - 1, allowed="token ids >= 0")


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to prefill and continue.

    Attributes:
        prompt: text, or token ids (used as they are, no special tokens added).
        sampling: see SamplingParams.
        id: unique among live requests; made up when not given.
        add_special_tokens: whether the tokenizer adds its own (BOS); chat templates write them.
        priority: among equally urgent requests the smaller goes first (as in vLLM).
        tenant: whom it belongs to, for fair shares of the queue; empty: no tenant.
        pooling: nothing is generated, the answer is an embedding of the prompt: of its ``last``
            token, or the ``mean`` of all. None: the prompt is continued.
        client: with whom decode steps are shared fairly where not all fit; empty: the tenant.
    """

    prompt: str | Sequence[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    id: str = field(default_factory=lambda: f"req-{uuid.uuid4().hex[:16]}")
    add_special_tokens: bool = True
    priority: int = 0
    tenant: str = ""
    pooling: Pooling | None = None
    client: str = ""

    def __post_init__(self) -> None:
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise InvalidRequest.field("pooling", self.pooling, "'last' or 'mean'")
        for name in ("id", "tenant", "client"):
            _check_text(name, getattr(self, name))
        if not isinstance(self.sampling, SamplingParams):
            raise InvalidRequest.field("sampling", self.sampling, "SamplingParams")
        _check_int("priority", self.priority, -(2**31), 2**31 - 1, allowed="a 32-bit integer")
        is_bytes = isinstance(self.prompt, (bytes, bytearray))
        if is_bytes or not isinstance(self.prompt, (str, Sequence)):
            raise InvalidRequest.field("prompt", self.prompt, "text or a list of token ids")
        if len(self.prompt) == 0:
            raise InvalidRequest.field("prompt", self.prompt, "at least one token")

    @property
    def generates(self) -> bool:
        """Whether any token is to be generated."""
        return self.pooling is None and self.sampling.max_tokens != 0

    @property
    def output(self) -> RunOutput:
        """What its prefill has to give."""
        if self.pooling is not None:
            return self.pooling
        return "logits" if self.sampling.prompt_logprobs is None else "scores"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one token under the model's (unpenalised) distribution."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """One prompt token given those before it, under the model's distribution.

    Attributes:
        logprob: natural logarithm of its probability.
        rank: 1 if no token is more likely.
        top_logprobs: the most likely tokens in its place, best first, as many as asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, as a handle yields it.

    Attributes:
        token_id: its id.
        text: text that became final with this token; may be empty (incomplete UTF-8, or held back
            because it may be the start of a stop string).
        logprob: set when logprobs were asked for.
        top_logprobs: the most likely alternatives, best first.
        finish_reason: set on the last token only.
    """

    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one request went; seconds on the server's monotonic clock.

    ``queue + prefill_run + suspended`` is ``ttft`` up to the sampling of the first token.

    Attributes:
        queue: submit to the first segment starting; `preprocess` and `waiting` are its parts.
        prefill_run: time its prefill's segments were executing.
        suspended: time its prefill was suspended.
        preemptions: how many times it was suspended.
        ttft: submit to first token; None if there was none.
        predicted_ttft: what was predicted at admission.
        total: submit to the terminal event.
        mean_itl: mean time between tokens after the first; time for which it was held left out.
        slo_met: whether TTFT (and mean time per output token, if asked for) were within the SLO;
            None without an objective.
        cached_tokens: prompt tokens found in the prefix cache.
        preprocess: submit to the scheduler knowing of it: tokenising, compiling a grammar.
        suspensions: when its prefill was told to suspend and when to go on, since submit; the
            first ones.
    """

    queue: float
    prefill_run: float
    suspended: float
    preemptions: int
    ttft: float | None
    predicted_ttft: float | None
    total: float
    mean_itl: float | None
    slo_met: bool | None
    cached_tokens: int
    preprocess: float = 0.0
    suspensions: tuple[tuple[float, float], ...] = ()

    @property
    def waiting(self) -> float:
        """The part of `queue` in which the scheduler, or the KV cache, served others."""
        return max(self.queue - self.preprocess, 0.0)


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole result of a request.

    Attributes:
        text: the generated text, stop string removed unless asked for.
        tokens: every generated token in order.
        prompt_logprobs: PromptLogprobs, a sequence with a PromptLogprob for each prompt token, None
            for the first, and the same as arrays; None unless asked for.
        embedding: NumPy array, float32 [hidden], of length 1; None unless ``pooling`` asked for it.
    """

    request_id: str
    prompt_tokens: int
    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    timings: Timings
    prompt_logprobs: Any = None
    embedding: Any = None

    @property
    def token_ids(self) -> list[int]:
        """The generated ids, end-of-sequence token included when one ended the text."""
        return [token.token_id for token in self.tokens]
