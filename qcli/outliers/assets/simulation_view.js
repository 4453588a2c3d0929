// The sliders, charts and numbers of the simulation.

function simulationView() {
  const sliders = ["magnitude", "columns", "share"];
  const units = { magnitude: "", columns: "", share: "%" };
  let asked = false;

  function update() {
    asked = false;
    const [magnitude, columns, share] = sliders.map((id) => Number(byId(id).value));
    for (const id of sliders) byId(`${id}-value`).textContent = byId(id).value + units[id];
    const found = simulation.run(magnitude, columns, share / 100);
    const { vectorwise, decomposed } = found;
    draw("simulation-sqnr", () => sqnr(vectorwise, decomposed));
    draw("simulation-codes", () => codes(vectorwise, decomposed));
    const rows = [
      ["SQNR of the whole output (dB)", (form) => fixed(form.output)],
      ["SQNR through ordinary channels (dB)", (form) => fixed(form.ordinary)],
      ["relative error of the output", (form) => percent(form.relativeError)],
      ["ordinary values that become zero", (form) => percent(form.zeros)],
      ["mean step of int8, ordinary values", (form) => number(form.step, 2)],
    ];
    table(
      "simulation-table",
      [
        { name: "", left: true, text: ([name]) => name },
        { name: "vector-wise", text: ([, value]) => value(vectorwise) },
        { name: "LLM.int8()", text: ([, value]) => value(decomposed) },
      ],
      rows,
    );
    byId("simulation-text").textContent = sentence(found);
  }

  function sentence({ outliers, channels, vectorwise, decomposed }) {
    if (!outliers) {
      return (
        `No value reaches ${simulation.THRESHOLD}: nothing is taken apart, and both forms are the same. The noise is int8's own, of the ` +
        "activations and of the weights in equal parts."
      );
    }
    return (
      `${outliers} of ${channels} columns (${percent(outliers / channels)}) have a value of ${simulation.THRESHOLD} or more. In plain int8 they stretch the steps of ` +
      `their tokens to ${number(vectorwise.step, 2)} on average, and ${percent(vectorwise.zeros)} of the ordinary values become zero. LLM.int8() keeps these columns ` +
      `in 16 bits: the steps stay at ${number(decomposed.step, 2)}, and ordinary channels gain ${fixed(decomposed.ordinary - vectorwise.ordinary)} dB.`
    );
  }

  function sqnr(vectorwise, decomposed) {
    const bar = (name, form, paint) => ({
      ...bars(
        [form.output, form.ordinary],
        ["whole output", "ordinary channels"],
        [form.output, form.ordinary].map((value) => `${fixed(value)} dB`),
        colour(paint),
      ),
      name,
    });
    return {
      traces: [bar("vector-wise int8", vectorwise, "red"), bar("LLM.int8()", decomposed, "blue")],
      layout: layout(
        320,
        { xaxis: axis("", { type: "category", showgrid: false }), yaxis: axis("SQNR (dB)", { range: [0, 48] }) },
        { bargap: 0.35 },
      ),
    };
  }

  function codes(vectorwise, decomposed) {
    const x = vectorwise.codes.map((_, i) => i - simulation.LEVELS);
    const trace = (name, form, paint) => ({
      type: "scatter",
      mode: "lines",
      name,
      x,
      y: form.codes.map((share) => 100 * share),
      line: { color: colour(paint), width: 2, shape: "hvh" },
      text: form.codes.map((share, i) => `${name}<br>code ${number(x[i])}: ${percent(share)} of values`),
      hovertemplate: hover,
    });
    return {
      traces: [trace("vector-wise int8", vectorwise, "red"), trace("LLM.int8()", decomposed, "blue")],
      layout: layout(320, {
        xaxis: axis("int8 code", { range: [-128, 128], zeroline: false }),
        yaxis: axis("ordinary values (%)", { rangemode: "tozero" }),
      }),
    };
  }

  for (const id of sliders) {
    byId(id).addEventListener("input", () => {
      if (!asked) requestAnimationFrame(update);
      asked = true;
    });
  }
  update();
}
