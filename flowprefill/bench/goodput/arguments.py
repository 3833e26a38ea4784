"""The flags of `flowprefill bench goodput`: what they are, and which values are refused."""

from __future__ import annotations

import argparse
from pathlib import Path

from flowprefill.bench.common import check_least
from flowprefill.bench.goodput.lab import POINT_REQUESTS
from flowprefill.bench.goodput.setting import FORM, OURS, Setting
from flowprefill.bench.goodput.workload import add_workload_arguments, check_workload
from flowprefill.bench.random_model import SHAPES
from flowprefill.bench.report import json_path
from flowprefill.errors import ConfigError
from flowprefill.simulation import Profile

LOADS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7, 2.1)
SLO_SCALES = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
SIM_SAMPLES, QUICK_SAMPLES = 12, 2
QUICK_SETTINGS = ("fcfs+none", "slack_edf+chunk:512", OURS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``flowprefill bench goodput``."""
    parser.add_argument("--backend", default="sim", help="sim, engine, or a server's http:// URL")
    parser.add_argument("--setting", action="append", metavar="S", help=f"{FORM}; several times")
    parser.add_argument("--ours", default=OURS, metavar="S",
                        help=f"compare the others with it, default {OURS}")  # fmt: skip
    parser.add_argument("--target", action="append", type=float, metavar="SHARE",
                        help="attainment, several times; sim: 0.9 and 0.99, else 0.9")  # fmt: skip
    parser.add_argument("--rates", type=float, nargs="*", default=[], metavar="R",
                        help="requests/s to measure at instead of searching")  # fmt: skip
    parser.add_argument("--loads", type=float, nargs="*",
                        help="sweep these shares of the capacity; none: no sweep")  # fmt: skip
    parser.add_argument("--slo-scales", type=float, nargs="*", help="sweep these; none: no sweep")
    parser.add_argument("--rate-step", type=float, default=0.0, metavar="RATIO",
                        help="of the rates' grid; default: sim 1.005, else 1.05")  # fmt: skip
    parser.add_argument("--point-s", type=float, default=0.0, metavar="SECONDS",
                        help=f"serve what arrives so long at each rate, {POINT_REQUESTS} requests "
                        "at least; 0: all of the sample")  # fmt: skip
    parser.add_argument("--budget", type=float, default=0.0, metavar="MINUTES",
                        help="begin no measurement that may end later; 0 is no limit")  # fmt: skip
    parser.add_argument("--resume", type=json_path, metavar="FILE",
                        help="keep measurements there and go on from those it holds")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write goodput.html and PNGs")
    parser.add_argument("--json", type=json_path, metavar="FILE", help="write the report there")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    add_workload_arguments(parser)
    sim = parser.add_argument_group("backend sim")
    sim.add_argument("--profile", default="llama-3.1-8b@a800", help="MODEL@MACHINE or a JSON file")
    sim.add_argument("--noise", type=float, default=0.0, help="sigma of true / predicted time")
    sim.add_argument("--bias", type=float, default=1.0, help="predicted / true time")
    sim.add_argument("--no-clairvoyant", action="store_true", help="leave the comparison out")
    sim.add_argument("--lookahead", type=float, nargs="*", default=[], metavar="SECONDS",
                     help="also an ideal scheduler that sees so far ahead")  # fmt: skip
    engine = parser.add_argument_group("backends engine and URL")
    engine.add_argument("--model", default="smollm2-135m", help="name, folder or .gguf file")
    engine.add_argument("--shape", choices=sorted(SHAPES),
                        help="random weights of this shape instead of a model")  # fmt: skip
    engine.add_argument("--one-engine", action="store_true",
                        help="load once for all measurements")  # fmt: skip
    engine.add_argument("--guess-profile", default="", metavar="PROFILE",
                        help="begin searches where a simulation of it ends")  # fmt: skip
    engine.add_argument("--dtype", default="auto", choices=("auto", "bf16", "f32"))
    engine.add_argument("--device", default="auto")
    engine.add_argument("--threads", type=int, default=0, help="0 is one per available core")
    engine.add_argument("--kv-cache-gib", type=float, default=2.0, help="default 2")
    engine.add_argument("--vocab-size", type=int, default=30_000, help="of the URL's model")


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse values out of range, and fill in defaults that depend on the backend."""
    if args.backend not in ("sim", "engine"):
        if not args.backend.startswith(("http://", "https://")):
            message = f"backend: got {args.backend!r}, expected sim, engine or a http:// URL"
            raise ConfigError(message, param="backend")
        if args.setting:
            raise ConfigError("setting: a server at a URL has its own, expected none")
        check_least("vocab_size", args.vocab_size, 2)
    check_workload(args)
    check_least("budget", args.budget, 0)
    check_least("threads", args.threads, 0)
    check_least("point_s", args.point_s, 0)
    if args.rate_step and not 1.001 <= args.rate_step <= 2:
        message = f"rate_step: got {args.rate_step}, expected a ratio in [1.001, 2]"
        raise ConfigError(message, param="rate_step")
    Setting.parse(args.ours)
    if args.guess_profile:
        Profile.load(args.guess_profile)
    is_sim = args.backend == "sim"
    args.target = args.target or ([0.9, 0.99] if is_sim else [0.9])
    for target in args.target:
        if not 0 < target < 1:
            raise ConfigError(f"target: got {target}, expected a share in (0, 1)", param="target")
    if args.samples < 0:
        args.samples = SIM_SAMPLES if is_sim else 0
    if args.loads is None:
        args.loads = list(LOADS) if is_sim else []
    if args.slo_scales is None:
        args.slo_scales = list(SLO_SCALES) if is_sim else []
    for name in ("rates", "loads", "slo_scales"):
        for value in getattr(args, name):
            most = 1e6 if name == "rates" else 100
            if not 0 < value <= most:
                message = f"{name}: got {value}, expected numbers in (0, {most:g}]"
                raise ConfigError(message, param=name)
    for value in args.lookahead:
        if not 0 <= value <= 1e6:
            raise ConfigError(f"lookahead: got {value}, expected numbers >= 0", param="lookahead")
    if args.quick:
        args.samples = min(args.samples, QUICK_SAMPLES)
        args.setting = args.setting or list(QUICK_SETTINGS)
        args.loads, args.slo_scales = args.loads[::4], args.slo_scales[::4]
    if args.out is not None:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"out: got {str(args.out)!r}, expected a folder ({error.strerror})"
            raise ConfigError(message, param="out") from None
