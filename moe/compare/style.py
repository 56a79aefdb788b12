"""The page's style sheet and its one script: light and dark, no network, figures drawn in the theme's colours."""

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1c1b19; --muted: #67635b; --rule: #e4e0d7; --grid: #eeebe4;
  --accent: #0b6b63;
  --s0: #0b7a70; --s1: #c2490b; --s2: #5b3fc4; --s3: #4f7a06; --s4: #b81f5c; --s5: #53606d;
  --s0-soft: rgba(11,122,112,.16); --s1-soft: rgba(194,73,11,.15); --s2-soft: rgba(91,63,196,.14);
  --s3-soft: rgba(79,122,6,.15); --s4-soft: rgba(184,31,92,.14); --s5-soft: rgba(83,96,109,.15);
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #131416; --card: #1a1c1f; --ink: #ecebe7; --muted: #a09d95; --rule: #303337; --grid: #282b2f;
    --accent: #56d3c4;
    --s0: #4fd1c1; --s1: #ff9a5c; --s2: #ab9bff; --s3: #b2d75c; --s4: #ff86b3; --s5: #b3bdc7;
    --s0-soft: rgba(79,209,193,.18); --s1-soft: rgba(255,154,92,.16); --s2-soft: rgba(171,155,255,.17);
    --s3-soft: rgba(178,215,92,.15); --s4-soft: rgba(255,134,179,.16); --s5-soft: rgba(179,189,199,.15);
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 ui-sans-serif, system-ui, -apple-system, "Segoe UI", "Inter", "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
main { max-width: 1240px; margin: 0 auto; padding: 56px 32px 72px; }
.eyebrow { margin: 0 0 14px; color: var(--accent); font-size: 13px; font-weight: 600; letter-spacing: .02em; }
h1 { max-width: 34ch; margin: 0 0 18px; font-size: clamp(26px, 3.6vw, 40px); line-height: 1.16; font-weight: 640;
  letter-spacing: -.018em; text-wrap: balance; }
