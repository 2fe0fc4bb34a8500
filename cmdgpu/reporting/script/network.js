// Where in the network the modes are.

const matches = (share) =>
  state.level !== "tensors" || !state.filter || share.name.toLowerCase().includes(state.filter);

function drawNetwork(svg, width) {
  const all = DATA.network[state.level].filter(matches);
  const shares = state.allBars ? all : all.slice(0, FIRST_BARS);
  const more = byId("more-network");
  more.hidden = all.length <= FIRST_BARS;
  more.textContent = state.allBars ? `show the first ${FIRST_BARS}` : `show all ${all.length}`;
  const narrow = width < 620; // names above their bars
  const left = narrow ? 0 : Math.min(0.3 * width, 12 + widest(shares.map((share) => share.name)));
  const right =
    24 +
    widest(
      shares.map((share) => count(share.rows)),
      11.5,
    );
  const row = narrow ? 41 : 22;
  const box = { x: left, y: 8, w: width - left - right, h: shares.length * row };
  const x = linear([0, 1], box.x, box.x + box.w);
  axes(svg, box, x, null, { xFormat: (value) => `${Math.round(100 * value)} %` });
  const marks = [];
  shares.forEach((share, r) => {
    const top = box.y + r * row + (narrow ? 18 : 3);
    const middle = top + 12;
    svg.append(
      el(
        "text",
        narrow
          ? { class: "name", x: 0, y: top - 5 }
          : { class: "name", x: left - 8, y: middle, "text-anchor": "end" },
        fitted(share.name, narrow ? width : left - 12),
      ),
      el("text", { class: "tick", x: width, y: middle, "text-anchor": "end" }, count(share.rows)),
    );
    for (const part of partsOf(share)) {
      const [from, wide] = [x(part.from), x(part.to) - x(part.from)];
      svg.append(
        el("rect", {
          class: part.look,
          "data-mode": part.mode,
          x: from,
          y: top,
          width: Math.max(wide, 0.4),
          height: 16,
        }),
      );
      marks.push({
        x: from,
        y: top,
        w: wide,
        h: 16,
        row: r,
        mode: part.mode,
        lines: [
          share.name,
          `${part.name}: ${percent(part.to - part.from)}, ${count(part.rows)} weights`,
          `mean |corr| ${num(share.mean_abs_correlation)}, R² ${num(share.r2)}`,
        ],
      });
    }
  });
  if (!shares.length)
    svg.append(el("text", { class: "quiet", x: box.x, y: 24 }, "no tensor has this in its name"));
  return {
    height: box.y + Math.max(box.h, 24) + 24,
    label: `Share of the weights in each mode for ${shares.length} of ${DATA.network[state.level].length} ${state.level}.`,
    probe: marksProbe(marks),
  };

  /** Pieces of a bar: the lit mode first, then by mode; what is thinner than a pixel is gathered. */
  function partsOf(share) {
    const counts = countsOf(share);
    const parts = [];
    let [at, others] = [0, 0];
    const add = (rows, name, look, mode) => {
      if (rows <= 0) return;
      parts.push({ from: at, to: at + rows / share.rows, rows, name, look, mode });
      at += rows / share.rows;
    };
    for (const [mode, rows] of [
      ...counts.filter(([one]) => one === state.lit),
      ...counts.filter(([one]) => one !== state.lit),
    ]) {
      if ((rows / share.rows) * box.w < 1 && mode !== state.lit) others += rows;
      else add(rows, modeName(mode), `fill ${colour(mode)}`, mode);
    }
    add(others, "small modes", "others");
    add(share.constant, "constant", "constant");
    add(share.nonfinite, "non-finite", "constant");
    return parts;
  }
}

const csvNetwork = () => [
  ["level", "name", "mode", "weights of the mode", "weights", "constant", "non-finite"],
  ...["blocks", "layers", "tensors"].flatMap((level) =>
    DATA.network[level].flatMap((share) =>
      countsOf(share).map(([mode, rows]) => [
        level,
        share.name,
        mode,
        rows,
        share.rows,
        share.constant,
        share.nonfinite,
      ]),
    ),
  ),
];

const csvTensors = () => [
  [
    "tensor",
    "kind",
    "layer",
    "block",
    "shape",
    "weights",
    "constant",
    "non-finite",
    "mean |corr|",
    "R2",
    "R2 by energy",
    "weight MSE",
  ],
  ...DATA.network.tensors.map((t) => [
    t.name,
    t.kind,
    t.layer,
    t.block,
    t.shape.join("x"),
    t.rows,
    t.constant,
    t.nonfinite,
    t.mean_abs_correlation,
    t.r2,
    t.r2_energy,
    t.weight_mse,
  ]),
];
