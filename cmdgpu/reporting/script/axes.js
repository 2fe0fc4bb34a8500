// Scales, axes, grids of panels, and paths through values.

/** [lowest, highest] of numbers in lists of any depth, nulls left out; null where there is none. */
function extent(values, least = -Infinity) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values.flat(Infinity)) {
    if (value === null || value === undefined || !(value > least)) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return low <= high ? [low, high] : null;
}

/** A range with some air around it; a single value gets a range, too. */
function airy(range, air = 0.05) {
  const [low, high] = range ?? [0, 1];
  const by = high > low ? air * (high - low) : 0.1 * Math.abs(low) || 1;
  return [low - by, high + by];
}

/** The range of what matters, and of the others what lies not too far beyond: one that runs away hides nobody. */
function bounded(core, others, slack) {
  const inner = extent(core);
  const outer = extent(others);
  if (!inner || !outer) return airy(inner ?? outer);
  const by = slack * (inner[1] - inner[0] || Math.abs(inner[0]) || 1);
  return airy([
    Math.min(inner[0], Math.max(outer[0], inner[0] - by)),
    Math.max(inner[1], Math.min(outer[1], inner[1] + by)),
  ]);
}

function linear([from, to], a, b) {
  const slope = (b - a) / (to - from || 1);
  const scale = (value) => a + (value - from) * slope;
  scale.ticks = (wanted) => {
    const rough = (to - from) / Math.max(wanted, 1);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
    const ticks = [];
    for (let i = Math.ceil(from / step - 1e-9); i * step <= to + 1e-9 * step; i++) {
      ticks.push(Number((i * step).toPrecision(12)));
    }
    return ticks;
  };
  return scale;
}

function logarithmic([from, to], a, b) {
  const inner = linear([Math.log10(from), Math.log10(to)], a, b);
  const scale = (value) => inner(Math.log10(value));
  scale.ticks = (wanted) => {
    const [low, high] = [Math.ceil(Math.log10(from) - 1e-9), Math.floor(Math.log10(to) + 1e-9)];
    if (high - low < 1)
      return [1, 2, 3, 5, 7]
        .flatMap((d) => [Number(`${d}e${low - 1}`), Number(`${d}e${low}`)])
        .filter((v) => v >= from && v <= to)
        .sort((p, q) => p - q);
    const every = Math.max(1, Math.ceil((high - low) / Math.max(wanted, 1)));
    return Array.from({ length: Math.floor((high - low) / every) + 1 }, (_, i) =>
      Number(`1e${low + i * every}`),
    );
  };
  return scale;
}

const tickText = (value) => {
  const size = Math.abs(value);
  return size !== 0 && (size >= 1e6 || size < 1e-3)
    ? minus(value.toExponential().replace("e+", "e"))
    : num(value, 5);
};

/** Grid lines, ticks and names of a box; `format` writes the ticks of y. */
function axes(
  parent,
  box,
  x,
  y,
  { xName = "", yName = "", xTicks = null, format = tickText, xFormat = tickText } = {},
) {
  for (const value of y ? y.ticks(Math.max(3, box.h / 44)) : []) {
    const at = y(value);
    parent.append(
      el("line", { class: value === 0 ? "zero" : "grid", x1: box.x, x2: box.x + box.w, y1: at, y2: at }),
      el("text", { class: "tick", x: box.x - 6, y: at + 4, "text-anchor": "end" }, format(value)),
    );
  }
  const bottom = box.y + box.h;
  let free = -Infinity; // labels that would touch their neighbour are left out
  for (const value of xTicks ?? (x ? x.ticks(Math.max(2, box.w / 80)) : [])) {
    const [at, words] = [x(value), xFormat(value)];
    const half = 3.4 * words.length;
    parent.append(el("line", { class: "zero", x1: at, x2: at, y1: bottom, y2: bottom + 3 }));
    if (at - half < free) continue;
    parent.append(
      el("text", { class: "tick", x: Math.max(at, half), y: bottom + 15, "text-anchor": "middle" }, words),
    );
    free = at + half + 6;
  }
  if (xName)
    parent.append(
      el(
        "text",
        { class: "axis-name", x: box.x + box.w, y: bottom + 30, "text-anchor": "end" },
        fitted(xName, box.w, 11.5),
      ),
    );
  if (yName)
    parent.append(
      el("text", { class: "axis-name", x: box.x - 34, y: box.y - 9 }, fitted(yName, box.w + 34, 11.5)),
    );
}

/** Boxes of panels in a grid that fills the width; `least` is the narrowest a panel may be. */
function gridOf(width, count, { least, height, left = 44, top = 24, bottom = 26, right = 10, most = 6 }) {
  const columns = Math.max(1, Math.min(count, most, Math.floor(width / (least + left))));
  const cell = width / columns;
  const boxes = Array.from({ length: count }, (_, i) => ({
    x: (i % columns) * cell + left,
    y: Math.floor(i / columns) * (height + top + bottom) + top,
    w: Math.max(cell - left - right, 20),
    h: height,
  }));
  return { boxes, columns, height: Math.ceil(count / columns) * (height + top + bottom) };
}

/** Path data through points, broken where a value is null. */
function through(xs, values, y) {
  let path = "";
  let broken = true;
  values.forEach((value, i) => {
    if (value === null || value === undefined) {
      broken = true;
      return;
    }
    path += `${broken ? "M" : "L"}${xs[i].toFixed(1)} ${y(value).toFixed(1)}`;
    if (broken) path += "h.01"; // a point between two gaps is a dot
    broken = false;
  });
  return path;
}

/** The area between two curves, one piece per run of values. */
function between(xs, low, high, y) {
  let path = "";
  for (let i = 0; i < xs.length; i++) {
    if (low[i] === null || high[i] === null) continue;
    let end = i;
    while (end + 1 < xs.length && low[end + 1] !== null && high[end + 1] !== null) end++;
    const run = Array.from({ length: end - i + 1 }, (_, k) => i + k);
    const up = run.map((k) => `${xs[k].toFixed(1)} ${y(high[k]).toFixed(1)}`);
    const down = run.reverse().map((k) => `${xs[k].toFixed(1)} ${y(low[k]).toFixed(1)}`);
    path += `M${up.join("L")}L${down.join("L")}Z`;
    i = end;
  }
  return path;
}

/** Outline of a histogram; null where there is no share. */
function stairs(edges, shares, y, floor) {
  let path = "";
  let pen = false;
  shares.forEach((share, i) => {
    const at = (share === null ? floor : Math.min(y(share), floor)).toFixed(1);
    path += `${pen ? "L" : "M"}${edges[i].toFixed(1)} ${at}L${edges[i + 1].toFixed(1)} ${at}`;
    pen = true;
  });
  return path;
}

/** A part of the drawing that clips what leaves the box. */
function clipped(box) {
  return el("svg", {
    x: box.x,
    y: box.y - 2,
    width: box.w,
    height: box.h + 4,
    viewBox: `${box.x} ${box.y - 2} ${box.w} ${box.h + 4}`,
    overflow: "hidden",
  });
}
