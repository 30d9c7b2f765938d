"""One offline page from a template: works from file:// without a network, plotly.js written into it once.

The templates (`templates/`) hold the text and escape every value; figures are data from `plots.py`. A content security
policy names the hashes of the page's own scripts, so nothing else runs or loads, whatever markup a sample contains.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from forerun.report.plots import Figure
from forerun.tracking.files import write_atomically


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure with its title and one explaining sentence. `name` is unique on the page."""

    name: str
    title: str
    figure: Figure | None  # None: nothing to draw
    caption: str


def write_page(path: Path, template: str, title: str, context: Mapping[str, Any]) -> None:
    """Write the page that `templates/<template>.html.j2` makes from `context`. Raises UserError on a disk error."""
    scripts = (get_plotlyjs().replace("</script", "<\\/script"), _static("page.js"))
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    frame = {
        "title": title,
        "policy": Markup(f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"),
        "css": Markup(_static("page.css")),
        "scripts": [Markup(script) for script in scripts],
    }
    write_atomically(path, _TEMPLATES.get_template(f"{template}.html.j2").render(frame | dict(context)))


def macro(template: str, name: str, *arguments: Any) -> Markup:
    """What a macro of a template makes of its arguments; empty when it has nothing to show."""
    module = _TEMPLATES.get_template(f"{template}.html.j2").module
    return Markup(getattr(module, name)(*arguments).strip())


def data_json(value: Any) -> Markup:
    """JSON that cannot close the script element around it."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e"))


def _static(name: str) -> str:
    return (resources.files("forerun.report") / "static" / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


_TEMPLATES = Environment(
    loader=PackageLoader("forerun.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals["chart"] = Chart
_TEMPLATES.filters["data_json"] = data_json
