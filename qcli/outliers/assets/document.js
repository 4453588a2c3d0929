// Numbers as text and pieces of the document. Text of the report enters it through textContent alone.

const byId = (id) => document.getElementById(id);
const missing = "\u2013";

function number(value, digits = 3) {
  if (value === null || value === undefined) return missing;
  return value.toLocaleString("en-US", { maximumSignificantDigits: Math.max(digits, 1) }).replace("-", "\u2212");
}

const count = (value) => number(value, 21);
const fixed = (value, digits = 1) =>
  value === null || value === undefined ? missing : value.toFixed(digits).replace("-", "\u2212");

function percent(value) {
  if (value === null || value === undefined) return missing;
  const hundred = 100 * value;
  const text = fixed(hundred, hundred >= 10 ? 0 : hundred >= 1 ? 1 : 2);
  return `${text.replace(/\.0+$/, "")}%`;
}

// One decimal, as the paper gives it, where that says enough.
const perplexityText = (value) => (value >= 1000 ? number(value, 4) : fixed(value, value < 10 ? 2 : 1));

const quartiles = (values) => (values ? values.map((value) => number(value)).join(", ") : missing);

function some(names, most) {
  const rest = names.length - most;
  return names.slice(0, most).join(", ") + (rest > 0 ? ` and ${rest} more` : "");
}

function compact(value) {
  const [unit, letter] = value >= 1e9 ? [1e9, "B"] : value >= 1e6 ? [1e6, "M"] : [1e3, "k"];
  return `${number(value / unit)}${letter}`;
}

// "117M" of the paper's table as a number.
function parameters(text) {
  return parseFloat(text) * { k: 1e3, M: 1e6, B: 1e9, T: 1e12 }[text.slice(-1)];
}

// A token as one line of visible characters.
function visible(text, most = 18) {
  const shown = text
    .replace(/[\u0000-\u001f\u007f-\u009f]/g, (c) => JSON.stringify(c).slice(1, -1))
    .replace(/^ /, "\u00b7");
  const characters = [...shown];
  return characters.length > most ? `${characters.slice(0, most - 1).join("")}\u2026` : shown;
}

// Text for a chart: plotly reads a few tags in it.
function plain(text) {
  return String(text).replace(/[&<>]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function hide(...ids) {
  for (const id of ids) byId(id).hidden = true;
}

function say(id, sentence) {
  byId(id).textContent = sentence;
  byId(id).hidden = false;
}

// A group of radio buttons; `choose` is called with the value of the one pressed.
function choice(holder, name, options, choose) {
  const group = element("fieldset");
  group.append(element("legend", name));
  options.forEach(([value, text], i) => {
    const label = element("label");
    const input = element("input");
    input.type = "radio";
    input.name = `${holder}-${name}`;
    input.value = value;
    input.checked = i === 0;
    input.addEventListener("change", () => choose(value));
    label.append(input, text);
    group.append(label);
  });
  byId(holder).append(group);
}

// columns: [{name, left, value(row), text(row), title(row)}]; `value` makes a column one to sort by.
function table(holder, columns, rows, { marked = () => false, sortable = false } = {}) {
  const made = element("table");
  const head = made.createTHead().insertRow();
  const body = made.createTBody();
  for (const column of columns) {
    const cell = element("th", sortable ? undefined : column.name, column.left ? "left" : "");
    cell.scope = "col";
    if (sortable) {
      const button = element("button", column.name);
      button.addEventListener("click", () => sortBy(head, body, cell, column));
      cell.append(button);
    }
    head.append(cell);
  }
  const built = rows.map((row) => {
    const line = body.insertRow();
    if (marked(row)) line.className = "mark";
    for (const column of columns) {
      const cell = element("td", column.text(row), column.left ? "left" : "");
      if (column.title) cell.title = column.title(row);
      line.append(cell);
    }
    return [row, line];
  });
  body.rowsOfData = new Map(built.map(([row, line]) => [line, row]));
  byId(holder).replaceChildren(made);
}

function sortBy(head, body, cell, column) {
  const descending = cell.ariaSort !== "descending";
  for (const other of head.cells) other.ariaSort = null;
  cell.ariaSort = descending ? "descending" : "ascending";
  const key = (line) => column.value(body.rowsOfData.get(line)) ?? -Infinity;
  const order = (a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0);
  const lines = [...body.rows].sort((a, b) => (descending ? order(b, a) : order(a, b)));
  body.append(...lines);
}

function copyButton(source) {
  const button = element("button", "Copy");
  button.type = "button";
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(source); // no permission: marked, for the keyboard
      button.textContent = "Marked";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  return button;
}
