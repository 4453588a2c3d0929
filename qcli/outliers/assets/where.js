// Charts of where outlier features are: layers and dimensions, how common, one layer, and their values.

// Below the threshold shades of grey, above it from orange to deep red.
function magnitudeScale(low, threshold, high) {
  const at = (threshold - low) / (high - low);
  return [
    [0, colour("below")],
    [at, colour("under")],
    [at, colour("above")],
    [at + (1 - at) * 0.6, colour("high")],
    [1, colour("top")],
  ];
}

function heatmap(report) {
  const chart = report.charts.heatmap;
  if (!chart) return hide("heatmap");
  const { layers, dims, absmax, share } = chart;
  const across = (rows) => dims.map((_, d) => rows.map((row) => row[d])); // a row of the picture is a dimension
  const texts = across(absmax).map((row, d) =>
    row.map(
      (value, l) =>
        `layer ${layers[l]}, dim ${dims[d]}<br>absmax ${number(value)}<br>at the threshold in ${percent(share[l][d])} of positions`,
    ),
  );
  const base = {
    type: "heatmap",
    x: layers,
    y: dims.map(String),
    text: texts,
    hovertemplate: hover,
    xgap: layers.length > 60 ? 0 : 1,
    ygap: dims.length > 40 ? 0 : 1,
  };
  const bar = (title, more) => ({ title: { text: title, side: "top" }, thickness: 12, outlinewidth: 0, ...more });
  const height = Math.min(720, 130 + Math.max(14 * dims.length, 90));
  const magnitudes = () => {
    const low = Math.log10(report.threshold / 20);
    const high = Math.log10(Math.max(...absmax.flat(), 1.1 * report.threshold));
    const ticks = [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000].filter(
      (tick) => tick >= 10 ** low && tick <= 10 ** high,
    );
    return {
      ...base,
      z: across(absmax).map((row) => row.map((value) => Math.max(Math.log10(value), low))),
      zmin: low,
      zmax: high,
      colorscale: magnitudeScale(low, Math.log10(report.threshold), high),
      colorbar: bar("absmax", { tickvals: ticks.map(Math.log10), ticktext: ticks.map(short) }),
    };
  };
  const shares = () => ({
    ...base,
    z: across(share).map((row) => row.map((value) => 100 * value)),
    zmin: 0,
    zmax: 100,
    colorscale: [
      [0, colour("below")],
      [0.001, colour("below")],
      [0.3, colour("above")],
      [0.7, colour("high")],
      [1, colour("top")],
    ],
    colorbar: bar("positions (%)", { tickvals: [0, 20, 40, 60, 80] }),
  });
  const show = (make) =>
    draw("heatmap-chart", () => ({
      traces: [make()],
      layout: layout(height, {
        xaxis: { ...layerAxis(layers), showgrid: false },
        yaxis: axis("dimension", { type: "category", autorange: "reversed", showgrid: false }),
      }),
    }));
  say(
    "heatmap-caption",
    `${chart.kind[0].toUpperCase()}${chart.kind.slice(1)} of every layer: the dimensions that reach ${report.threshold}, and ordinary ones to ` +
      "compare with. A stripe of colour through many layers is an outlier feature; grey stays below the threshold.",
  );
  choice(
    "heatmap-choices",
    "Colour",
    [
      ["absmax", "absmax"],
      ["share", "share of positions"],
    ],
    (value) => show(value === "share" ? shares : magnitudes),
  );
  show(magnitudes);
}

