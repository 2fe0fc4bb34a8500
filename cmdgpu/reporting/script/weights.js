// Sampled weights, recorded and rebuilt: over all steps, and at the chosen one.

// ---- single weights -----------------------------------------------------------------------------

/** A weight as a method rebuilds it, over all steps. CMD is a * reference + b. */
function rebuiltBy(weight, method) {
  if (method !== CMD) return weight.rebuilt[method] ?? STEPS.map(() => null);
  return DATA.profiles.raw[weight.mode].map((value) => (value === null ? null : weight.a * value + weight.b));
}

const REBUILDERS = METHODS.filter(
  (label) => label === CMD || DATA.weights.some((weight) => label in weight.rebuilt),
);

function chooseWeights(mode) {
  state.weightsMode = mode;
  byId("weights-mode").value = mode;
  redraw("weights");
}

function drawWeights(svg, width) {
  const weights = DATA.weights.filter((weight) => weight.mode === state.weightsMode);
  const { boxes, columns, height } = gridOf(width, weights.length, {
    least: 104,
    height: 92,
    left: 46,
    top: 42,
    bottom: 14,
    most: 4,
  });
  legend(
    "legend-weights",
    [["recorded", "thin ink"], ...REBUILDERS.map((label) => [label, methodColour(label)])],
    modeName(state.weightsMode),
  );
  const panels = weights.map((weight, i) => {
    const box = boxes[i];
    const { x, xs } = timeAxis(box);
    const curves = REBUILDERS.map((label) => [label, rebuiltBy(weight, label)]);
    const own = [weight.recorded, rebuiltBy(weight, CMD)];
    const y = linear(
      bounded(
        own,
        curves.map(([, values]) => values),
        1,
      ),
      box.y + box.h,
      box.y,
    );
    const inside = clipped(box);
    axes(svg, box, i + columns >= weights.length ? x : null, y);
    svg.append(
      el("text", { class: "name", x: box.x, y: box.y - 23 }, fitted(placeOf(weight), box.w)),
      el("text", { class: "tick", x: box.x, y: box.y - 8 }, `|corr| ${num(Math.abs(weight.correlation), 3)}`),
      inside,
    );
    for (const [label, values] of curves.toReversed())
      inside.append(el("path", { class: `line solid ${methodColour(label)}`, d: through(xs, values, y) }));
    inside.append(el("path", { class: "line solid thin ink", d: through(xs, weight.recorded, y) }));
    const series = [
      { name: "recorded", mode: weight.mode, values: weight.recorded, y },
      ...curves.map(([name, values]) => ({ name, mode: weight.mode, values, y })),
    ];
    return { box, xs, head: (t) => `${placeOf(weight)}, ${atStep(t)}`, series };
  });
  return {
    height: height + 12,
    label: `${weights.length} weights of mode ${state.weightsMode}, recorded and rebuilt by ${REBUILDERS.map(shown).join(", ")}.`,
    probe: seriesProbe(panels),
    now: stepMarks(
      svg,
      boxes,
      panels.map(({ xs }) => xs),
    ),
  };
}

const csvWeights = () => [
  ["tensor", "index", "row", "mode", "a", "b", "correlation", "values", ...STEPS],
  ...DATA.weights.flatMap((weight) => {
    const head = [
      weight.tensor,
      weight.index.join(" "),
      weight.row,
      weight.mode,
      weight.a,
      weight.b,
      weight.correlation,
    ];
    return [
      [...head, "recorded", ...weight.recorded],
      ...REBUILDERS.map((label) => [...head, label, ...rebuiltBy(weight, label)]),
    ];
  }),
];

// ---- rebuilt against recorded, at the step ------------------------------------------------------

