"""The main of a BoundedProcess: limits itself, then answers requests with a worker's function.

Imports the standard library alone. Its arguments: the worker, a Python file that defines
`answer(request)`, bytes to bytes; the whole seconds that one answer may compute; the bytes of
address space of the process; the folders of modules behind the standard library. Requests and
replies are frames on the socket that is its standard input: eight bytes of length, then the bytes.
The first, empty, comes unasked: the worker is loaded. Standard error is heard until then.
"""

from __future__ import annotations

import math
import os
import resource
import runpy
import socket
import sys
import time
from collections.abc import Callable

LENGTH_BYTES = 8


def serve(connection: socket.socket, answer: Callable[[bytes], bytes], cpu_limit_s: int) -> None:
    """Say that we are up, and answer requests until the other side closes."""
    stream = connection.makefile("rwb")
    stream.write(bytes(LENGTH_BYTES))
    stream.flush()
    while len(head := stream.read(LENGTH_BYTES)) == LENGTH_BYTES:
        request = stream.read(int.from_bytes(head))
        # The system ends this process if the answer takes more.
        most = math.ceil(time.process_time() + cpu_limit_s)
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
        reply = answer(request)
        stream.write(len(reply).to_bytes(LENGTH_BYTES) + reply)
        stream.flush()


def main(file: str, cpu_limit_s: str, memory_limit_bytes: str, *module_paths: str) -> None:
    """Load the worker, set the limits of this process, and serve."""
    sys.path += module_paths
    answer = runpy.run_path(file)["answer"]
    most = int(memory_limit_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    serve(socket.socket(fileno=sys.stdin.fileno()), answer, int(cpu_limit_s))


if __name__ == "__main__":
    main(*sys.argv[1:])
