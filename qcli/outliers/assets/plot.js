// How every chart is drawn: colours from the style sheet, again when light and dark change.

const narrow = matchMedia("(max-width: 640px)");
const dark = matchMedia("(prefers-color-scheme: dark)");
const builders = new Map(); // id of a chart -> function that makes its traces and layout

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function axis(title, more = {}) {
  return {
    title: { text: title, standoff: 8, font: { size: 12 } },
    color: colour("muted"),
    gridcolor: colour("line"),
    linecolor: colour("line"),
    zerolinecolor: colour("line"),
    automargin: true,
    ...more,
  };
}

// Ticks as plain numbers, as many in a decade as the range has room for.
function logAxis(title, values, more = {}) {
  const present = values.filter((value) => value > 0);
  const low = Math.floor(Math.log10(Math.min(...present, 1e9)));
  const high = Math.ceil(Math.log10(Math.max(...present, 1e-9)));
  const decades = Math.log10(Math.max(...present) / Math.min(...present));
  const steps = decades > 3 ? [1] : decades > 0.8 ? [1, 2, 5] : [1, 1.5, 2, 2.5, 3, 4, 5, 6, 8];
  const ticks = [];
  for (let decade = low; decade <= high; decade++) {
    for (const step of steps) ticks.push(step * 10 ** decade);
  }
  return axis(title, { type: "log", tickvals: ticks, ticktext: ticks.map(short), ...more });
}

const short = (value) => (value >= 1e4 ? compact(value) : number(value, 2));

function layerAxis(layers) {
  const few = Math.max(...layers) - Math.min(...layers) <= 12;
  const range = [Math.min(...layers) - 0.5, Math.max(...layers) + 0.5];
  return axis("layer", { tickformat: "d", zeroline: false, range, ...(few ? { dtick: 1 } : {}) });
}

function line(position, along, dash) {
  const across = along === "x" ? { x0: 0, x1: 1, xref: "paper", y0: position, y1: position } : {};
  const upright = along === "y" ? { y0: 0, y1: 1, yref: "paper", x0: position, x1: position } : {};
  return { type: "line", ...across, ...upright, line: { color: colour("ink"), width: 1, dash } };
}

function layout(height, axes, more = {}) {
  return {
    height,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("ink") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 52, r: 12, t: 16, b: 44 },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: colour("ink") } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("muted"), activecolor: colour("accent") },
    hoverlabel: {
      bgcolor: colour("raised"),
      bordercolor: colour("line"),
      font: { color: colour("ink") },
      align: "left",
    },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
    ...axes,
    ...more,
  };
}

const hover = "%{text}<extra></extra>";

function bars(values, names, texts, colours) {
  return {
    type: "bar",
    x: names,
    y: values,
    text: texts,
    textposition: "outside",
    cliponaxis: false,
    hovertemplate: "%{x}: %{text}<extra></extra>",
    marker: { color: colours },
  };
}

function lines(name, x, y, texts, paint, more = {}) {
  const mode = x.length > 60 ? "lines" : "lines+markers";
  return {
    type: "scatter",
    mode,
    name,
    x,
    y,
    text: texts,
    hovertemplate: hover,
    line: { color: paint, width: 2 },
    marker: { size: 6 },
    ...more,
  };
}

// A chart is drawn at once when a reader changes it. Those of the opening wait until the text stands, then come one by one.
function draw(id, build) {
  builders.set(id, build);
  if (opened) render(id);
}

function render(id) {
  const { traces, layout } = builders.get(id)();
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };
  Plotly.react(byId(id), traces, layout, config);
}

let opened = false;

function drawAll(ids = [...builders.keys()]) {
  opened = true;
  if (!ids.length) return;
  render(ids[0]);
  setTimeout(drawAll, 0, ids.slice(1));
}

addEventListener("DOMContentLoaded", () => drawAll()); // plotly stands after this script, so that text does not wait for it
const redraw = () => builders.forEach((_, id) => render(id));
dark.addEventListener("change", redraw);
narrow.addEventListener("change", redraw);
