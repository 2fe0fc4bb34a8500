// Methods against the step, and fits against the number of modes.

// ---- methods compared ---------------------------------------------------------------------------

const FARTHEST = 100; // times the error of the modes: what is worse leaves the panel

function drawMethods(svg, width) {
  const { methods, steps, scores, selected } = DATA.methods;
  const rows = methods.filter((row) => row.batch_norm === state.treatment);
  const labels = [...new Set(rows.map((row) => row.label))];
  const cells = new Map(rows.map((row) => [`${row.step} ${row.label}`, row]));
  const curve = (label, read) =>
    steps.map((step) =>
      cells.has(`${step} ${label}`) ? (read(cells.get(`${step} ${label}`)) ?? null) : null,
    );
  const isRecorded = (label) => rows.some((row) => row.label === label && row.method === "recorded");
  const look = (label) =>
    isRecorded(label)
      ? "thin ink"
      : rows.some((row) => row.label === label && row.method === "cmd") && !METHODS.includes(label)
        ? methodColour(CMD)
        : methodColour(label);
  legend(
    "legend-methods",
    labels.map((label) => [label, look(label)]),
    DATA.methods.batch_norm.length > 1 ? `scores with BatchNorm ${state.treatment}` : "",
  );
  const isCore = (label) =>
    rows.some((row) => row.label === label && (row.method === "recorded" || row.method === "cmd"));
  const quantities = [
    ["relative error of the weights", (row) => row.relative_error, true],
    ...scores.map((name) => [name, (row) => row.scores[name], false]),
  ];
  const { boxes, height } = gridOf(width, quantities.length, {
    least: 236,
    height: 210,
    most: 3,
    left: 56,
    bottom: 42,
  });
  const chosen = new Map(
    selected.filter((row) => row.batch_norm === state.treatment).map((row) => [row.label, row.step]),
  );
  const panels = quantities.map(([name, read, isLog], i) => {
    const box = boxes[i];
    const x = linear(
      steps.length > 1 ? [steps[0], steps.at(-1)] : airy([steps[0], steps[0]]),
      box.x,
      box.x + box.w,
    );
    const xs = steps.map(x);
    const curves = labels.map((label) => [
      label,
      curve(label, read).map((value) => (isLog && !(value > 0) ? null : value)),
    ]);
    // what follows the first sixth decides how much of a score is shown: the rise to it is the same for all
    const late = curves.map(([, values]) => (isLog ? values : values.slice(Math.floor(values.length / 6))));
    const core = late.filter((_, k) => isCore(curves[k][0]));
    const [lowest, highest] = extent(late, 0) ?? [0.1, 1];
    const most = FARTHEST * (extent(core, 0) ?? [0, Infinity])[1];
    const y = isLog
      ? logarithmic([lowest / 1.3, 1.3 * Math.max(Math.min(highest, most), lowest)], box.y + box.h, box.y)
      : linear(bounded(core, late, 1), box.y + box.h, box.y);
    axes(svg, box, x, y, { xName: DATA.methods.unit });
    svg.append(
      el("text", { class: "name", x: box.x, y: box.y - 9, "font-weight": 600 }, fitted(name, box.w, 12, 600)),
    );
    const inside = clipped(box);
    for (const [label, values] of curves) {
      inside.append(el("path", { class: `line solid ${look(label)}`, d: through(xs, values, y) }));
      const at = steps.indexOf(chosen.get(label));
      if (!isLog && at >= 0 && values[at] !== null)
        inside.append(
          el("circle", { class: `line solid ${look(label)}`, cx: xs[at], cy: y(values[at]), r: 5 }),
        );
    }
    svg.append(inside);
    return {
      box,
      xs,
      head: (t) => `${DATA.methods.unit} ${count(steps[t])}: ${name}`,
      series: curves.map(([label, values]) => ({ name: label, values, y })),
    };
  });
  const last = labels
    .slice(0, 8)
    .map((label) => `${shown(label).slice(0, 40)} ${num(curve(label, (row) => row.relative_error).at(-1))}`);
  return {
    height,
    label: `Relative error of ${labels.length} methods at the last step: ${last.join(", ")}.`,
    probe: seriesProbe(panels),
  };
}

