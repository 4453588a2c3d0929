// Charts that run over the layers, and what an ablation does.

// int8-row-wise is drawn as a band: int8, which differs only in the scales of the weights, often coincides with it.
const METHODS = [
  ["int8-per-tensor", "brown", "x"],
  ["int8-row-wise", "orange", "triangle-up"],
  ["int8", "red", "square"],
  ["llm-int8", "blue", "circle"],
  ["nf4", "green", "diamond"],
];
const KINDS = [
  ["attention input", "blue"],
  ["attention output", "purple"],
  ["ffn input", "orange"],
  ["ffn output", "green"],
  ["other", "grey"],
];

const layerNumbers = (report) => report.layers.map((layer) => layer.layer);

function kindsOf(report) {
  const present = new Set(report.layers.flatMap((layer) => layer.sites.map((site) => site.kind)));
  return KINDS.filter(([kind]) => present.has(kind));
}

// One number a layer: the worst of the sites of a kind, where a layer has several (experts); null where it has none.
function worst(report, kind, value, take) {
  return report.layers.map((layer) => {
    const values = layer.sites
      .filter((site) => site.kind === kind)
      .map(value)
      .filter((found) => found !== null && found !== undefined);
    return values.length ? take(...values) : null;
  });
}

function overLayers(report, id, title, series, height = 340, shapes = []) {
  const layers = layerNumbers(report);
  draw(id, () => ({
    traces: series.map(([name, values, paint, more]) =>
      lines(
        name,
        layers,
        values,
        layers.map((layer, i) => `layer ${layer}, ${name}<br>${title} ${number(values[i])}`),
        colour(paint),
        more,
      ),
    ),
    layout: layout(
      height,
      {
        xaxis: layerAxis(layers),
        yaxis: logAxis(
          `${title} (log)`,
          series.flatMap(([, values]) => values),
        ),
      },
      { shapes: shapes.map((value) => line(value, "x", "dash")) },
    ),
  }));
}

function spread(report) {
  const sites = (value) => kindsOf(report).map(([kind, paint]) => [kind, worst(report, kind, value, Math.max), paint]);
  const residual = report.layers.map((layer) => layer.residual);
  const stream = (value) => [
    "residual stream",
    residual.map((one) => (one ? value(one) : null)),
    "ink",
    { line: { dash: "dot", width: 2, color: colour("ink") } },
  ];
  overLayers(
    report,
    "kurtosis-chart",
    "kurtosis",
    [...sites((site) => site.kurtosis), stream((one) => one.kurtosis)],
    340,
    [3],
  );
  overLayers(report, "crest-chart", "absmax / RMS", [
    ...sites((site) => site.crest),
    stream((one) => (one.rms ? one.absmax / one.rms : null)),
  ]);
}

function noise(report) {
  const measured = report.layers.flatMap((layer) => layer.sites).filter((site) => site.sqnr);
  if (!measured.length) return hide("sqnr");
  const kinds = kindsOf(report)
    .map(([kind]) => kind)
    .filter((kind) => measured.some((site) => site.kind === kind));
  let kind = kinds[0];
  let part = "ordinary";
  const layers = layerNumbers(report);
  const show = () =>
    draw("sqnr-chart", () => ({
      traces: METHODS.filter(([name]) => measured.some((site) => site.sqnr[name])).map(([name, paint, symbol]) => {
        const values = worst(report, kind, (site) => site.sqnr?.[name]?.[part], Math.min);
        const texts = layers.map((layer, i) => `layer ${layer}, ${name}<br>${fixed(values[i])} dB`);
        const wide = name === "int8-row-wise" ? { line: { width: 6, color: colour(paint) }, opacity: 0.6 } : {};
        return lines(name, layers, values, texts, colour(paint), { marker: { symbol, size: 7 }, ...wide });
      }),
      layout: layout(380, { xaxis: layerAxis(layers), yaxis: axis("SQNR at the output (dB)") }),
    }));
  choice(
    "sqnr-choices",
    "Noise of",
    [
      ["ordinary", "ordinary channels"],
      ["output", "the whole output"],
    ],
    (value) => {
      part = value;
      show();
    },
  );
  if (kinds.length > 1)
    choice(
      "sqnr-choices",
      "Site",
      kinds.map((one) => [one, one]),
      (value) => {
        kind = value;
        show();
      },
    );
  show();
}

