// Puts the report into the page, section by section. What was not measured is left out, or a sentence says so.

function head(report) {
  const { model, text } = report;
  document.title = `Outliers of ${model.name}`;
  byId("model-name").textContent = `Outlier features of ${model.name}`;
  byId("model-facts").textContent = [
    model.architecture,
    `${count(model.layers)} layers of ${count(model.hidden_size)} dimensions`,
    ...(model.parameters === null ? [] : [`${compact(model.parameters)} parameters`]),
    model.quantization ? `quantized: ${model.quantization}` : "not quantized",
    model.dtype,
  ].join(" \u00b7 ");
  byId("text-facts").textContent = [
    text.name,
    `${count(text.sequences)} sequences of ${count(text.sequence_length)} tokens`,
    `${count(text.tokens)} positions measured`,
    text.bos ? "first token of each sequence apart" : "no start token",
    `threshold ${number(report.threshold)}`,
  ].join(" \u00b7 ");
}

function verdict(report) {
  const found = report.recommendation;
  const holder = byId("recommendation");
  if (!found) {
    holder.append(element("p", "No recommendation: these measurements do not decide between methods."));
  } else {
    const command = element("code", found.command);
    const box = element("div", undefined, "command");
    box.append(command, copyButton(command));
    const why = element("ul", undefined, "why");
    why.append(...found.why.map((sentence) => element("li", sentence)));
    const threshold =
      found.threshold === null || found.threshold === undefined ? "" : ` with threshold ${number(found.threshold)}`;
    holder.append(element("p", `Recommended: ${found.method}${threshold}.`), box, why);
    if (found.skip?.length) holder.append(element("p", `Kept in 16 bits: ${some(found.skip, 8)}.`));
  }
  const own = report.table4;
  const sites = report.layers.flatMap((layer) => layer.sites.map((site) => ({ ...site, layer: layer.layer })));
  const top = (key) => sites.reduce((best, site) => ((site[key] ?? -1) > (best?.[key] ?? -1) ? site : best), null);
  const at = (site) => (site ? `${site.kind}, layer ${site.layer}` : "");
  const [tailed, greatest, crested] = ["kurtosis", "absmax", "crest"].map(top);
  for (const [name, value, more] of [
    ["outlier features", count(own.outliers), own.outliers ? `${own.one_sided} one-sided` : "none meets the criteria"],
    ["layers, most common one", percent(own.layers_share), ""],
    [
      "positions, most common one",
      percent(own.positions_share),
      own.positions_union === null ? "" : `${percent(own.positions_union)} in any layer`,
    ],
    ["greatest value", number(greatest?.absmax), at(greatest)],
    ["highest kurtosis", number(tailed?.kurtosis), at(tailed)],
    ["highest absmax / RMS", number(crested?.crest), at(crested)],
  ]) {
    const tile = element("div");
    const description = element("dd", value);
    if (more) description.append(element("small", more));
    tile.append(element("dt", name), description);
    byId("figures").append(tile);
  }
}

function sitesTable(report) {
  const rows = report.layers.flatMap((layer) => layer.sites.map((site) => ({ ...site, layer: layer.layer })));
  const decibels = (name) => ({
    name,
    value: (row) => row.sqnr?.[name]?.ordinary,
    text: (row) => (row.sqnr?.[name] ? `${fixed(row.sqnr[name].output)} / ${fixed(row.sqnr[name].ordinary)}` : missing),
  });
  const numeric = (name, key) => ({ name, value: (row) => row[key], text: (row) => number(row[key]) });
  const modules = (row) =>
    some(
      row.modules.map((module) => module.split(".").at(-1)),
      4,
    );
  const topDims = (row) =>
    row.dims
      .slice(0, 3)
      .map((dim) => `${dim.dim} (${number(dim.absmax)}, ${percent(dim.share)})`)
      .join(", ");
  table(
    "sites-table",
    [
      numeric("layer", "layer"),
      { name: "site", left: true, value: (row) => row.kind, text: (row) => row.kind },
      { name: "read by", left: true, value: modules, text: modules, title: (row) => row.modules.join(", ") },
      {
        name: "outlier columns",
        value: (row) => row.outlier_columns,
        text: (row) => `${count(row.outlier_columns)} of ${count(row.channels)}`,
      },
      {
        name: "dims (absmax, positions)",
        left: true,
        value: (row) => row.dims.length,
        text: (row) => topDims(row) + (row.dims.length > 3 ? ", \u2026" : ""),
        title: (row) => row.dims.map((dim) => dim.dim).join(", "),
      },
      numeric("absmax", "absmax"),
      numeric("absmax / RMS", "crest"),
      numeric("kurtosis", "kurtosis"),
      numeric("channel ratio", "channel_ratio"),
      numeric("token ratio", "token_ratio"),
      ...METHODS.filter(([name]) => rows.some((row) => row.sqnr?.[name])).map(([name]) => decibels(name)),
    ],
    rows,
    { sortable: true },
  );
  byId("sites").open = rows.length <= 32;
}