.lede { max-width: 70ch; margin: 0; color: var(--muted); font-size: 17px; }
section { margin-top: 52px; }
h2 { margin: 0 0 4px; font-size: 20px; font-weight: 640; letter-spacing: -.01em; }
h3 { margin: 0; font-size: 15px; font-weight: 620; }
.hint { max-width: 78ch; margin: 0 0 18px; color: var(--muted); font-size: 14px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.ratios { padding: 22px 26px 18px; }
.ratio { display: grid; grid-template-columns: 150px 1fr 190px; align-items: center; gap: 20px; padding: 9px 0; }
.ratio .against { display: block; color: var(--muted); font-size: 13px; }
.ratio .value { text-align: right; font-size: 24px; font-weight: 640; letter-spacing: -.01em; line-height: 1.2; }
.ratio .value small { display: block; color: var(--muted); font-size: 13px; font-weight: 400; letter-spacing: 0; }
.track { position: relative; height: 34px; }
.track i { position: absolute; display: block; }
.track .one { top: -9px; bottom: -9px; width: 0; border-left: 1px dashed var(--muted); }
.track .reach { top: 13px; height: 8px; border-radius: 4px; background: var(--s0-soft); border: 1px solid var(--s0); }
.track .fades-high { border-right: 0; border-radius: 4px 0 0 4px; mask: linear-gradient(90deg, #000 40%, transparent); }
.track .fades-low { border-left: 0; border-radius: 0 4px 4px 0; mask: linear-gradient(270deg, #000 40%, transparent); }
.track .fades-low.fades-high { mask: linear-gradient(90deg, transparent, #000 30% 70%, transparent); }
.track .dot { top: 9px; width: 16px; height: 16px; margin-left: -8px; border-radius: 50%; background: var(--s0);
  border: 3px solid var(--card); }
.ends { display: grid; grid-template-columns: 150px 1fr 190px; gap: 20px; color: var(--muted); font-size: 13px; }
.ends div { display: grid; grid-template-columns: 1fr auto 1fr; gap: 12px; }
.ends div :last-child { text-align: right; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 350px), 1fr)); gap: 18px; }
.chart { margin: 0; padding: 16px 12px 6px; }
.chart figcaption { padding: 0 8px; font-size: 15px; font-weight: 620; }
.plot { height: 340px; }
.bar { display: flex; flex-wrap: wrap; align-items: center; justify-content: space-between; gap: 12px 24px;
  margin-bottom: 14px; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 22px; margin: 0; padding: 0; list-style: none; font-size: 14px; }
.legend svg { margin-right: 8px; vertical-align: -1px; }
fieldset { display: flex; gap: 2px; margin: 0; padding: 3px; border: 1px solid var(--rule); border-radius: 8px; }
fieldset label { position: relative; padding: 2px 12px; border-radius: 5px; font-size: 14px; cursor: pointer; }
fieldset input { position: absolute; opacity: 0; }
fieldset label:has(:checked) { background: var(--ink); color: var(--paper); }
fieldset label:has(:focus-visible) { outline: 2px solid var(--accent); outline-offset: 2px; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 14px; overflow-wrap: normal; }
th, td { padding: 11px 16px; border-top: 1px solid var(--rule); text-align: right; white-space: nowrap; }
thead th { border-top: 0; color: var(--muted); font-weight: 500; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
tbody th { max-width: 24ch; font-weight: 620; white-space: normal; overflow-wrap: anywhere; }
td small { display: block; color: var(--muted); font-size: 12px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 18px; }
.facts article { padding: 18px 22px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 18px; margin: 12px 0 0; font-size: 14px; }
dt { color: var(--muted); }
dd { margin: 0; text-align: right; }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.notes + h3 { margin-bottom: 6px; }
.hint + .hint { margin-top: -10px; }
.notes { max-width: 84ch; margin: 14px 0 26px; padding-left: 20px; }
.notes li { margin-bottom: 7px; }
summary { cursor: pointer; font-weight: 620; }
details pre { max-height: 420px; overflow: auto; padding: 16px; }
footer { margin-top: 56px; padding-top: 18px; border-top: 1px solid var(--rule); color: var(--muted); font-size: 13px; }
a:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
@media (max-width: 720px) {
  main { padding: 32px 18px 48px; }
  .ratio, .ends { grid-template-columns: 1fr; gap: 6px; }
  .ratio .value { text-align: left; }
}
@media print { .bar fieldset, details { display: none; } .card { break-inside: avoid; } }
"""

SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const themed = (value, key) => {
  if (Array.isArray(value)) return value.map(part => themed(part, key));
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, themed(part, name)]));
  const variable = /color$/.test(key) && typeof value === "string" && value.match(/^var\\((--[a-z0-9-]+)\\)$/);
  return variable ? css(variable[1]) : value;
};
const draw = () => {
  const log = document.querySelector("input[name=scale]:checked").value === "log";
  const axis = { gridcolor: css("--grid"), linecolor: css("--rule"), zeroline: false, automargin: true,
    tickfont: { size: 12 }, title: { font: { size: 13 }, standoff: 10 } };
  for (const figure of figures) {
    const layout = themed(figure.layout, "");
    const merge = own => ({ ...axis, ...own, title: { ...axis.title, ...own.title } });
    Plotly.react(figure.axis + "-plot", themed(figure.data, ""), {
      ...layout,
      xaxis: { ...merge(layout.xaxis), type: log ? "log" : "linear" }, yaxis: merge(layout.yaxis),
      font: { family: getComputedStyle(document.body).fontFamily, color: css("--muted"), size: 13 },
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--rule"), font: { color: css("--ink") } },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 56, r: 16, t: 12, b: 48 }, showlegend: false, hovermode: "closest",
    }, { displayModeBar: false, responsive: true });
  }
};
dark.addEventListener("change", draw);
for (const input of document.querySelectorAll("input[name=scale]")) input.addEventListener("change", draw);
draw();
"""