function residual(report) {
  const found = report.layers.map((layer) => layer.residual);
  const of = (key) => found.map((one) => one?.[key] ?? null);
  overLayers(
    report,
    "residual-chart",
    "magnitude",
    [
      ["absmax", of("absmax"), "red"],
      ["RMS", of("rms"), "orange"],
      ["median", of("median"), "blue"],
    ],
    320,
  );
}

const hundred = (share) => (share === null ? null : 100 * share);

function ablation(report) {
  const found = report.ablation;
  if (!found) return hide("ablation");
  const names = ["as it is", "without<br>outlier dims", "without<br>random dims"];
  const paints = () => [colour("grey"), colour("red"), colour("blue")];
  const compare = (id, title, values, text) => {
    if (values.every((value) => value === null || value === undefined)) return hide(id);
    draw(`${id}-chart`, () => ({
      traces: [bars(values, names, values.map(text), paints())],
      layout: layout(
        320,
        {
          xaxis: axis("", { type: "category", showgrid: false }),
          yaxis: axis(title, { range: [0, 1.15 * Math.max(...values)] }),
        },
        { bargap: 0.5 },
      ),
    }));
  };
  const { top1, perplexity } = found;
  if (top1)
    compare(
      "ablation-top1",
      "mean top-1 probability (%)",
      [top1.with, top1.without, top1.random].map(hundred),
      (value) => `${fixed(value)}%`,
    );
  else hide("ablation-top1");
  if (perplexity)
    compare("ablation-perplexity", "perplexity", [perplexity.whole, perplexity.without, perplexity.random], (value) =>
      perplexityText(value),
    );
  else hide("ablation-perplexity");
  const zeroed = `Set to zero: ${found.dims.length === 1 ? "dim" : "dims"} ${found.dims.join(", ")}; as a control the random ${found.random_dims.join(", ")}.`;
  const effect =
    perplexity &&
    ` Perplexity goes from ${perplexityText(perplexity.whole)} to ${perplexityText(perplexity.without)} without the outlier dims, and to ` +
      `${perplexityText(perplexity.random)} without as many random ones.`;
  say("ablation-text", zeroed + (effect ?? ""));
}

function attention(report) {
  const found = report.attention;
  if (!found || !found.layers.length) return hide("attention");
  const layers = found.layers.map((layer) => layer.layer);
  const series = [
    ["as it is", "top1_with", "grey"],
    ["without the outlier dims", "top1_without", "red"],
    ["without random dims", "top1_random", "blue"],
  ];
  const measured = series.filter(([, key]) => found.layers.some((layer) => (layer[key] ?? null) !== null));
  draw("attention-chart", () => ({
    traces: measured.map(([name, key, paint]) => {
      const values = found.layers.map((layer) => hundred(layer[key] ?? null));
      return lines(
        name,
        layers,
        values,
        layers.map((layer, i) => `layer ${layer}, ${name}<br>${fixed(values[i])}%`),
        colour(paint),
      );
    }),
    layout: layout(320, {
      xaxis: layerAxis(layers),
      yaxis: axis("mean top-1 probability (%)", { rangemode: "tozero" }),
    }),
  }));
  const sink = found.sink_share ?? null;
  say(
    "attention-caption",
    "Mean greatest attention probability of each layer." +
      (sink === null
        ? ""
        : ` ${percent(sink)} of the heads are attention sinks: they give the first token more than 30% of their attention on average.`),
  );
}
