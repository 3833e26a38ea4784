"""Renders chat templates; template_process.py has BoundedProcesses run it.

It imports jinja2 and the standard library alone, so it is up in a tenth of a second. Requests and
replies are JSON.

A message's content may be a list of text parts. A template that goes through the parts gets the
list, as from transformers; one that writes content as it is gets the joined text (transformers
would have it write the list as Python does). A template that knows parts only, and does not ask
whether content is a string, gets one part for a string: it would go through its characters.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MESSAGE_CHARS = 300
BROKEN = "the model's chat template is broken"


class _GenerationTag(Extension):
    """``{% generation %}`` blocks mark assistant text for training; here they are only a scope."""

    tags = {"generation"}  # noqa: RUF012 - declared so by the base class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        return caller()


class TemplateRefused(jinja2.TemplateError):
    """The template itself refused the messages (``raise_exception``)."""


def _raise_exception(message: str) -> None:
    raise TemplateRefused(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML, which would change what the model reads.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return dt.datetime.now().strftime(pattern)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class Form(NamedTuple):
    """What a template takes as content.

    Attributes:
        lists: it goes through the parts of a list.
        only_lists: it does so without asking whether there is a list.
    """

    lists: bool
    only_lists: bool


class _ContentReader:
    """Finds out how a template reads the content of messages."""

    def __init__(self, tree: nodes.Template) -> None:
        self._tree = tree
        self._aliases: set[str] = set()
        while self._find_aliases():
            pass

    def form(self) -> Form:
        tree = self._tree
        loops = [loop for loop in tree.find_all(nodes.For) if self._is_content(_source(loop.iter))]
        picks = (item for item in tree.find_all(nodes.Getitem) if self._is_content(item.node))
        filters = list(tree.find_all(nodes.Filter))
        reads = list(_with_inner(tree, (nodes.Getattr, nodes.Getitem, nodes.Call)))
        lists = (
            bool(loops)
            or any(isinstance(item.arg, nodes.Const) and type(item.arg.value) is int
                   for item in picks)
            or any(f.name in _PART_FILTERS and self._is_content(_source(f.node)) for f in filters)
            or any(_takes_attribute(f) and self._is_content(_source(f.node)) for f in filters)
            or any(_key(read) == "text" and self._is_end_of_content(read) for read in reads)
            or any(f.name == "tojson" and _is_message(f.node) for f in filters)
        )  # fmt: skip
        asks = any(
            test.name == "string" and self._is_content(test.node)
            for test in tree.find_all(nodes.Test)
        )
        return Form(lists, not asks and any(map(_reads_text, loops)))

    def _is_content(self, node: nodes.Node | None) -> bool:
        if isinstance(node, nodes.CondExpr):
            return self._is_content(node.expr1) or self._is_content(node.expr2)
        if isinstance(node, (nodes.Or, nodes.And)):
            return self._is_content(node.left) or self._is_content(node.right)
        if isinstance(node, nodes.Filter) and node.name in _LIST_FILTERS:
            return self._is_content(node.node)
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            return self._is_content(node.node)
        return _key(node) == "content" or _name(node) in self._aliases

    def _is_end_of_content(self, read: Any) -> bool:
        """Whether something is read of the first or the last part."""
        owner = _owner(read)
        is_end = isinstance(owner, nodes.Filter) and owner.name in ("first", "last")
        return is_end and self._is_content(_source(owner))

    def _find_aliases(self) -> bool:
        """Add names that stand for content: set to it, or called with it; whether there are new."""
        known = len(self._aliases)
        pairs = [(assigned.target, assigned.node) for assigned in self._tree.find_all(nodes.Assign)]
        for block in self._tree.find_all(nodes.With):
            pairs += zip(block.targets, block.values, strict=True)
        self._aliases |= {_name(target) for target, value in pairs if self._is_content(value)}
        self._aliases.discard("")
        macros = {macro.name: macro.args for macro in self._tree.find_all(nodes.Macro)}
        for call in self._tree.find_all(nodes.Call):
            names = macros.get(getattr(call.node, "name", ""), [])
            given = [(name.name, value) for name, value in zip(names, call.args, strict=False)]
            given += [(keyword.key, keyword.value) for keyword in call.kwargs if names]
            self._aliases |= {name for name, value in given if self._is_content(value)}
        return len(self._aliases) > known


_PART_FILTERS = ("map", "select", "selectattr", "reject", "rejectattr", "groupby")


# Those that give a list for a list.
_LIST_FILTERS = ("default", "d", "list", "reverse", "sort", "unique", *_PART_FILTERS)


def _takes_attribute(found: nodes.Filter) -> bool:
    """Whether a filter reads an attribute of each item: ``join('', attribute='text')``."""
    is_second = found.name in ("join", "sum") and len(found.args) > (found.name == "join")
    return is_second or any(keyword.key == "attribute" for keyword in found.kwargs)


def _key(node: nodes.Node | None) -> str:
    """What is read of an object: ``.x``, ``['x']`` or ``.get('x')``; else empty."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    key: Any = node.arg if isinstance(node, nodes.Getitem) else None
    if isinstance(node, nodes.Call) and getattr(node.node, "attr", "") == "get" and node.args:
        key = node.args[0]
    return str(key.value) if isinstance(key, nodes.Const) else ""


