"""Hooks of mkdocs: links that leave docs/ for the repository, and the pages' sources for readers of llms.txt."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

OUTSIDE = re.compile(r"(?<!!)\[([^]]+)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links to files outside docs/ into their text: the site has no copy of them."""
    folder = Path(config.docs_dir, page.file.src_uri).parent

    def plain(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        return match[0] if target.is_relative_to(config.docs_dir) else match[1]

    return OUTSIDE.sub(plain, markdown)


def on_post_build(config: Any) -> None:
    """Serve each page's Markdown at the address that llms.txt gives."""
    for source in Path(config.docs_dir).rglob("*.md"):
        target = Path(config.site_dir, source.relative_to(config.docs_dir))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
