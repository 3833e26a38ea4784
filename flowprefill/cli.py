"""The command line: serve, chat, generate, bench and the others; `flowprefill` calls main().

Flags of engine and server are made from their settings' dataclasses. Torch, aiohttp and rich are
imported by the command that needs them, so that ``--help`` is quick. Every expected error is one
line on stderr; the exit status is 2 where what was typed is wrong, 1 where something has failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from flowprefill.argument_parser import Parser, UsageError, add_settings
from flowprefill.config import EngineConfig, read_object
from flowprefill.errors import ConfigError, FlowPrefillError, InvalidRequest, NotReady
from flowprefill.request import SLO, Request, SamplingParams, Token
from flowprefill.terminal import drop_output, finish_output, prepare_streams
from flowprefill.version import __version__

if TYPE_CHECKING:
    from flowprefill.engine import Engine
    from flowprefill.server.engine_protocol import ServedEngine
    from flowprefill.server.options import ServerOptions

FAILURE, USAGE_ERROR = 1, 2
INTERRUPTED, PIPE_CLOSED = 130, 141  # as a shell shows signals
LOADING_END_S = 0.5
SHOW_CURSOR = "\x1b[?25h\n"
DEFAULT_MODEL = "smollm2-135m"
ENGINE, SERVER = "engine.", "server."

# Modules of flowprefill.bench: name -> one line of help. A module is imported when it is named.
BENCHES: Mapping[str, str] = {
    "hol": "short prompts arriving during a long one, for each granularity",
    "prefill": "prefill throughput by prompt length, against transformers",
    "where": "where a prefill's time goes, by operator, against the machine's peak",
    "rates": "how a wrong calibration is mended by what executes",
    "quality": "what numbers of fewer bits cost: perplexity of a text, agreement with float32",
    "control": "from submit() to the executor seeing it, while all cores compute",
    "load": "requests over HTTP at a rate, with SLO attainment",
    "structured": "what structured output costs its own request and the others of its batch",
    "overload": "ten times the capacity, then thousands of useless connections",
    "goodput": "the highest rate at which policies meet their objectives, on a trace",
    "compare": "two reports of one bench as ratios, e.g. before and after a change",
    "gpu": "one GPU: kernels, prefill, blocking by run-ahead, hol; the report to send us",
}

# What people know from other engines.
SERVE_ELSEWHERE: Mapping[str, str] = {
    "--model": "the model is an argument: flowprefill serve MODEL",
    "--max-num-seqs": "here it is --max-running",
    "--max-num-batched-tokens": "here it is --max-batch-tokens",
    "--gpu-memory-utilization": "here it is --kv-cache-gib",
    "--tensor-parallel-size": "one engine has one device",
    "--enable-prefix-caching": "it is on; --no-prefix-cache turns it off",
    "--enable-chunked-prefill": "prefills are cut by time: see --granularity",
}


def _given(args: argparse.Namespace, prefix: str) -> dict[str, Any]:
    """Return the settings that were given as flags."""
    return {
        name.removeprefix(prefix): value
        for name, value in vars(args).items()
        if name.startswith(prefix)
    }


def read_settings(args: argparse.Namespace) -> tuple[EngineConfig, ServerOptions]:
    """Join the config file and the flags; flags win.

    The file is a JSON object of engine settings, with server settings in its key ``server``.
    """
    from flowprefill.server.options import ServerOptions

    values = {} if args.config is None else read_object("config file", args.config)
    server = values.pop("server", {})
    if not isinstance(server, dict):
        raise ConfigError(f"server: got {server!r}, expected an object", param="server")
    engine_config = EngineConfig.from_mapping({**values, **_given(args, ENGINE)})
    return engine_config, ServerOptions.from_mapping({**server, **_given(args, SERVER)})


@contextmanager
def loading_bar(model: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr while a model loads; gives the engine's ``progress`` callback."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(f"loading {model}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def load_engine(
    model: str, config: EngineConfig, is_wanted: Callable[[], bool] = lambda: True
) -> Engine:
    """Load a model under a progress bar; raises NotReady soon after it is not wanted any more."""
    from flowprefill.engine import Engine

    with loading_bar(model) as show:

        def progress(done: int, total: int) -> None:
            if not is_wanted():
                raise NotReady("stopped while the model was loading")
            show(done, total)

        engine = Engine(model, config, progress=progress)
    engine.freeze_garbage()
    return engine


def _command(commands: Any, name: str, line: str) -> Parser:
    """Add a command; its one line is shown in the list of commands and in its own help."""
    parser: Parser = commands.add_parser(
        name, help=line, description=f"{line[0].upper()}{line[1:]}."
    )
    return parser


def _add_serve(commands: Any) -> None:
    parser = _command(commands, "serve", "serve a model over an OpenAI-compatible API")
    parser.foreign = SERVE_ELSEWHERE
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, help="name, folder, .gguf file, or ORG/NAME"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0 lets the system choose")
    parser.add_argument("--config", help="JSON file of settings; flags win over it")
    parser.add_argument(
        "--log-level", default="info", choices=("debug", "info", "warning", "error")
    )
    add_settings(parser, EngineConfig, ENGINE)
    from flowprefill.server.options import ServerOptions

    add_settings(parser, ServerOptions, SERVER)
    parser.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    config, options = read_settings(args)
    options.check_classes(config)
    if not 0 <= args.port <= 65_535:
        raise ConfigError(f"port: got {args.port}, expected 0..65535", param="port")
    import asyncio

    from flowprefill.server.app import serve

    logging.basicConfig(
        level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )

    def announce(url: str) -> None:
        sys.stderr.write(f"serving {args.model} at {url}\n")
        sys.stderr.flush()

    is_stopped, is_loaded = threading.Event(), threading.Event()

    def load() -> ServedEngine:
        try:
            engine = load_engine(args.model, config, lambda: not is_stopped.is_set())
            engine.warm_chat()
            engine.warm_structured()
        finally:
            is_loaded.set()
        return engine

    def stop() -> None:
        is_stopped.set()
        threading.Thread(target=_end_loading, args=(is_loaded,), daemon=True).start()

    asyncio.run(serve(load, args.host, args.port, options, announce, stop))
    return 0


def _end_loading(is_loaded: threading.Event) -> None:
    """End the process if it still loads a little after it was told to stop.

    Loading looks for that between weights only; a tokenizer or a calibration takes seconds. There
    is nothing to save yet, and what the process has started ends with it.
    """
    if not is_loaded.wait(LOADING_END_S):
        _end_process(0)


def _end_process(status: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(SHOW_CURSOR)  # which the loading bar has hidden
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def _ends_at(number: signal.Signals, status: int) -> Iterator[None]:
    """In the block, on the main thread, a signal ends the process at once, without a traceback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, lambda *_: _end_process(status))
    try:
        yield
    finally:
        signal.signal(number, previous)


