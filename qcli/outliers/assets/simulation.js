// The simulation behind the sliders: activations with outlier columns times Gaussian weights, in two int8 forms.
//
// 4096 channels, as wide as a model of 7 billion parameters: how much an outlier costs depends on how many ordinary
// channels stand beside it. Few tokens and few outputs, so that a move of a slider is answered at once.

const simulation = (() => {
  const TOKENS = 32;
  const CHANNELS = 4096;
  const OUTPUTS = 64;
  const MOST_COLUMNS = 12;
  const THRESHOLD = 6;
  const SPREAD = 0.1; // standard deviation of an outlier, relative to its magnitude
  const LEVELS = 127;

  // Uniform numbers in (0, 1) from a 32-bit state: the same in every browser.
  function uniform(seed) {
    let state = seed >>> 0;
    return () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let mixed = Math.imul(state ^ (state >>> 15), state | 1);
      mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)) ^ mixed;
      return (((mixed ^ (mixed >>> 14)) >>> 0) + 0.5) / 4294967296;
    };
  }

  function gaussian(count, seed) {
    const next = uniform(seed);
    const values = new Float32Array(count);
    for (let i = 0; i < count; i += 2) {
      const radius = Math.sqrt(-2 * Math.log(next()));
      const angle = 2 * Math.PI * next();
      values[i] = radius * Math.cos(angle);
      if (i + 1 < count) values[i + 1] = radius * Math.sin(angle);
    }
    return values;
  }

  function greatest(values, start, end) {
    let found = 0;
    for (let i = start; i < end; i++) found = Math.max(found, Math.abs(values[i]));
    return found;
  }

  let drawn = null;

  // What no slider changes: ordinary activations, weights and their codes, and the dice of the outlier columns.
  function draw() {
    const weights = gaussian(OUTPUTS * CHANNELS, 1);
    const weightCodes = new Float32Array(weights.length);
    const weightScales = new Float32Array(OUTPUTS);
    for (let o = 0; o < OUTPUTS; o++) {
      const start = o * CHANNELS;
      weightScales[o] = greatest(weights, start, start + CHANNELS) / LEVELS;
      for (let c = start; c < start + CHANNELS; c++) weightCodes[c] = Math.round(weights[c] / weightScales[o]);
    }
    const next = uniform(4);
    return {
      weights,
      weightCodes,
      weightScales,
      ordinary: gaussian(TOKENS * CHANNELS, 2),
      outlier: gaussian(TOKENS * MOST_COLUMNS, 3),
      chance: Float32Array.from({ length: TOKENS * MOST_COLUMNS }, next),
      columns: Array.from({ length: MOST_COLUMNS }, (_, k) => Math.floor(((k + 0.5) * CHANNELS) / MOST_COLUMNS)),
    };
  }

  // A column is negative or positive as a whole: outlier features are mostly one-sided.
  function activations(magnitude, columns, share) {
    const x = drawn.ordinary.slice();
    for (let k = 0; k < columns; k++) {
      const sign = k % 3 === 1 ? 1 : -1;
      for (let t = 0; t < TOKENS; t++) {
        const dice = t * MOST_COLUMNS + k;
        if (drawn.chance[dice] >= share) continue;
        x[t * CHANNELS + drawn.columns[k]] = sign * magnitude * (1 + SPREAD * drawn.outlier[dice]);
      }
    }
    return x;
  }

  function reaching(x) {
    const found = [];
    for (let c = 0; c < CHANNELS; c++) {
      for (let i = c; i < x.length; i += CHANNELS) {
        if (Math.abs(x[i]) >= THRESHOLD) {
          found.push(c);
          break;
        }
      }
    }
    return found;
  }

  // The three products of one token and one output, in one pass: exact, and of the codes of both forms.
  function products(ordinary, codes, ordinaryCodes, start) {
    const { weights, weightCodes } = drawn;
    let exact = 0;
    let plain = 0;
    let apart = 0;
    for (let c = 0; c < CHANNELS; c++) {
      const weightCode = weightCodes[start + c];
      exact += ordinary[c] * weights[start + c];
      plain += codes[c] * weightCode;
      apart += ordinaryCodes[c] * weightCode;
    }
    return [exact, plain, apart];
  }

  const decibel = (signal, noise) => (signal > 0 && noise > 0 ? 10 * Math.log10(signal / noise) : null);

  // Sums of squares of one form: of its error at the outputs, and of the part that comes through ordinary channels.
  class Form {
    constructor() {
      this.error = 0;
      this.ordinaryError = 0;
      this.steps = 0;
      this.codes = new Array(2 * LEVELS + 1).fill(0); // how many ordinary values take each code
    }

    encode(row, scale) {
      this.steps += scale;
      return row.map((value) => Math.round(value / scale));
    }

    count(codes, outliers) {
      for (const code of codes) this.codes[code + LEVELS]++;
      for (const c of outliers) this.codes[codes[c] + LEVELS]--;
    }

    summary(signal, ordinarySignal, values) {
      return {
        output: decibel(signal, this.error),
        ordinary: decibel(ordinarySignal, this.ordinaryError),
        relativeError: Math.sqrt(this.error / signal),
        zeros: this.codes[LEVELS] / values,
        step: this.steps / TOKENS,
        codes: this.codes.map((count) => count / values),
      };
    }
  }

  // Vector-wise int8: one scale a token, one a weight row. LLM.int8(): columns with any |x| >= 6 apart, their
  // activations in full precision and their weights as int8 stores them.
  function run(magnitude, columns, share) {
    drawn ??= draw();
    const x = activations(magnitude, columns, share);
    const outliers = reaching(x);
    const vectorwise = new Form();
    const decomposed = new Form();
    let signal = 0;
    let ordinarySignal = 0;
    for (let t = 0; t < TOKENS; t++) {
      const row = x.slice(t * CHANNELS, (t + 1) * CHANNELS);
      const ordinary = row.slice();
      for (const c of outliers) ordinary[c] = 0;
      const scale = greatest(row, 0, CHANNELS) / LEVELS;
      const ordinaryScale = greatest(ordinary, 0, CHANNELS) / LEVELS;
      const codes = vectorwise.encode(row, scale);
      const ordinaryCodes = decomposed.encode(ordinary, ordinaryScale);
      vectorwise.count(codes, outliers);
      decomposed.count(ordinaryCodes, outliers);
      const outlierCodes = outliers.map((c) => codes[c]);
      for (const c of outliers) codes[c] = 0;
      for (let o = 0; o < OUTPUTS; o++) {
        const start = o * CHANNELS;
        const stored = drawn.weightScales[o];
        const [exact, plainSum, apartSum] = products(ordinary, codes, ordinaryCodes, start);
        const plain = scale * stored * plainSum - exact;
        const apart = ordinaryScale * stored * apartSum - exact;
        let exactRest = 0;
        let plainRest = 0;
        let apartRest = 0;
        outliers.forEach((c, k) => {
          exactRest += row[c] * drawn.weights[start + c];
          plainRest += scale * outlierCodes[k] * stored * drawn.weightCodes[start + c];
          apartRest += row[c] * stored * drawn.weightCodes[start + c];
        });
        signal += (exact + exactRest) ** 2;
        ordinarySignal += exact ** 2;
        vectorwise.error += (plain + plainRest - exactRest) ** 2;
        vectorwise.ordinaryError += plain ** 2;
        decomposed.error += (apart + apartRest - exactRest) ** 2;
        decomposed.ordinaryError += apart ** 2;
      }
    }
    const values = TOKENS * (CHANNELS - outliers.length);
    return {
      outliers: outliers.length,
      channels: CHANNELS,
      vectorwise: vectorwise.summary(signal, ordinarySignal, values),
      decomposed: decomposed.summary(signal, ordinarySignal, values),
    };
  }

  return { run, LEVELS, THRESHOLD };
})();
