"""Intake: makes a live request of what was asked, or refuses it; the engine submits what it makes.

Nothing here waits for the device, and nothing that is refused has left a trace.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import TYPE_CHECKING

import numpy as np

from flowprefill.engine.grammars import Grammars
from flowprefill.engine.handle import Handle
from flowprefill.engine.live_request import LiveRequest, TokenSide
from flowprefill.engine.sampler import Sampler
from flowprefill.engine.stop import StopChecker
from flowprefill.errors import InvalidRequest, PromptTooLong, overflow
from flowprefill.request import SLO

if TYPE_CHECKING:
    from flowprefill.config import EngineConfig
    from flowprefill.engine.core import EngineCore
    from flowprefill.models.tokenizer import Tokenizer
    from flowprefill.request import Request


def objectives_of(slo: SLO | str | None, config: EngineConfig) -> SLO:
    """Return what a caller of submit() means: an SLO, a configured class by name, or the default.

    Raises:
        InvalidRequest: it is none of these.
    """
    if slo is None:
        return config.default_slo()
    if isinstance(slo, str):
        if slo not in config.classes:
            names = ", ".join(sorted(config.classes)) or "none is configured"
            raise InvalidRequest.field("slo", slo, f"an SLO, or the name of a class: {names}")
        return config.slo_of_class(slo)
    if not isinstance(slo, SLO):
        raise InvalidRequest.field("slo", slo, "an SLO, as SLO(ttft=0.25), a class, or None")
    return slo


class Intake:
    """Tokenizer, grammars and service classes of one engine. Thread: any.

    Attributes:
        grammars: what structured output is held to.
    """

    def __init__(
        self,
        core: EngineCore,
        config: EngineConfig,
        tokenizer: Tokenizer,
        vocab_size: int,
        max_model_len: int,
        kv_tokens: int,
    ) -> None:
        """Make an intake.

        Args:
            core: whom handles tell that their request is cancelled or held.
            max_model_len: longest prompt plus output, tokens.
            kv_tokens: room of the whole KV cache, tokens.
        """
        self._core = core
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._kv_tokens = kv_tokens
        self._classes = {name: config.service_class(name) for name in config.classes}
        self._unnamed_class = config.service_class("")
        self._seeds = itertools.count(time.time_ns())
        self.grammars = Grammars(tokenizer, vocab_size)

    def live(self, request: Request, slo: SLO, arrival_s: float) -> LiveRequest:
        """Return the live request of what was asked, its prompt tokenised.

        Args:
            arrival_s: when it was asked, on the worker's clock.

        Raises:
            InvalidRequest, PromptTooLong: what is wrong with the request.
        """
        ids = self._token_ids(request)
        room = self._room_for(ids, request)
        params, num_prompt, seed = request.sampling, len(ids), next(self._seeds)
        eos = self._tokenizer.eos_ids
        structured = params.structured
        grammar = None if structured is None else self.grammars.compile(structured)
        if isinstance(request.prompt, str):  # the text is not kept with its tokens
            request = dataclasses.replace(request, prompt=ids[:1])
        live = LiveRequest(
            request=request,
            slo=slo,
            handle=Handle(
                request.id,
                num_prompt,
                on_cancel=lambda: self._core.cancel(live),
                on_hold=lambda is_held: self._core.hold(live, is_held=is_held),
            ),
            make_token_side=lambda: TokenSide(
                Sampler(
                    params,
                    self._vocab_size,
                    ids[:num_prompt],
                    seed,
                    eos,
                    None if grammar is None else grammar.start(),
                ),
                StopChecker(params, eos, room),
                self._tokenizer.incremental_decoder(params.skip_special_tokens, keeps_space=True),
            ),
            arrival_s=arrival_s,
            ids=ids,
            num_prompt=num_prompt,
            service=self._classes.get(slo.service_class, self._unnamed_class),
        )
        return live

    def _token_ids(self, request: Request) -> list[int]:
        if isinstance(request.prompt, str):
            self._tokenizer.check_fits(request.prompt, self._max_model_len)
            ids = self._tokenizer.encode(request.prompt, request.add_special_tokens)
            if not ids:
                raise InvalidRequest.field("prompt", request.prompt, "at least one token")
        else:
            ids = list(request.prompt)
        if {*map(type, ids)} == {int} and min(ids) >= 0 and max(ids) < self._vocab_size:
            return ids
        for token in ids:
            is_id = isinstance(token, (int, np.integer)) and not isinstance(token, bool)
            if not is_id or not 0 <= token < self._vocab_size:
                allowed = f"token ids in 0..{self._vocab_size - 1}"
                raise InvalidRequest.field("prompt", token, allowed)
        return ids

    def _room_for(self, ids: list[int], request: Request) -> int:
        """Return how many tokens may be generated, at least one if any is wanted."""
        limit = min(self._max_model_len, self._kv_tokens)
        longest = limit - int(request.generates)
        if len(ids) > longest:
            to_generate = ", one is to generate" if request.generates else ""
            raise PromptTooLong(
                f"prompt: got {len(ids)} tokens, expected at most {longest}. {overflow(limit)} "
                f"(max_model_len {self._max_model_len}, KV cache {self._kv_tokens} "
                f"tokens{to_generate})",
                param="prompt",
            )
        wanted = request.sampling.max_tokens
        room = limit - len(ids)
        if wanted is not None and len(ids) + wanted > self._max_model_len:
            raise PromptTooLong(
                f"max_tokens: got {wanted} on a prompt of {len(ids)} tokens, expected at most "
                f"{self._max_model_len - len(ids)}. {overflow(self._max_model_len)}",
                param="max_tokens",
            )
        return room if wanted is None else min(room, wanted)