function where(report) {
  heatmap(report);
  features(report);
  surface(report);
  histograms(report);
  if (report.features.length) return;
  say("where-none", `No dimension of the hidden states reaches ${number(report.threshold)} anywhere in this text.`);
}

function effect(report) {
  ablation(report);
  attention(report);
  if (report.ablation || report.attention) return;
  if (!report.table4.outliers) return say("effect-none", "There is no outlier feature that could be set to zero.");
  say(
    "effect-none",
    "Not measured in this run: --ablate sets the outlier dims to zero, and as many random ones, and compares attention and perplexity.",
  );
}

function large(report) {
  residual(report);
  const found = report.massive_activations;
  if (found.length) {
    table(
      "massive",
      [
        { name: "layer", text: (row) => count(row.layer) },
        { name: "position", text: (row) => count(row.position) },
        { name: "token", left: true, text: (row) => visible(row.token) },
        { name: "dim", text: (row) => count(row.dim) },
        { name: "value", text: (row) => number(row.value, 4) },
        { name: "median magnitude", text: (row) => number(row.median) },
        { name: "in sequences", text: (row) => count(row.sequences) },
      ],
      found,
    );
  } else
    byId("massive").append(
      element("p", "None: no value of the residual stream is both above 100 and a thousand times its median."),
    );
  if (report.super_weights.length) {
    table(
      "super-weights",
      [
        { name: "layer", text: (row) => count(row.layer) },
        { name: "module", left: true, text: (row) => row.module },
        { name: "row", text: (row) => count(row.row) },
        { name: "column", text: (row) => count(row.column) },
        { name: "weight", text: (row) => number(row.weight) },
        { name: "input", text: (row) => number(row.input, 4) },
        { name: "output", text: (row) => number(row.output, 4) },
      ],
      report.super_weights,
    );
  } else
    byId("super-weights").append(
      element("p", "None: no single weight of a down projection makes a spike at its output."),
    );
  const bos = report.bos;
  if (!bos) return hide("bos");
  say(
    "bos",
    `The first token of each sequence (${count(bos.positions)} positions) is left out of all statistics above. Its greatest value is ${number(bos.absmax)}` +
      (bos.outlier_dims.length
        ? `; at or above the threshold ${bos.outlier_dims.length === 1 ? "is dim" : "are dims"} ${some(bos.outlier_dims, 16)}.`
        : "; no dimension reaches the threshold."),
  );
}

function notes(report) {
  const sentences = [...report.notes];
  if (report.coverage?.experts) sentences.unshift(report.coverage.experts);
  sentences.push(
    `A value counts from ${number(report.threshold)} in magnitude; an outlier feature is there in ${percent(report.min_layers)} of layers and ` +
      `${percent(report.min_positions)} of positions. Made by qcli ${report.qcli}.`,
  );
  byId("notes-list").append(...sentences.map((sentence) => element("li", sentence)));
}

function contents() {
  for (const section of document.querySelectorAll("section")) {
    const link = element("a", section.dataset.name);
    link.href = `#${section.id}`;
    byId("contents").append(link);
  }
}

const report = JSON.parse(byId("report").textContent);
for (const part of [head, verdict, paper, where, spread, noise, sitesTable, effect, large, notes]) part(report);
simulationView();
contents();