def _owner(read: Any) -> Any:
    """What something is read of; see _key."""
    method: Any = read.node
    return method.node if isinstance(read, nodes.Call) else method


def _name(node: nodes.Node | None) -> str:
    """Name of a variable, or of one in a namespace, else empty."""
    if isinstance(node, nodes.NSRef):
        return f"{node.name}.{node.attr}"
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        return f"{node.node.name}.{node.attr}"
    return str(node.name) if isinstance(node, nodes.Name) else ""


def _source(node: nodes.Node | None) -> nodes.Node | None:
    """What a chain of filters starts from."""
    while isinstance(node, nodes.Filter):
        node = node.node
    return node


def _is_message(node: nodes.Node | None) -> bool:
    """Whether an expression is a message, or all of them, by the names templates give them."""
    node = _source(node)
    if isinstance(node, nodes.Getitem):
        is_number = isinstance(node.arg, (nodes.Const, nodes.Slice, nodes.Neg, nodes.Name))
        return is_number and getattr(node.node, "name", "") == "messages"
    return isinstance(node, nodes.Name) and node.name in ("messages", "message", "m", "msg")


def _reads_text(loop: nodes.For) -> bool:
    """Whether a loop reads ``text`` of what it goes through."""
    name = getattr(loop.target, "name", None)
    kinds = (nodes.Getattr, nodes.Getitem, nodes.Call)
    reads = [read for body in loop.body for read in _with_inner(body, kinds)
             if _key(read) == "text"]  # fmt: skip
    return any(getattr(_owner(read), "name", "") == name for read in reads)


def _with_inner(node: nodes.Node, kind: Any) -> Iterator[Any]:
    if isinstance(node, kind):
        yield node
    yield from node.find_all(kind)


def _shaped(message: dict[str, Any], form: Form) -> dict[str, Any]:
    """Give a message's content the form that the template reads."""
    content = message.get("content")
    if isinstance(content, list) and not form.lists:
        return message | {"content": "".join(part["text"] for part in content)}
    if isinstance(content, str) and form.only_lists:
        return message | {"content": [{"type": "text", "text": content}]}
    return message


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> tuple[jinja2.Template, Form]:
    environment = _environment()
    template = environment.from_string(text)
    return template, _ContentReader(environment.parse(text)).form()


def _said(error: BaseException) -> str:
    try:
        return str(error)[:MAX_MESSAGE_CHARS]
    except Exception:  # its text is the template's, too
        return "an error without a text"


def render(text: str, variables: dict[str, Any], max_chars: int) -> dict[str, str]:
    """Render a template; returns ``{"text": …}``, or ``{"refused": why}``.

    Of one that does not compile, ``broken`` says where.
    """
    try:
        template, form = _compiled(text)
    except jinja2.TemplateSyntaxError as error:
        where = f"line {error.lineno}: {_said(error)}"
        return {"refused": f"{BROKEN}: {where}", "broken": where}
    except Exception as error:  # Python's own compiler refuses what jinja2 made of it
        kind = type(error).__name__
        where = f"{kind}: {_said(error)}"
        return {"refused": f"{BROKEN}: {where}", "broken": where}
    variables["messages"] = [_shaped(message, form) for message in variables["messages"]]
    pieces: list[str] = []
    left = max_chars
    try:
        for piece in template.generate(variables):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                return {"refused": f"the chat template writes more than {max_chars} characters"}
        return {"text": "".join(pieces)}
    except jinja2.TemplateError as error:
        return {"refused": f"the chat template says: {_said(error)}"}
    except Exception as error:  # a template can raise anything Python can
        return {"refused": f"the chat template failed with {type(error).__name__}: {_said(error)}"}


def answer(request: bytes) -> bytes:
    """Render what a request asks for; see `render`."""
    try:
        asked = json.loads(request)
    except RecursionError:
        reply = {"refused": "what the chat template gets is nested too deeply"}
    else:
        reply = render(asked["template"], asked["variables"], asked["max_chars"])
    return json.dumps(reply).encode()