def _add_generate(commands: Any) -> None:
    parser = _command(commands, "generate", "continue one prompt and print the text")
    parser.foreign = {"": "the prompt is one argument, in quotes; the model is --model"}
    parser.add_argument("prompt", nargs="?", help="the prompt; read from stdin if left out")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="name, folder, .gguf file, or ORG/NAME"
    )
    parser.add_argument("--chat", action="store_true", help="use the model's chat template")
    parser.add_argument("--timings", action="store_true", help="print where the time went")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[], help="may be given several times")
    parser.add_argument("--ttft-ms", type=float, help="objective for the first token")
    parser.add_argument("--tpot-ms", type=float, help="objective per token after it")
    parser.add_argument("--config", help="JSON file of settings; flags win over it")
    add_settings(parser, EngineConfig, ENGINE)
    parser.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    """Stream one completion to stdout."""
    prompt = args.prompt if args.prompt is not None else _read_stdin()
    if args.max_tokens < 1:
        raise InvalidRequest.field("max_tokens", args.max_tokens, "an integer >= 1")
    sampling = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        seed=args.seed,
        stop=tuple(args.stop),
    )
    slo = SLO(
        ttft=args.ttft_ms / 1e3 if args.ttft_ms is not None else None,
        tpot=args.tpot_ms / 1e3 if args.tpot_ms is not None else None,
    )
    if not prompt:
        raise InvalidRequest("prompt: empty, expected text as an argument or on stdin")
    config, _ = read_settings(args)
    with _ends_at(signal.SIGINT, INTERRUPTED):
        engine = load_engine(args.model, config)
    try:
        if args.chat:
            messages = [{"role": "user", "content": prompt}]
            prompt = engine.render_chat(messages, add_generation_prompt=True)
        handle = engine.submit(Request(prompt, sampling, add_special_tokens=not args.chat), slo)
        _print_tokens(handle)
        if args.timings:
            _print_timings(dataclasses.asdict(handle.result().timings))
    finally:
        engine.close(0.0)
    return 0


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"prompt: byte {error.start} of stdin is not UTF-8") from None


