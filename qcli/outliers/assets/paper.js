// This model beside the paper's ten: table 4 and the emergence curve.

function paper(report) {
  const own = { ...report.table4, model: report.model.name, parameters: compact(report.model.parameters), own: true };
  const rows = [...own.papers_rows];
  const place = own.perplexity === null ? 0 : rows.findIndex((row) => row.perplexity < own.perplexity);
  rows.splice(place < 0 ? rows.length : place, 0, own);
  table(
    "paper-table",
    [
      { name: "model", left: true, text: (row) => row.model },
      { name: "parameters", text: (row) => row.parameters },
      { name: "perplexity", text: (row) => perplexityText(row.perplexity) },
      { name: "outliers", text: (row) => count(row.outliers) },
      { name: "one-sided", text: (row) => count(row.one_sided) },
      { name: "layers", text: (row) => percent(row.layers_share) },
      { name: "positions", text: (row) => percent(row.positions_share) },
      { name: "in any layer", text: (row) => percent(row.positions_union) },
      { name: "quartiles", text: (row) => quartiles(row.quartiles) },
      { name: "top-1 with", text: (row) => percent(row.top1_with) },
      { name: "top-1 without", text: (row) => percent(row.top1_without) },
    ],
    rows,
    { marked: (row) => row.own },
  );
  emergence(report);
}

function emergence(report) {
  const own = report.table4;
  const byPerplexity = {
    title: "perplexity (log, lower to the right)",
    of: (row) => row.perplexity,
    own: own.perplexity,
  };
  const bySize = { title: "parameters (log)", of: (row) => parameters(row.parameters), own: report.model.parameters };
  const show = (by) =>
    draw("emergence-chart", () => {
      const rows = own.papers_rows.filter((row) => by.of(row) !== null).sort((a, b) => by.of(a) - by.of(b));
      const describe = (row, share, what) =>
        `${plain(row.model)}, ${row.parameters}<br>perplexity ${perplexityText(row.perplexity)}<br>${percent(share)} of ${what}`;
      const series = [
        ["layers", "layers_share", "blue", 18],
        ["positions", "positions_share", "orange", 12],
      ];
      const traces = series.map(([what, key, paint]) =>
        lines(
          `${what}, paper`,
          rows.map(by.of),
          rows.map((row) => 100 * row[key]),
          rows.map((row) => describe(row, row[key], what)),
          colour(paint),
        ),
      );
      if (by.own !== null) {
        for (const [what, key, paint, size] of series) {
          const text = `${plain(report.model.name)}<br>perplexity ${perplexityText(own.perplexity)}<br>${percent(own[key])} of ${what}`;
          traces.push({
            type: "scatter",
            mode: "markers",
            name: `${what}, this model`,
            x: [by.own],
            y: [100 * own[key]],
            text: [text],
            hovertemplate: hover,
            marker: { symbol: "star", size, color: colour(paint), line: { color: colour("ink"), width: 1 } },
          });
        }
      }
      const across = [...rows.map(by.of), by.own ?? rows.map(by.of)[0]];
      const reversed = by === byPerplexity ? { autorange: "reversed" } : {};
      return {
        traces,
        layout: layout(380, {
          xaxis: logAxis(by.title, across, reversed),
          yaxis: axis("share (%)", { range: [-4, 108] }),
        }),
      };
    });
  const choices = [
    ["perplexity", "perplexity"],
    ["size", "size"],
  ];
  if (byPerplexity.own === null) choices.reverse();
  choice("emergence-choices", "Against", choices, (value) => show(value === "size" ? bySize : byPerplexity));
  show(byPerplexity.own === null ? bySize : byPerplexity);
}
