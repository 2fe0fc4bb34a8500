// What was measured beside what unrelated rows give: means and histograms.

// ---- measured against chance --------------------------------------------------------------------

const VIEWS = {
  levels: "|corr| of weights with their reference",
  increment_correlation: "correlation of their increments",
  increments: "|corr| where increments are decomposed",
};

function drawChance(svg, width) {
  const views = Object.keys(VIEWS).filter((name) => DATA.quality[name]);
  const box = { x: Math.min(130, 0.34 * width), y: 8, w: 0, h: 0 };
  box.w = width - box.x - 16;
  const all = views.map((name) => [
    DATA.quality[name].measured,
    Object.values(DATA.quality[name].chance).map((c) => [c.low, c.high]),
  ]);
  const [low] = extent(all) ?? [0, 1];
  const x = linear([Math.min(0, low), 1], box.x, box.x + box.w);
  const marks = [];
  const layer = el("g");
  let y = 18;
  for (const name of views) {
    const { measured, chance, excess } = DATA.quality[name];
    layer.append(
      el("text", { class: "name", x: 0, y }, fitted(VIEWS[name], width - 90)),
      el(
        "text",
        { class: "name", x: width - 16, y, "text-anchor": "end", "font-weight": 600 },
        num(measured, 3),
      ),
    );
    const top = y + 9;
    y += 22;
    for (const [model, one] of Object.entries(chance)) {
      const [a, b] = [x(one.low ?? one.mean), x(one.high ?? one.mean)];
      layer.append(
        el(
          "text",
          { class: "tick", x: box.x - 8, y: y + 4, "text-anchor": "end" },
          fitted(model, box.x - 10, 11.5),
        ),
        el("line", { class: "grid", x1: box.x, x2: box.x + box.w, y1: y, y2: y }),
        el("rect", {
          class: "bar chance",
          x: a - 2,
          y: y - 5,
          width: Math.max(b - a, 1) + 4,
          height: 10,
          rx: 3,
        }),
      );
      marks.push({
        x: x(one.mean),
        y,
        row: marks.length,
        lines: [
          VIEWS[name],
          `${model}: ${num(one.mean)} (${num(one.low)} to ${num(one.high)})`,
          `measured: ${num(measured)}`,
        ],
      });
      y += 18;
    }
    if (measured !== null) {
      layer.append(
        el("line", { class: "line solid thin ink", x1: x(measured), x2: x(measured), y1: top, y2: y - 8 }),
        el("circle", { class: "dot ink measured", cx: x(measured), cy: top + 2, r: 5, "fill-opacity": 1 }),
      );
      marks.push({
        x: x(measured),
        y: top + 2,
        row: marks.length,
        lines: [
          VIEWS[name],
          `measured: ${num(measured)}`,
          `way from chance to 1: ${percent(excess ?? null)}`,
        ],
      });
    }
    y += 14;
  }
  box.h = y - 14 - box.y;
  axes(svg, box, x, null, {});
  svg.append(layer);
  const said = views.map(
    (name) =>
      `${VIEWS[name]} ${num(DATA.quality[name].measured)}, by chance at most ${num((extent(Object.values(DATA.quality[name].chance).map((c) => c.mean)) ?? [null, null])[1])}`,
  );
  return {
    height: box.y + box.h + 22,
    label: `Measured against chance: ${said.join("; ")}.`,
    probe: marksProbe(marks),
  };
}

const csvChance = () => [
  ["view", "null model", "mean", "low", "high", "measured"],
  ...Object.keys(VIEWS)
    .filter((name) => DATA.quality[name])
    .flatMap((name) =>
      Object.entries(DATA.quality[name].chance).map(([model, one]) => [
        name,
        model,
        one.mean,
        one.low,
        one.high,
        DATA.quality[name].measured,
      ]),
    ),
];

// ---- histograms against chance ------------------------------------------------------------------

const NULL_LOOKS = ["solid", "dashed", "dotted"];

