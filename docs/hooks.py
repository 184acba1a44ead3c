"""Hooks of MkDocs: pages from the root of the repository, and links that lead out of docs/.

Links are written for the forge, relative to the file they stand in. On the site a link to a file outside
docs/ leads to the forge, or is plain text while no `REPO_URL` is set; a link to a file that is absent is a
warning, and so fails the build.
"""

import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

log = logging.getLogger("mkdocs.hooks")
ROOT = Path(__file__).resolve().parent.parent
#: Pages of the site that lie in the root of the repository.
PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
LINK = re.compile(r"(?P<text>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"^(\s*)(`{3,}|~{3,}).*?^\1\2\s*$", re.MULTILINE | re.DOTALL)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie in the root of the repository."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Point links at pages of the site, or at the forge."""
    source = PAGES.get(page.file.src_uri)
    here = PurePosixPath(source or f"docs/{page.file.src_uri}").parent
    there = PurePosixPath(page.file.src_uri).parent

    def resolved(match: re.Match[str]) -> str:
        target, anchor = match["target"], match["anchor"] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = os.path.normpath(here / target)
        pages = {root: name for name, root in PAGES.items()}
        if path in pages or path.startswith("docs/"):
            name = pages.get(path) or path.removeprefix("docs/")
            return f"{match['text']}({os.path.relpath(name, there)}{anchor})"
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, path)
        if not config.repo_url:
            return match["text"][1:-1]
        return f"{match['text']}({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(resolved, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(resolved, markdown[end:])])
