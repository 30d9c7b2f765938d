"""The frame of a report page: style, script, and the pieces that put text and figures into it.

One file that works from file:// without a network: plotly.js is written into it once. A content security policy names
the hashes of the page's own scripts, so nothing else runs or loads even if a sample should smuggle markup in.
Left out: what the page says (`html.py`).
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from plotly.offline import get_plotlyjs

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --panel: #ffffff; --text: #1d2023; --muted: #676d75; --rule: #e3e4e6;
  --speculative: #2463c4; --plain: #9298a1; --speculative-fill: #2463c42e; --plain-fill: #9298a12e;
  --warning: #a83a2c; --warning-fill: #a83a2c14; --accepted: #2463c422; --corrected: #c27a1a33;
  --stage-data: #c9ccd1; --stage-prepare: #7d6fb5; --stage-generation: #2463c4; --stage-logprob: #3a958a;
  --stage-train: #c98f35; --stage-other: #e3e4e6; --on-bar: #ffffff;
  --evaluation: #75853f; --checkpoint: #b0627c; --waiting: #cfdcf2;
  --position-1: #123c80; --position-2: #2463c4; --position-3: #4a86db; --position-4: #6fa3e8;
  --position-5: #8fb9ef; --position-6: #a9caf3; --position-7: #bfd8f6; --position-8: #d2e3f8;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #14161a; --panel: #1a1d22; --text: #e4e6e9; --muted: #979da6; --rule: #2e333a;
  --speculative: #6ea5f7; --plain: #7b828c; --speculative-fill: #6ea5f738; --plain-fill: #7b828c38;
  --warning: #ef8a7a; --warning-fill: #ef8a7a1c; --accepted: #6ea5f733; --corrected: #e0a95740;
  --stage-data: #565c65; --stage-prepare: #9d90d3; --stage-generation: #6ea5f7; --stage-logprob: #56b3a7;
  --stage-train: #d9a95c; --stage-other: #3a4048; --on-bar: #14161a;
  --evaluation: #a6b86a; --checkpoint: #d78fa6; --waiting: #2b3a52;
  --position-1: #b9d4fb; --position-2: #8db9f9; --position-3: #6ea5f7; --position-4: #5089da;
  --position-5: #3f71b9; --position-6: #345d97; --position-7: #2b4b79; --position-8: #243d60;
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em; }
p.muted { max-width: none; }
h2 { font-size: 18px; margin: 56px 0 4px; padding-top: 20px; border-top: 1px solid var(--rule); }
p { margin: 8px 0; max-width: 78ch; }
.muted, figcaption { color: var(--muted); font-size: 13px; }
.verdict { font-size: 18px; line-height: 1.5; margin: 20px 0; }
.notice { border-left: 3px solid var(--rule); padding: 6px 14px; margin: 12px 0; color: var(--muted); font-size: 14px; }
.warning { border-color: var(--warning); background: var(--warning-fill); color: var(--text); }
.warning b { color: var(--warning); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 20px; margin: 16px 0; }
figure:last-child:nth-child(odd) { grid-column: 1 / -1; }
.keys { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 16px; margin: 24px 0; }
.key { border-top: 2px solid var(--speculative); padding-top: 10px; }
.key b { display: block; font-size: 26px; line-height: 1.2; font-weight: 600; font-variant-numeric: tabular-nums; }
.key span { color: var(--muted); font-size: 13px; }
figure, pre { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; }
figure { margin: 0; min-width: 0; padding: 14px 14px 8px; }
figure h3 { margin: 0; font-size: 14px; font-weight: 600; }
figcaption { margin: 2px 0 4px; }
.plot { height: 290px; }
.tables { display: flex; flex-wrap: wrap; gap: 32px 48px; align-items: flex-start; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; margin: 12px 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 5px 20px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; color: var(--muted); font-size: 13px; }
th.n, td.n { text-align: right; white-space: nowrap; }
td code { white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
code, pre { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { overflow-x: auto; padding: 12px 16px; }
details { border-bottom: 1px solid var(--rule); }
summary { cursor: pointer; padding: 8px 0; font-variant-numeric: tabular-nums; }
summary:hover { color: var(--speculative); }
summary span { display: inline-block; min-width: 6em; padding-right: 1em; }
.sample { padding: 0 0 16px 18px; }
.sample h4 { margin: 10px 0 4px; font-size: 13px; font-weight: 600; color: var(--muted); }
.text { margin: 0; max-height: 420px; overflow-y: auto; font-size: 14px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.text i { font-style: normal; border-radius: 2px; }
.a { background: var(--accepted); } .c { background: var(--corrected); }
footer { margin-top: 64px; color: var(--muted); font-size: 13px; }
@media (max-width: 520px) { .figures { grid-template-columns: 1fr; } main { padding: 24px 14px; } }
@media print { h2 { break-after: avoid; } figure, tr { break-inside: avoid; } .text { max-height: none; } }
"""