def _print_tokens(tokens: Iterator[Token] | Any) -> None:
    for token in tokens:
        sys.stdout.write(token.text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _print_timings(timings: Mapping[str, Any]) -> None:
    for name, value in timings.items():
        if name == "suspensions":
            continue  # the stretches of `suspended`
        is_time = isinstance(value, float)
        shown = f"{value * 1e3:.2f} ms" if is_time else "-" if value is None else value
        sys.stderr.write(f"{name:>14}  {shown}\n")


def _add_bench(commands: Any, arguments: Sequence[str]) -> None:
    parser = _command(commands, "bench", "measure; bench NAME --help says how")
    names = parser.add_subparsers(title="benches", metavar="NAME", required=True)
    for name, line in BENCHES.items():
        bench = _command(names, name, line)
        # Its module may need torch: only the one that was named is imported.
        if list(arguments[:2]) == ["bench", name]:
            _attach_module(bench, f"flowprefill.bench.{name}")


def _add_simulate(commands: Any, arguments: Sequence[str]) -> None:
    parser = _command(commands, "simulate", "a trace on a worker or a cluster, virtual time")
    if list(arguments[:1]) == ["simulate"]:
        _attach_module(parser, "flowprefill.bench.simulate")


def _add_doctor(commands: Any, arguments: Sequence[str]) -> None:
    parser = _command(commands, "doctor", "what this machine offers")
    if list(arguments[:1]) == ["doctor"]:
        _attach_module(parser, "flowprefill.bench.doctor")


def _add_explain(commands: Any, arguments: Sequence[str]) -> None:
    parser = _command(commands, "explain", "what happened to a request of a server, and why")
    if list(arguments[:1]) == ["explain"]:
        _attach_module(parser, "flowprefill.explain")


def _add_chat(commands: Any, arguments: Sequence[str]) -> None:
    parser = _command(commands, "chat", "talk with a model, of a server or loaded here")
    if list(arguments[:1]) == ["chat"]:
        _attach_module(parser, "flowprefill.chat.command")


def _attach_module(parser: argparse.ArgumentParser, module_name: str) -> None:
    """Let a module with ``add_arguments(parser)`` and ``run(args) -> int`` fill a command."""
    if importlib.util.find_spec(module_name) is None:
        raise UsageError(f"{module_name} is not part of this installation")
    module = importlib.import_module(module_name)
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Build the parser; of commands in modules only the one named in ``arguments`` is complete."""
    parser = Parser("flowprefill", description="An LLM engine that preempts between operators.")
    parser.add_argument("--version", action="version", version=f"flowprefill {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_generate(commands)
    _add_chat(commands, arguments)
    _add_bench(commands, arguments)
    _add_simulate(commands, arguments)
    _add_doctor(commands, arguments)
    _add_explain(commands, arguments)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Without a command it prints the help."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in ([], ["bench"]):
        arguments.append("--help")
    prepare_streams()
    # Until serve() takes it over. Process 1 of a container that has no handler never gets it.
    is_server = arguments[:1] == ["serve"]
    try:
        with _ends_at(signal.SIGTERM, 0) if is_server else nullcontext():
            status = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        return PIPE_CLOSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except (UsageError, ConfigError, InvalidRequest) as error:
        return _tell(error, USAGE_ERROR)
    except OSError as error:
        finish_output()
        return _tell(error, FAILURE)
    except FlowPrefillError as error:
        return _tell(error, FAILURE)
    return status


def _tell(error: Exception, status: int) -> int:
    sys.stderr.write(f"flowprefill: {' '.join(str(error).split())}\n")
    return status


def _run(arguments: Sequence[str]) -> int:
    try:
        args = build_parser(arguments).parse_args(arguments)
        return int(args.run(args))
    except SystemExit as end:  # --help and --version
        return int(end.code or 0)


if __name__ == "__main__":
    sys.exit(main())
