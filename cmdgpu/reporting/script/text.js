// The data of the page, what the reader has chosen, elements and text.

const DATA = JSON.parse(document.getElementById("data").textContent);
const STEPS = DATA.steps;
const M = DATA.n.modes;
const CMD = "CMD";
const COLOURS = 18; // classes c0 .. c17 of page.css
const FIRST_PANELS = 12;
const FIRST_BARS = 40;

const state = {
  lit: null, // the mode that is lit through every figure
  t: STEPS.length - 1, // position of the step that the slider is at
  allBands: false,
  allBars: false,
  level: ["blocks", "layers", "tensors"].find((level) => DATA.network[level].length > 1) ?? "tensors",
  filter: "",
  logarithmic: false,
  weightsMode: DATA.weights.length ? DATA.weights[0].mode : null,
  method: CMD,
  treatment: DATA.methods ? DATA.methods.batch_norm.at(-1) : null,
  across: DATA.plane ? "component 0" : "mode 0",
  up: DATA.plane ? "component 1" : "mode 1",
  score: DATA.landscape ? Object.keys(DATA.landscape.scores)[0] : null,
  paper: null, // the width of a page while it is printed
};

// ---- elements and text --------------------------------------------------------------------------

const byId = (id) => document.getElementById(id);

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** An element of SVG. */
function el(tag, attributes = {}, ...children) {
  return build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

/** An element of HTML. */
function html(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}

/** Text in which control characters and directions are written out, as cmdgpu.errors.printable does. */
function shown(text) {
  return String(text).replace(/(?! )[\p{C}\p{Z}]/gu, (found) => {
    const code = found.codePointAt(0);
    const hex = (width) => code.toString(16).padStart(width, "0");
    const named = { 9: "\\t", 10: "\\n", 13: "\\r" }[code];
    return named ?? (code < 0x100 ? `\\x${hex(2)}` : code < 0x10000 ? `\\u${hex(4)}` : `\\U${hex(8)}`);
  });
}

const family = getComputedStyle(document.body).fontFamily;
const pen = document.createElement("canvas").getContext("2d");

/** Text no wider than `width` pixels: of a longer one the middle is left out. */
function fitted(text, width, size = 12, weight = 400) {
  const all = Array.from(shown(text));
  if (all.length * size <= width) return all.join(""); // no character is wider than it is high
  pen.font = `${weight} ${size}px ${family}`;
  const fits = (words) => pen.measureText(words).width <= width;
  if (all.length < 300 && fits(all.join(""))) return all.join("");
  const cut = (n) => {
    const head = Math.ceil(0.45 * n); // how a name ends tells more than how it begins
    return `${all.slice(0, head).join("")}…${all.slice(all.length - (n - head)).join("")}`;
  };
  let [low, high] = [1, Math.min(all.length - 1, 300)];
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (fits(cut(middle))) low = middle;
    else high = middle - 1;
  }
  return cut(low);
}

function widest(texts, size = 12) {
  pen.font = `${size}px ${family}`;
  return Math.max(0, ...texts.map((text) => pen.measureText(shown(text).slice(0, 300)).width));
}

function num(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e7 || size < 1e-3)) return minus(value.toExponential(Math.max(digits - 2, 1)));
  if (Number.isInteger(value)) return minus(value.toLocaleString("en-US"));
  return minus(String(Number(value.toPrecision(digits))));
}

/** A number of things, or a step: every digit counts. */
const count = (value) => minus(value.toLocaleString("en-US"));
const minus = (text) => text.replace(/-/g, "−");
const percent = (share) => (share === null ? "–" : `${num(100 * share, 3)} %`);
const colour = (mode) => `c${mode % COLOURS}`;
const modeName = (mode) => `mode ${mode}`;
const atStep = (t) => `${shown(DATA.unit)} ${count(STEPS[t])}`;
const placeOf = (weight) => `${weight.tensor}[${weight.index.join(", ")}]`;

/** Rows of every mode that has some, whichever way they are written down: [[mode, rows], ...]. */
function countsOf(share) {
  if (!share.counts.length || Array.isArray(share.counts[0])) return share.counts;
  return share.counts.map((rows, mode) => [mode, rows]).filter(([, rows]) => rows > 0);
}