const csvMethods = () => [
  [
    "method",
    "label",
    "step",
    "BatchNorm",
    "weight MSE",
    "relative error",
    "stored bytes",
    "fit s",
    ...DATA.methods.scores,
  ],
  ...DATA.methods.methods.map((row) => [
    row.method,
    row.label,
    row.step,
    row.batch_norm,
    row.weight_mse,
    row.relative_error,
    row.stored_bytes,
    row.fit_s,
    ...DATA.methods.scores.map((name) => row.scores[name]),
  ]),
];

// ---- error against the number of modes ----------------------------------------------------------

function drawFits(svg, width) {
  const fits = [...DATA.fits].sort((a, b) => a.n_modes - b.n_modes || a.n_samples - b.n_samples);
  const box = { x: 60, y: 26, w: Math.min(width - 76, 640), h: 230 };
  const [fewest, most] = extent(fits.map((fit) => fit.n_modes));
  const x =
    most > 15 * Math.max(fewest, 1) && fewest > 0
      ? logarithmic([fewest / 1.15, most * 1.15], box.x, box.x + box.w)
      : linear(airy([fewest, most]), box.x, box.x + box.w);
  const known = extent(
    fits.map((fit) => fit.weight_mse),
    0,
  );
  const y = known
    ? logarithmic([known[0] / 1.5, known[1] * 1.5], box.y + box.h, box.y)
    : linear([0, 1], box.y + box.h, box.y);
  axes(svg, box, x, y, {
    xName: "modes M",
    yName: "mean squared error of the weights",
    xTicks: [...new Set(fits.map((fit) => fit.n_modes))],
  });
  const drawn = fits.filter((fit) => fit.weight_mse > 0);
  for (const samples of new Set(drawn.map((fit) => fit.n_samples))) {
    const line = drawn.filter((fit) => fit.n_samples === samples);
    svg.append(
      el("path", {
        class: "line solid thin chance",
        d: through(
          line.map((fit) => x(fit.n_modes)),
          line.map((fit) => fit.weight_mse),
          y,
        ),
      }),
    );
  }
  for (const fit of drawn) {
    svg.append(
      el("circle", {
        class: "dot ink",
        cx: x(fit.n_modes),
        cy: y(fit.weight_mse),
        r: 4.5,
        "fill-opacity": 1,
      }),
    );
    if (fit.this)
      svg.append(el("circle", { class: "ring", cx: x(fit.n_modes), cy: y(fit.weight_mse), r: 8.5 }));
  }
  const marks = drawn.map((fit) => ({
    x: x(fit.n_modes),
    y: y(fit.weight_mse),
    lines: [
      fit.name,
      `M = ${fit.n_modes}, K = ${count(fit.n_samples)}`,
      `weight MSE ${num(fit.weight_mse)}`,
      `R² ${num(fit.r2)}, by energy ${num(fit.r2_energy)}`,
    ],
  }));
  if (!drawn.length)
    svg.append(
      el(
        "text",
        { class: "quiet", x: box.x + 8, y: box.y + 20 },
        "every fit is exact, or of no finite weight",
      ),
    );
  const [first, last] = [drawn[0], drawn.at(-1)];
  const said = drawn.length
    ? `from ${num(first.weight_mse)} at M = ${first.n_modes} to ${num(last.weight_mse)} at M = ${last.n_modes}`
    : "no error above zero";
  return {
    height: box.y + box.h + 38,
    label: `Mean squared error of the weights of ${fits.length} fits: ${said}.`,
    probe: marksProbe(marks),
  };
}

const csvFits = () => [
  ["fit", "modes", "samples", "weight MSE", "R2", "R2 by energy", "mean |corr|", "bytes", "this page"],
  ...DATA.fits.map((fit) => [
    fit.name,
    fit.n_modes,
    fit.n_samples,
    fit.weight_mse,
    fit.r2,
    fit.r2_energy,
    fit.mean_abs_correlation,
    fit.result_bytes,
    fit.this,
  ]),
];
