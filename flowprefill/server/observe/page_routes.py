"""GET / and GET /live: the page that shows the executor at work, and its data; for app.py."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from aiohttp import web

from flowprefill.server.context import SERVER
from flowprefill.server.http.error_middleware import Handler
from flowprefill.server.lanes import Lane


def content_security_policy(html: str) -> str:
    """Return a policy that allows the page's own inline script and style, and nothing else."""
    sources = {"script": "", "style": ""}
    for tag in sources:
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in inline)
        sources[tag] = " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in digests)
    return (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def page_handler() -> Handler:
    """Return the handler of GET /, with the page read once."""
    html = (files("flowprefill.server.observe") / "page.html").read_text("utf-8")
    headers = {
        "Content-Security-Policy": content_security_policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    async def page(_: web.Request) -> web.Response:
        # It holds no data and may be read without a key; it asks for one when /live does.
        return web.Response(text=html, content_type="text/html", headers=headers)

    return page


async def live(request: web.Request) -> web.Response:
    """Handle GET /live; it names requests, so it is open to whom the debug routes are."""
    context = request.app[SERVER]
    context.check_debug(request.headers)
    engine, feed = context.engine, context.live
    text = await context.lanes.run(Lane.REPLIES, lambda: feed.text(engine))
    return web.json_response(text=text, headers={"Cache-Control": "no-store"})
