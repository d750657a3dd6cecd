"""The site: `make site` builds it from docs/ and the READMEs, once in English and once, with ``-t zh``, in Chinese.

Links are those of the repository, so that pages read as well there. What a link does not find here is a page of the
other language, or a file.
"""

from __future__ import annotations

import logging
import posixpath
import shutil
from pathlib import Path
from typing import Any

import jieba
from docutils import nodes
from pygments.lexers.special import TextLexer
from sphinx import addnodes
from sphinx.application import Sphinx

jieba.setLogLevel(logging.WARNING)  # else it says how it loads its dictionary

IS_CHINESE = "zh" in tags  # noqa: F821 - Sphinx gives it
ROOT = Path(__file__).parent.parent
OTHER = "en" if IS_CHINESE else "zh"
NAMES = {"en": "English", "zh": "中文"}
HERE, THERE = ("docs/zh", "docs") if IS_CHINESE else ("docs", "docs/zh")

project = "sft"
language = "zh_CN" if IS_CHINESE else "en"
extensions = ["myst_parser"]
root_doc = f"{HERE}/index"
include_patterns = (
    ["docs/zh/**.md", "README_zh.md"]
    if IS_CHINESE
    else ["docs/**.md", "*.md", "plugins/*/README.md", "examples/README.md", "examples/*/README.md"]
)
exclude_patterns = [
    ".*",
    "site",
    "build",
    "output",
    "**/.venv*",
    "**/tests",
    "README_zh.md" if not IS_CHINESE else "docs/*.md",
]
if not IS_CHINESE:
    exclude_patterns.append("docs/zh")
templates_path = ["templates"]
highlight_language = "text"
myst_heading_anchors = 6

html_theme = "furo"
html_title = "sft"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "language.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}


def setup(app: Sphinx) -> None:
    for name in ("csv", "mermaid"):
        app.add_lexer(name, TextLexer)
    app.connect("source-read", list_pages)
    app.connect("doctree-read", find_links)
    app.connect("html-page-context", name_the_other_language)
    app.connect("build-finished", copy_pictures)


def list_pages(app: Sphinx, page: str, source: list[str]) -> None:
    """In the navigation the pages that a list links to are below it; on GitHub the list is enough."""
    for folder, pattern in (("docs/decisions", "0*"), ("examples", "*/README")):
        if page == f"{folder}/README":
            source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n\n{pattern}\n```\n"


def find_links(app: Sphinx, tree: nodes.document) -> None:
    """Give each link that leaves this build its place: of a folder its README, of a page its place in the other one."""
    docname = app.env.docname
    for node in list(tree.findall(addnodes.pending_xref)):
        target, _, anchor = node["reftarget"].partition("#")
        anchor = anchor or node.get("reftargetid") or ""
        is_page = node.get("refdomain") == "doc"
        path = target if is_page else posixpath.normpath(posixpath.join(posixpath.dirname(docname), target))
        if not is_page and target and (ROOT / path).is_dir():
            path = f"{path}/README" if (ROOT / path / "README.md").is_file() else ""
            if not path:
                _replace(node, None)
                continue
            node["refdomain"], node["reftype"], node["reftarget"], node["reftargetid"] = (
                "doc",
                "myst",
                path,
                anchor or None,
            )
            is_page = True
        if is_page and path not in app.env.found_docs:
            there = posixpath.relpath(
                f"{OTHER}/{path}.html", posixpath.dirname(f"{'zh' if IS_CHINESE else 'en'}/{docname}")
            )
            _replace(node, there + (f"#{anchor}" if anchor else ""))


def _replace(node: addnodes.pending_xref, address: str | None) -> None:
    """A link to ``address`` in the place of one that Sphinx would look for; None: its text alone."""
    text = node.deepcopy().children
    link = nodes.reference("", "", *text, refuri=address, internal=True) if address else nodes.inline("", "", *text)
    node.replace_self(link)


def copy_pictures(app: Sphinx, error: Exception | None) -> None:
    """Those that pages name in HTML, of which Sphinx knows nothing, where these look for them."""
    if error is None:
        shutil.copytree(ROOT / "docs" / "images", Path(app.outdir) / "docs" / "images", dirs_exist_ok=True)


def name_the_other_language(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """For templates/language.html: the same page in the other language, or its front page."""
    other = (
        page.replace(HERE, THERE, 1)
        if page.startswith(HERE)
        else {"README": "README_zh", "README_zh": "README"}.get(page)
    )
    if other is None or not (ROOT / f"{other}.md").is_file():
        other = f"{THERE}/index"
    start = posixpath.dirname(f"{'zh' if IS_CHINESE else 'en'}/{page}")
    context["other_language"] = NAMES[OTHER]
    context["other_page"] = posixpath.relpath(f"{OTHER}/{other}.html", start)
