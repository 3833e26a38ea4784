"""Hook of mkdocs: the site's pages are the repository's files, and references made from code.

Every file keeps its path, so links between pages are right in the repository and on the site. A
link to a folder goes to a page that is made here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import http_reference  # noqa: E402

import flowprefill  # noqa: E402
import flowprefill.policies  # noqa: E402

OWN = (
    "*.md", "csrc/README.md", "docs/*.md", "docs/decisions/*.md", "docs/images/*",
    "docs/site/*.css", "examples/*.py", "deploy/**/*", "benchmarks/results/**/*",
)  # fmt: skip
FOLDERS = {
    "docs/decisions": "Why the larger things are as they are.",
    "deploy": "Files to deploy with; [docs/deploy.md](../docs/deploy.md) says how.",
    "benchmarks/results": "",  # its README says it
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace what mkdocs has found in docs/ by the repository's files and the made pages."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for path in own_files():
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    document = http_reference.whole_document()
    made = {
        "examples/index.md": examples_page(),
        "reference/python.md": python_page(),
        "reference/http.md": http_reference.page(document),
        "reference/openapi.json": json.dumps(document, indent=1),
        **{f"{folder}/index.md": folder_page(folder, text) for folder, text in FOLDERS.items()},
    }
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Let links to folders go to the folders' pages."""
    here = (ROOT / page.file.src_uri).parent

    def index_of(link: re.Match[str]) -> str:
        folder = (here / link[1]).resolve()
        has_page = folder.is_dir() and folder.is_relative_to(ROOT)
        return f"]({link[1].rstrip('/')}/index.md)" if has_page else link[0]

    return re.sub(r"\]\(([^():#]+)\)", index_of, markdown)


def own_files() -> Iterator[Path]:
    """Yield the repository's files that the site has; a folder's README is on its made page."""
    readmes = {ROOT / folder / "README.md" for folder in FOLDERS}
    for pattern in OWN:
        yield from sorted(p for p in ROOT.glob(pattern) if p.is_file() and p not in readmes)


def title_of(path: Path) -> str:
    """Return a page's heading, or a file's name."""
    heading = (
        re.search(r"^# (.*)$", path.read_text(), re.MULTILINE) if path.suffix == ".md" else None
    )
    return heading[1] if heading else path.name


def folder_page(folder: str, text: str) -> str:
    """Return a page that lists a folder's files, behind what its README says if it has one."""
    base = ROOT / folder
    readme = base / "README.md"
    found = sorted(p for p in base.rglob("*") if p.is_file() and p != readme)
    lines = [f"- [{title_of(p)}]({p.relative_to(base).as_posix()})" for p in found]
    name = "Decisions" if folder == "docs/decisions" else folder
    head = readme.read_text() if readme.exists() else f"# {name}\n\n{text}\n"
    return "\n".join([head, *lines, ""])


def examples_page() -> str:
    """Return the examples with their text."""
    parts = ["# Examples", "", "Short programs; each runs alone.", ""]
    for path in sorted((ROOT / "examples").glob("*.py")):
        parts += [f"## {path.name}", "", "```python", path.read_text().rstrip(), "```", ""]
    return "\n".join(parts)


def python_page() -> str:
    """Return the reference of the public names, from their docstrings."""
    parts = [
        "# Python reference",
        "",
        "From the docstrings; [the guide](../docs/python.md) says how the parts go together.",
        "",
        "## flowprefill",
        "",
    ]
    names = [name for name in flowprefill.__all__ if name != "__version__"]
    classes = [name for name in names if not is_error(name)]
    errors = [name for name in names if is_error(name)]
    parts += [f"::: flowprefill.{name}\n" for name in classes]
    parts += ["::: flowprefill.engine.handle.Handle\n", "## Errors", ""]
    parts += [f"::: flowprefill.{name}\n" for name in errors]
    parts += ["## flowprefill.policies", ""]
    parts += [f"::: flowprefill.policies.{name}\n" for name in flowprefill.policies.__all__]
    return "\n".join(parts)


def is_error(name: str) -> bool:
    """Tell an error by its home; importing the engine would load torch."""
    return flowprefill._HOME[name] == "errors"