/** Draws one of the two histograms; a lit mode is known for |corr| alone. */
function drawHistogram(quantity, name) {
  return (svg, width) => {
    const { edges, chance, per_mode: perMode } = DATA.histogram;
    const shares = DATA.histogram[quantity];
    const box = { x: 48, y: 26, w: width - 60, h: Math.min(230, 120 + 0.2 * width) };
    const x = linear([0, 1], box.x, box.x + box.w);
    const nulls = Object.entries(chance);
    const lit = quantity === "abs_correlation" && state.lit !== null ? perMode[state.lit] : null;
    const [, top] = extent([shares, nulls.map(([, band]) => band[quantity].high), lit ?? []]) ?? [0, 1];
    const floor = box.y + box.h;
    const y = state.logarithmic
      ? logarithmic([1e-6, Math.max(1.3 * top, 1e-5)], floor, box.y)
      : linear([0, 1.06 * top || 1], floor, box.y);
    const height = (share) => (share > 0 || !state.logarithmic ? Math.min(y(share), floor) : floor);
    axes(svg, box, x, y, {
      xName: name,
      yName: "share of the weights that move",
      format: (v) => `${tickText(Number((100 * v).toPrecision(6)))} %`,
    });
    const at = edges.map(x);
    const corners = at.slice(1).flatMap((right, i) => [at[i], right]);
    const twice = (values) => values.flatMap((value) => [value, value]);
    shares.forEach((share, i) => {
      if (share > 0)
        svg.append(
          el("rect", {
            class: "bar chance",
            "fill-opacity": 0.75,
            x: at[i] + 0.5,
            y: height(share),
            width: Math.max(at[i + 1] - at[i] - 1, 0.5),
            height: floor - height(share),
          }),
        );
    });
    const series = [{ name: "weights", values: shares, y: height, text: percent }];
    nulls.forEach(([model, band], k) => {
      const { low, mean, high } = band[quantity];
      svg.append(
        el("path", {
          class: "band ink",
          "fill-opacity": 0.1,
          d: between(corners, twice(low), twice(high), height),
        }),
        el("path", { class: `line thin ink ${NULL_LOOKS[k % 3]}`, d: stairs(at, mean, height, floor) }),
      );
      series.push({
        name: model,
        values: mean,
        y: height,
        text: (v, i) => `${percent(v)} (${percent(low[i])} to ${percent(high[i])})`,
      });
    });
    if (lit) {
      svg.append(
        el("path", {
          class: `line solid fat ${colour(state.lit)} lit`,
          "data-mode": state.lit,
          d: stairs(at, lit, height, floor),
        }),
      );
      series.push({ name: modeName(state.lit), mode: state.lit, values: lit, y: height, text: percent });
    }
    const above = shares.reduce((sum, share, i) => sum + (edges[i] >= 0.8 - 1e-9 ? share : 0), 0);
    return {
      height: floor + 38,
      label: `Histogram of ${name}: ${percent(above)} of the moving weights are above 0.8.`,
      probe: seriesProbe([
        {
          box,
          xs: at.slice(1).map((right, i) => (at[i] + right) / 2),
          head: (i) => `${name} ${num(edges[i])} to ${num(edges[i + 1])}`,
          series,
        },
      ]),
    };
  };
}

const csvHistogram = (quantity) => () => {
  const { edges, chance, per_mode: perMode } = DATA.histogram;
  const nulls = Object.entries(chance);
  const modes = quantity === "abs_correlation" ? perMode : [];
  return [
    [
      "from",
      "to",
      "weights",
      ...nulls.flatMap(([model]) => [`${model} low`, `${model} mean`, `${model} high`]),
      ...modes.map((_, mode) => modeName(mode)),
    ],
    ...DATA.histogram[quantity].map((share, i) => [
      edges[i],
      edges[i + 1],
      share,
      ...nulls.flatMap(([, band]) => ["low", "mean", "high"].map((edge) => band[quantity][edge][i])),
      ...modes.map((shares) => shares[i]),
    ]),
  ];
};
