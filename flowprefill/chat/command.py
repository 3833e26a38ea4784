"""The command `flowprefill chat`: reads lines and commands, shows answers as they stream.

Every answer is followed by one line: how long its first token took, next to the objective that
``/slo`` has set. Ctrl-C ends an answer; at the prompt it ends the conversation.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console

from flowprefill import cli
from flowprefill.argument_parser import add_settings, did_you_mean
from flowprefill.chat.talks import EngineTalk, Message, ServerTalk, Talk, TalkSettings
from flowprefill.client import KEY_VARIABLE
from flowprefill.config import EngineConfig
from flowprefill.errors import ConfigError, FlowPrefillError, InvalidRequest
from flowprefill.request import SamplingParams

MAX_OBJECTIVE_MS = 86_400_000.0
COMMANDS = {
    "/slo": "/slo 250: objective for the first token in milliseconds; /slo off: none",
    "/system": "/system TEXT: what the model is told before the conversation, which starts anew",
    "/clear": "/clear: forget the conversation",
    "/help": "/help: this list",
    "/quit": "/quit: end; so does Ctrl-D",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``flowprefill chat``."""
    parser.add_argument(
        "model", nargs="?", default="",
        help=f"to load here (default {cli.DEFAULT_MODEL}), or to ask the server for",
    )  # fmt: skip
    parser.add_argument("--url", help="talk with this server, http://HOST:PORT; no model is loaded")
    parser.add_argument(
        "--api-key",
        help=f"for the server; the variable {KEY_VARIABLE} if left out",
    )  # fmt: skip
    parser.add_argument("--system", default="", help="what the model is told first")
    parser.add_argument("--slo", type=float, metavar="MS", help="objective for the first token")
    parser.add_argument("--max-tokens", type=int, default=512, help="of an answer (default 512)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default 0.7)")
    parser.add_argument("--config", help="JSON file of settings; flags win over it")
    add_settings(parser, EngineConfig, cli.ENGINE)


def run(args: argparse.Namespace) -> int:
    """Talk until the user ends it."""
    if args.slo is not None:
        _check_objective(args.slo)
    if args.max_tokens < 1:
        raise InvalidRequest.field("max_tokens", args.max_tokens, "an integer >= 1")
    SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature)  # checks both
    settings = TalkSettings(args.max_tokens, args.temperature, args.slo)
    if args.url is not None:
        chat = Conversation(ServerTalk(args.url, args.api_key, args.model), settings, args.system)
        return chat.run(sys.stdin)
    config, _ = cli.read_settings(args)
    engine = cli.load_engine(args.model or cli.DEFAULT_MODEL, config)
    try:
        return Conversation(EngineTalk(engine), settings, args.system).run(sys.stdin)
    finally:
        engine.close(0.0)


def _check_objective(ttft_ms: float) -> None:
    if not 0 < ttft_ms <= MAX_OBJECTIVE_MS:
        allowed = f"milliseconds in (0, {MAX_OBJECTIVE_MS:.0f}]"
        raise ConfigError(f"slo: got {ttft_ms:g}, expected {allowed}", param="slo")


def _printable(text: str) -> str:
    """Return text without what would steer the terminal: a model can write escape sequences."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


class Conversation:
    """One conversation on a terminal, or with lines from a pipe.

    Args:
        talk: who answers.
        settings: of the first answer; ``/slo`` changes them.
        system: what the model is told first; empty for nothing.
        console: where answers go; stdout if left out.
    """

    def __init__(
        self, talk: Talk, settings: TalkSettings, system: str = "", console: Console | None = None
    ) -> None:
        self._talk, self._settings, self._system = talk, settings, system
        self._console = console or Console()
        self.messages: list[Message] = []
        self._clear("")

    def run(self, lines: TextIO) -> int:
        """Answer every line until the end of input, /quit or Ctrl-C; returns the exit status."""
        is_terminal = lines.isatty()
        if is_terminal:
            import readline  # noqa: F401  gives input() its line editing

            self._note(f"{self._talk.model}; /help lists commands, Ctrl-D ends")
        read: Callable[[], str] = (lambda: input("> ")) if is_terminal else lines.readline
        while True:
            try:
                line = read()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return 0
            if not is_terminal and not line:
                return 0
            if line.strip() == "/quit":
                return 0
            self.take(line.strip())

    def take(self, line: str) -> None:
        """Do what one line says: a command, or something to answer."""
        if not line:
            return
        name, _, rest = line.partition(" ")
        if not name.startswith("/"):
            self._answer(line)
        elif name == "/slo":
            self._set_objective(rest.strip())
        elif name == "/system":
            self._system = rest.strip()
            self._clear("the conversation starts anew")
        elif name == "/clear":
            self._clear("forgotten")
        elif name == "/help":
            self._note("\n".join(COMMANDS.values()))
        else:
            self._note(f"{name}: no such command{did_you_mean(name, COMMANDS)} (/help lists them)")

    def _clear(self, note: str) -> None:
        self.messages = [{"role": "system", "content": self._system}] if self._system else []
        if note:
            self._note(note)

    def _set_objective(self, text: str) -> None:
        ttft_ms: float | None = None
        if text != "off":
            try:
                ttft_ms = float(text.removesuffix("ms"))
                _check_objective(ttft_ms)
            except (ValueError, ConfigError):
                self._note(f"/slo: got {text!r}, expected milliseconds such as 250, or off")
                return
        old = self._settings
        self._settings = TalkSettings(old.max_tokens, old.temperature, ttft_ms)
        self._note("no objective" if ttft_ms is None else f"first token within {ttft_ms:g} ms")

    def _answer(self, text: str) -> None:
        """Show an answer; one that fails leaves the conversation as it was."""
        asked = [*self.messages, {"role": "user", "content": text}]
        parts: list[str] = []
        start_s, first_s = time.monotonic(), math.nan
        answer = self._talk.answer(asked, self._settings)
        try:
            for part in answer:
                if not parts:
                    first_s = time.monotonic() - start_s
                parts.append(part)
                self._console.out(_printable(part), end="", highlight=False)
        except KeyboardInterrupt:
            self._console.out(" [stopped]", end="", highlight=False)
        except FlowPrefillError as error:
            self._note(f"{chr(10) if parts else ''}{error}")
            return
        finally:
            answer.close()
        self._console.print()
        if parts:
            self._note(self._timing(first_s))
            self.messages = [*asked, {"role": "assistant", "content": "".join(parts)}]

    def _timing(self, first_s: float) -> str:
        line = f"first token after {first_s * 1e3:.0f} ms"
        ttft_ms = self._settings.ttft_ms
        if ttft_ms is None:
            return line
        return f"{line}, {'within' if first_s * 1e3 <= ttft_ms else 'over'} {ttft_ms:g} ms"

    def _note(self, text: str) -> None:
        """Show something that is not part of an answer."""
        self._console.out(_printable(text), style="dim", highlight=False)
