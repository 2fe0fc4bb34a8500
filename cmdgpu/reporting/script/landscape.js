// Scores over the values of one or two references.

const VIRIDIS = [
  [68, 1, 84],
  [71, 44, 122],
  [59, 81, 139],
  [44, 113, 142],
  [33, 144, 141],
  [39, 173, 129],
  [92, 200, 99],
  [170, 220, 50],
  [253, 231, 37],
];

function viridis(share) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const i = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return `rgb(${VIRIDIS[i].map((from, k) => Math.round(from + (at - i) * (VIRIDIS[i + 1][k] - from))).join(" ")})`;
}

const factorOf = (mode) => `value of reference ${mode} (× trained)`;

function drawLandscape(svg, width) {
  const { modes } = DATA.landscape;
  return modes.length > 1 ? drawHeights(svg, width) : drawRidge(svg, width);
}

/** Two references are varied: cells. */
function drawHeights(svg, width) {
  const { x: xValues, y: yValues, modes, scores, trained, best } = DATA.landscape;
  const values = scores[state.score];
  const side = Math.min(width - 80, 460);
  const box = { x: 60, y: 26, w: side, h: side };
  const edgesOf = (list) => [
    list[0] - (list[1] - list[0]) / 2,
    ...list.slice(1).map((value, i) => (value + list[i]) / 2),
    list.at(-1) + (list.at(-1) - list.at(-2)) / 2,
  ];
  const [xEdges, yEdges] = [edgesOf(xValues), edgesOf(yValues)];
  const x = linear([xEdges[0], xEdges.at(-1)], box.x, box.x + side);
  const y = linear([yEdges[0], yEdges.at(-1)], box.y + side, box.y);
  const [low, high] = extent(values) ?? [0, 1];
  const marks = [];
  const cells = el("g", { "shape-rendering": "crispEdges" });
  yValues.forEach((down, r) =>
    xValues.forEach((along, c) => {
      const value = values[r][c];
      const cell = {
        x: x(xEdges[c]),
        y: y(yEdges[r + 1]),
        w: x(xEdges[c + 1]) - x(xEdges[c]),
        h: y(yEdges[r]) - y(yEdges[r + 1]),
      };
      cells.append(
        el("rect", {
          class: value === null ? "cell constant" : "cell",
          x: cell.x,
          y: cell.y,
          width: cell.w + 0.3,
          height: cell.h + 0.3,
          fill: value === null ? null : viridis((value - low) / (high - low || 1)),
        }),
      );
      marks.push({
        ...cell,
        row: -r,
        lines: [
          `${state.score}: ${num(value)}`,
          `reference ${modes[0]} × ${num(along)}`,
          `reference ${modes[1]} × ${num(down)}`,
        ],
      });
    }),
  );
  svg.append(cells);
  axes(svg, box, x, null, { xName: factorOf(modes[0]) });
  for (const tick of y.ticks(8))
    svg.append(
      el("text", { class: "tick", x: box.x - 6, y: y(tick) + 4, "text-anchor": "end" }, tickText(tick)),
    );
  svg.append(el("text", { class: "axis-name", x: 0, y: box.y - 9 }, fitted(factorOf(modes[1]), width)));
  ringAt(svg, x(trained[0]), y(trained[1]));
  if (best) crossAt(svg, x(best.x), y(best.y));
  const ramp = el("g", { "shape-rendering": "crispEdges" });
  for (let i = 0; i < 64; i++)
    ramp.append(
      el("rect", {
        x: box.x + (i * side) / 64,
        y: box.y + side + 46,
        width: side / 64 + 0.5,
        height: 9,
        fill: viridis(i / 63),
      }),
    );
  svg.append(
    ramp,
    el("text", { class: "tick", x: box.x, y: box.y + side + 70 }, num(low)),
    el("text", { class: "tick", x: box.x + side, y: box.y + side + 70, "text-anchor": "end" }, num(high)),
    el(
      "text",
      { class: "tick", x: box.x + side / 2, y: box.y + side + 70, "text-anchor": "middle" },
      fitted(state.score, side - 150, 11.5),
    ),
  );
  return {
    height: box.y + side + 78,
    label: `${shown(state.score)} over the values of references ${modes.join(" and ")}: from ${num(low)} to ${num(high)}.`,
    probe: marksProbe(marks),
  };
}

/** One reference is varied: a line. */
function drawRidge(svg, width) {
  const { x: along, modes, scores, trained, best } = DATA.landscape;
  const values = scores[state.score].flat();
  const box = { x: 60, y: 26, w: Math.min(width - 76, 620), h: 230 };
  const x = linear([along[0], along.at(-1)], box.x, box.x + box.w);
  const y = linear(airy(extent(values)), box.y + box.h, box.y);
  const xs = along.map(x);
  axes(svg, box, x, y, { xName: factorOf(modes[0]), yName: state.score });
  svg.append(
    el("path", { class: "line solid ink", d: through(xs, values, y) }),
    el("line", { class: "now", x1: x(trained[0]), x2: x(trained[0]), y1: box.y, y2: box.y + box.h }),
    el("text", { class: "tick", x: x(trained[0]) + 5, y: box.y + 10 }, "trained"),
  );
  const chosen = best ? values[along.indexOf(best.x)] : null;
  if (chosen !== null && chosen !== undefined) crossAt(svg, x(best.x), y(chosen));
  const range = extent(values) ?? [null, null];
  return {
    height: box.y + box.h + 38,
    label: `${shown(state.score)} over the value of reference ${modes[0]}: from ${num(range[0])} to ${num(range[1])}.`,
    probe: seriesProbe([
      { box, xs, head: (i) => `× ${num(along[i])}`, series: [{ name: state.score, values, y }] },
    ]),
  };
}

function ringAt(svg, cx, cy) {
  svg.append(
    el("circle", { class: "ring", cx, cy, r: 8, style: "stroke:#000;stroke-width:4" }),
    el("circle", { class: "ring", cx, cy, r: 8, style: "stroke:#fff" }),
  );
}

function crossAt(svg, cx, cy) {
  const d = `M${cx - 5} ${cy - 5}l10 10m0 -10l-10 10`;
  svg.append(
    el("path", { d, style: "stroke:#000;stroke-width:4.5" }),
    el("path", { d, style: "stroke:#fff;stroke-width:2" }),
  );
}

const csvLandscape = () => {
  const { x, y, modes, scores } = DATA.landscape;
  const names = Object.keys(scores);
  if (modes.length < 2)
    return [
      [`factor of ${modes[0]}`, ...names],
      ...x.map((along, c) => [along, ...names.map((name) => scores[name].flat()[c])]),
    ];
  return [
    [`factor of ${modes[0]}`, `factor of ${modes[1]}`, ...names],
    ...y.flatMap((up, r) => x.map((along, c) => [along, up, ...names.map((name) => scores[name][r][c])])),
  ];
};