SCRIPT = """
"use strict";
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const resolve = value => {                       // replaces colour names by the colours of the present scheme
  if (Array.isArray(value)) return value.map(resolve);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, inner]) =>
    [key, /color$/.test(key) && typeof inner === "string" && inner.startsWith("--") ? css(inner) : resolve(inner)]));
};
const axis = () => ({ gridcolor: css("--rule"), linecolor: css("--rule"), zeroline: false, automargin: true,
  title: { standoff: 8, font: { size: 12, color: css("--muted") } }, tickfont: { size: 11, color: css("--muted") } });
const nest = (layout, flat) => {                 // {"yaxis.title.text": "s"} into {yaxis: {title: {text: "s"}}}
  for (const [path, value] of Object.entries(flat)) {
    const keys = path.split("."), last = keys.pop();
    keys.reduce((inner, key) => inner[key] ??= {}, layout)[last] = value;
  }
  return layout;
};
const wholeSteps = (figure, div) => {            // no step 1.5 on the axis
  if (figure.layout["xaxis.title.text"] !== "step") return {};
  const xs = figure.data.flatMap(trace => trace.x), span = Math.max(...xs) - Math.min(...xs);
  return span <= 12 ? { "xaxis.dtick": 1, "xaxis.tickformat": "d" } : { "xaxis.tickformat": "d" };
};
const draw = div => {
  const figure = JSON.parse(document.getElementById(div.dataset.figure).textContent);
  const font = getComputedStyle(document.body).fontFamily;
  const layout = nest({ font: { family: font, size: 12, color: css("--text") }, paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 52, r: 12, t: 8, b: 40 }, bargap: 0.25, hovermode: "x unified",
    hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--rule"), font: { family: font, color: css("--text") } },
    showlegend: figure.data.length > 1,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 }, traceorder: "normal" },
    xaxis: { ...axis(), showgrid: false }, yaxis: axis() }, { ...wholeSteps(figure), ...figure.layout });
  Plotly.react(div, resolve(figure.data), layout, { displayModeBar: false, responsive: true });
};
const drawAll = () => document.querySelectorAll(".plot").forEach(draw);
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
"""


def text(value: object) -> str:
    """Any value as text that is safe inside an element or a quoted attribute."""
    return html.escape(str(value), quote=True)


def data_json(value: Any) -> str:
    """JSON that cannot close the script element it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")


def figure_html(name: str, title: str, drawn: dict[str, Any] | None, caption: str) -> str:
    """A drawn figure with its title and one explaining sentence; empty for None. `name` is unique on the page."""
    if drawn is None:
        return ""
    return (
        f"<figure><h3>{text(title)}</h3><figcaption>{text(caption)}</figcaption>"
        f'<div class="plot" data-figure="{text(name)}" role="img" aria-label="{text(title)}"></div>'
        f'<script type="application/json" id="{text(name)}">{data_json(drawn)}</script></figure>'
    )


def figures_html(figures: Iterable[str]) -> str | None:
    """Figures side by side where there is room; None when all are empty."""
    drawn = "".join(figures)
    return f'<div class="figures">{drawn}</div>' if drawn else None


def table_html(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    """A table of escaped cells; columns in `numeric` are set right-aligned."""
    right = set(numeric)

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="n">{text(value)}</{tag}>' if column in right else f"<{tag}>{text(value)}</{tag}>"
            for column, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def page_html(title: str, body: str) -> str:
    """The whole document around `body`."""
    plotly = get_plotlyjs().replace("</script", "<\\/script")
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in (plotly, SCRIPT))
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>{plotly}</script>\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