function features(report) {
  const shown = report.features.slice(0, 24);
  if (!shown.length) return hide("features");
  const names = shown.map((feature) => String(feature.dim));
  const opacity = shown.map((feature) => (feature.outlier ? 1 : 0.4));
  const describe = (feature) =>
    `dim ${feature.dim}${feature.outlier ? ", outlier feature" : ""}<br>${percent(feature.layers_share)} of layers<br>` +
    `${percent(feature.positions_share)} of positions in all layers<br>${percent(feature.positions_union)} of positions in any layer<br>` +
    `absmax ${number(feature.absmax)}${feature.one_sided ? ", one-sided" : ""}<br>quartiles ${quartiles(feature.quartiles)}`;
  const bar = (name, key, paint) => ({
    type: "bar",
    name,
    x: names,
    y: shown.map((feature) => 100 * feature[key]),
    text: shown.map(describe),
    textposition: "none",
    hovertemplate: hover,
    marker: { color: colour(paint), opacity },
  });
  draw("features-chart", () => ({
    traces: [bar("layers", "layers_share", "blue"), bar("positions", "positions_share", "orange")],
    layout: layout(
      320,
      {
        xaxis: axis("dimension, most common first", { type: "category", showgrid: false }),
        yaxis: axis("share (%)", { range: [0, 105] }),
      },
      {
        bargap: 0.3,
        shapes: [line(100 * report.min_layers, "x", "dash"), line(100 * report.min_positions, "x", "dot")],
      },
    ),
  }));
  say(
    "features-caption",
    `Dashed: ${percent(report.min_layers)} of layers; dotted: ${percent(report.min_positions)} of positions. A dimension that reaches both is an ` +
      "outlier feature by the paper's criteria; the others are pale. Positions are counted over all layers.",
  );
}

function surface(report) {
  const chart = report.charts.surface;
  if (!chart || !chart.values.length) return hide("surface");
  const { tokens, dims, values } = chart;
  const texts = values.map((row, t) =>
    row.map((value, d) => `token ${t}: ${plain(visible(tokens[t], 40))}<br>dim ${dims[d]}<br>value ${number(value)}`),
  );
  const magnitudes = values
    .flat()
    .map(Math.abs)
    .sort((a, b) => a - b);
  const end = magnitudes[Math.floor(0.998 * (magnitudes.length - 1))] || 1; // one massive activation would pale all others
  const every = 2 ** Math.ceil(Math.log2(Math.max(1, dims.length / 12)));
  const ticks = dims.map((_, d) => d).filter((d) => d % every === 0);
  const dimensions = { tickvals: ticks, ticktext: ticks.map((d) => String(dims[d])) };
  const rows = (escape, most) => {
    const every = Math.ceil(tokens.length / most);
    const shown = tokens.map((_, t) => t).filter((t) => t % every === 0);
    return { tickvals: shown, ticktext: shown.map((t) => escape(visible(tokens[t], narrow.matches ? 9 : 16))) };
  };
  // The surface's labels are drawn without entities, so brackets that cannot be taken for a tag stand in.
  const unlike = (text) => text.replaceAll("<", "\u2039").replaceAll(">", "\u203a");
  byId("surface-title").textContent = `Tokens and channels: ${chart.kind} of layer ${chart.layer}`;
  const flat = () => ({
    traces: [
      {
        type: "heatmap",
        z: values,
        text: texts,
        hovertemplate: hover,
        zmin: -end,
        zmax: end,
        colorscale: [
          [0, colour("blue")],
          [0.5, colour("paper")],
          [1, colour("high")],
        ],
        colorbar: { title: { text: "value", side: "top" }, thickness: 12, outlinewidth: 0 },
      },
    ],
    layout: layout(Math.max(280, 17 * tokens.length + 90), {
      xaxis: axis("dimension", { ...dimensions, showgrid: false, zeroline: false }),
      yaxis: axis("token", { ...rows(plain, tokens.length), autorange: "reversed", showgrid: false, zeroline: false }),
    }),
  });
  const standing = () => ({
    traces: [
      {
        type: "surface",
        z: values.map((row) => row.map(Math.abs)),
        text: texts,
        hoverinfo: "text",
        showscale: false,
        contours: { x: { highlight: false }, y: { highlight: false }, z: { highlight: false } },
        colorscale: [
          [0, colour("below")],
          [0.15, colour("above")],
          [0.5, colour("high")],
          [1, colour(dark.matches ? "top" : "red")],
        ],
      },
    ],
    layout: layout(
      narrow.matches ? 360 : 520,
      {
        scene: {
          xaxis: axis("dimension", dimensions),
          yaxis: axis("token", { ...rows(unlike, narrow.matches ? 6 : 18), tickfont: { size: 9 } }),
          zaxis: axis("magnitude"),
          aspectmode: "manual",
          aspectratio: narrow.matches ? { x: 1.1, y: 1, z: 0.6 } : { x: 2, y: 1.2, z: 0.8 },
          camera: {
            eye: narrow.matches ? { x: 0.95, y: -2.4, z: 1.1 } : { x: 0.7, y: -1.9, z: 0.9 },
            center: { x: 0, y: 0, z: -0.15 },
          },
        },
      },
      { dragmode: "turntable", margin: { l: 0, r: 0, t: 0, b: 0 } },
    ),
  });
  const show = (make) => draw("surface-chart", make);
  choice(
    "surface-choices",
    "As",
    [
      ["heatmap", "heatmap"],
      ["surface", "surface"],
    ],
    (value) => show(value === "surface" ? standing : flat),
  );
  show(flat);
}

