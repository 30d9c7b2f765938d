"""A page of Forerun read back: tags, scripts, visible text and the data of its figures."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class Page(HTMLParser):
    """Tags, attributes, scripts and visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.contents: dict[str, list[str]] = {"script": [], "style": []}
        self.chunks: list[str] = []
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag if tag in self.contents else ""
        if self._inside:
            self.contents[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.contents[self._inside][-1] += data
        else:
            self.chunks.append(data)

    @property
    def text(self) -> str:
        """The visible text as it is in the file."""
        return "".join(self.chunks)

    @property
    def words(self) -> str:
        """The visible text, one blank between words and between elements."""
        return " ".join(" ".join(self.chunks).split())

    def code(self) -> list[str]:
        """Scripts that run, without the blocks of data."""
        scripts = [attrs for tag, attrs in self.tags if tag == "script"]
        return [body for body, attrs in zip(self.contents["script"], scripts, strict=True) if "type" not in attrs]

    def figures(self) -> dict[str, Any]:
        """The figures as given to plotly, by name."""
        scripts = [attrs for tag, attrs in self.tags if tag == "script"]
        pairs = zip(scripts, self.contents["script"], strict=True)
        return {str(attrs["id"]): json.loads(body) for attrs, body in pairs if "id" in attrs}
