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