function drawRebuilt(svg, width) {
  const wide = width >= 660;
  const side = wide ? Math.min(0.5 * width - 70, 380) : Math.min(width - 70, 420);
  const box = { x: 56, y: 26, w: side, h: side };
  const second = wide
    ? { x: box.x + side + 80, y: 26, w: width - side - 156, h: side }
    : { x: 56, y: side + 90, w: width - 70, h: 130 };
  const curves = DATA.weights.map((weight) => rebuiltBy(weight, state.method));
  const own = [
    DATA.weights.map(({ recorded }) => recorded),
    DATA.weights.map((weight) => rebuiltBy(weight, CMD)),
  ];
  const [from, to] = bounded(own, curves, 0.3);
  const [x, y] = [linear([from, to], box.x, box.x + side), linear([from, to], box.y + side, box.y)];
  axes(svg, box, x, y, { xName: "recorded", yName: "rebuilt" });
  svg.append(
    el("line", {
      class: "zero diagonal",
      x1: x(from),
      y1: y(from),
      x2: x(to),
      y2: y(to),
      "data-from": from,
      "data-to": to,
    }),
  );
  const dots = DATA.weights.map((weight) =>
    el("circle", { class: `dot ${colour(weight.mode)}`, "data-mode": weight.mode, r: 4 }),
  );
  const inside = clipped(box);
  inside.append(...dots);
  svg.append(inside);

  const rms = REBUILDERS.map((label) => [label, STEPS.map((_, t) => rmsAt(label, t))]);
  const [, worst] = bounded(
    [0, rms[0][1]],
    rms.map(([, values]) => values),
    3,
  );
  const errors = linear([0, worst], second.y + second.h, second.y);
  const { x: time, xs } = timeAxis(second);
  axes(svg, second, time, errors, { xName: DATA.unit, yName: "root mean squared error of these weights" });
  const below = clipped(second);
  svg.append(below);
  below.append(
    ...rms.map(([label, values]) =>
      el("path", {
        class: `line solid ${label === state.method ? "fat" : "thin"} ${methodColour(label)}`,
        d: through(xs, values, errors),
      }),
    ),
  );
  const line = stepMarks(svg, [second], [xs]);
  const when = el("text", { class: "name", x: box.x + side, y: box.y - 9, "text-anchor": "end" });
  svg.append(when);
  const marks = DATA.weights.map((weight, i) => ({
    x: 0,
    y: 0,
    mode: weight.mode,
    lines: () => [
      placeOf(weight),
      `mode ${weight.mode}, |corr| ${num(Math.abs(weight.correlation), 3)}`,
      `recorded ${num(weight.recorded[state.t])}`,
      `rebuilt ${num(curves[i][state.t])} by ${shown(state.method)}`,
    ],
  }));
  rms.forEach(([label, values]) =>
    values.forEach(
      (value, t) =>
        value !== null &&
        marks.push({ x: xs[t], y: errors(value), lines: [atStep(t), `${label}: ${num(value)}`] }),
    ),
  );
  return {
    height: wide ? box.y + side + 38 : second.y + second.h + 38,
    label: `${DATA.weights.length} sampled weights, rebuilt by ${shown(state.method)} against recorded, at a step to be chosen; at the last their root mean squared difference is ${num(rmsAt(state.method, STEPS.length - 1))}.`,
    probe: marksProbe(marks),
    now(t) {
      line(t);
      when.textContent = fitted(atStep(t), side - 60);
      DATA.weights.forEach((weight, i) => {
        const known = weight.recorded[t] !== null && curves[i][t] !== null;
        [marks[i].x, marks[i].y] = known ? [x(weight.recorded[t]), y(curves[i][t])] : [-1e6, -1e6];
        dots[i].setAttribute("cx", marks[i].x);
        dots[i].setAttribute("cy", marks[i].y);
      });
    },
  };
}

/** Root mean squared difference of the sampled weights at a step; null where none is known. */
function rmsAt(method, t) {
  let [sum, n] = [0, 0];
  for (const weight of DATA.weights) {
    const [is, made] = [
      weight.recorded[t],
      method === CMD
        ? weight.a * DATA.profiles.raw[weight.mode][t] + weight.b
        : (weight.rebuilt[method]?.[t] ?? null),
    ];
    if (is === null || made === null) continue;
    sum += (made - is) ** 2;
    n += 1;
  }
  return n ? Math.sqrt(sum / n) : null;
}

const csvRebuilt = () => [
  ["tensor", "index", "mode", DATA.unit, "recorded", ...REBUILDERS],
  ...DATA.weights.map((weight) => [
    weight.tensor,
    weight.index.join(" "),
    weight.mode,
    STEPS[state.t],
    weight.recorded[state.t],
    ...REBUILDERS.map((label) => rebuiltBy(weight, label)[state.t]),
  ]),
];
