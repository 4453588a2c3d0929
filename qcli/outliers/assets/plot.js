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

// 1, 2, 5 of each decade, or the decades alone where there are many; never powers as exponents.
function logAxis(title, values, more = {}) {
  const present = values.filter((value) => value > 0);
  const low = Math.floor(Math.log10(Math.min(...present, 1e9)));
  const high = Math.ceil(Math.log10(Math.max(...present, 1e-9)));
  const steps = high - low > 3 ? [1] : [1, 2, 5];
  const ticks = [];
  for (let decade = low; decade <= high; decade++) {
    for (const step of steps) ticks.push(step * 10 ** decade);
  }
  return axis(title, { type: "log", tickvals: ticks, ticktext: ticks.map(short), ...more });
}

const short = (value) => (value >= 1e4 ? compact(value) : number(value, 2));

function layerAxis(layers) {
  const few = Math.max(...layers) - Math.min(...layers) <= 12;
  return axis("layer", { tickformat: "d", zeroline: false, ...(few ? { dtick: 1 } : {}) });
}

function line(position, along, name) {
  const across = along === "x" ? { x0: 0, x1: 1, xref: "paper", y0: position, y1: position } : {};
  const upright = along === "y" ? { y0: 0, y1: 1, yref: "paper", x0: position, x1: position } : {};
  return { type: "line", ...across, ...upright, line: { color: colour("muted"), width: 1, dash: name } };
}

function layout(height, axes, more = {}) {
  return {
    height,
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("ink") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 52, r: 12, t: 16, b: 44 },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: colour("ink") } },
    hoverlabel: { bgcolor: colour("raised"), bordercolor: colour("line"), font: { color: colour("ink") }, align: "left" },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
    ...axes,
    ...more,
  };
}

const hover = "%{text}<extra></extra>";

function bars(values, names, texts, colours) {
  return {
    type: "bar", x: names, y: values, text: texts, textposition: "outside", cliponaxis: false, hovertemplate: "%{x}: %{text}<extra></extra>",
    marker: { color: colours },
  };
}

function lines(name, x, y, texts, paint, more = {}) {
  const mode = x.length > 60 ? "lines" : "lines+markers";
  return { type: "scatter", mode, name, x, y, text: texts, hovertemplate: hover, line: { color: paint, width: 2 }, marker: { size: 6 }, ...more };
}

function draw(id, build) {
  builders.set(id, build);
  const { traces, layout } = build();
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  Plotly.react(byId(id), traces, layout, config);
}

const redraw = () => builders.forEach((build, id) => draw(id, build));
dark.addEventListener("change", redraw);
narrow.addEventListener("change", redraw);