// Neighbouring bins joined until each is at least so wide: finer ones would blur into each other.
function coarser(histogram, width) {
  const edges = [histogram.edges[0]];
  const counts = [];
  let waiting = 0;
  histogram.counts.forEach((many, k) => {
    const end = histogram.edges[k + 1];
    waiting += many;
    if (end - edges.at(-1) < width && k + 1 < histogram.counts.length) return;
    edges.push(end);
    counts.push(waiting);
    waiting = 0;
  });
  return { edges, counts };
}

function histograms(report) {
  const shown = report.charts.histograms ?? [];
  if (!shown.length) return hide("histograms");
  shown.forEach((histogram, i) => {
    const id = `histogram-${i}`;
    const holder = element("div", undefined, "chart");
    holder.id = id;
    byId("histogram-charts").append(holder);
    const filled = histogram.counts.map((_, k) => k).filter((k) => histogram.counts[k] > 0);
    const room = 1.3 * report.threshold; // both thresholds stay in view
    const ends = filled.length ? [histogram.edges[filled[0]], histogram.edges[filled.at(-1) + 1]] : [0, 0];
    const range = [Math.min(ends[0], -room), Math.max(ends[1], room)];
    const { edges, counts } = coarser(histogram, (range[1] - range[0]) / 60);
    const centres = counts.map((_, k) => (edges[k] + edges[k + 1]) / 2);
    const inside = (value) => value >= range[0] && value <= range[1];
    draw(id, () => ({
      traces: [
        {
          type: "bar",
          x: centres,
          y: counts.map((many, k) => many / (edges[k + 1] - edges[k])), // bins need not be equally wide
          width: counts.map((_, k) => edges[k + 1] - edges[k]),
          marker: { color: colour("blue"), opacity: 0.6 },
          hovertemplate: hover,
          text: counts.map((many, k) => `${number(edges[k])} to ${number(edges[k + 1])}<br>${count(many)} values`),
          textposition: "none",
        },
      ],
      layout: layout(
        240,
        { xaxis: axis("value", { range }), yaxis: axis("values per unit") },
        {
          title: { text: `dim ${histogram.dim}, layer ${histogram.layer}`, font: { size: 13 }, x: 0.02, y: 0.97 },
          margin: { l: 52, r: 12, t: 34, b: 44 },
          bargap: 0,
          shapes: [
            ...[-report.threshold, report.threshold].filter(inside).map((value) => line(value, "y", "dash")),
            ...(histogram.quartiles ?? []).filter(inside).map((value) => line(value, "y", "dot")),
          ],
        },
      ),
    }));
  });
}
