// References together, and one panel per mode with its band.

function drawProfiles(svg, width) {
  const { z, share } = DATA.profiles;
  const box = { x: 48, y: 26, w: width - 60, h: Math.min(320, 140 + 0.3 * width) };
  const { x, xs } = timeAxis(box);
  const y = linear(airy(extent(z)), box.y + box.h, box.y);
  axes(svg, box, x, y, { xName: DATA.unit, yName: "centred, unit norm" });
  const layer = el("g");
  const look = M > 60 ? "line thin many" : M > 24 ? "line thin" : "line";
  for (let mode = M - 1; mode >= 0; mode--)
    layer.append(
      el("path", { class: `${look} ${colour(mode)}`, "data-mode": mode, d: through(xs, z[mode], y) }),
    );
  svg.append(layer);
  const series = z.map((values, mode) => ({ name: modeName(mode), mode, values, y }));
  const biggest = share.indexOf(Math.max(...share));
  return {
    height: box.y + box.h + 38,
    label: `Reference profiles of ${M} modes over ${STEPS.length} snapshots; mode ${biggest} has most weights, ${percent(share[biggest])}.`,
    probe: seriesProbe([{ box, xs, head: atStep, series }]),
    now: stepMarks(svg, [box], [xs]),
  };
}

const csvProfiles = () => [
  [DATA.unit, ...DATA.profiles.z.map((_, mode) => modeName(mode))],
  ...STEPS.map((step, t) => [step, ...DATA.profiles.z.map((values) => values[t])]),
];

function drawBands(svg, width) {
  const { z, low, high, share, size, sampled } = DATA.profiles;
  const bySize = z.map((_, mode) => mode).sort((a, b) => size[b] - size[a]);
  const chosen = bySize.filter((mode, order) => state.allBands || order < FIRST_PANELS || mode === state.lit);
  const modes = chosen.sort((a, b) => a - b);
  const { boxes, columns, height } = gridOf(width, modes.length, {
    least: 120,
    height: 96,
    left: 34,
    top: 40,
    bottom: 12,
    most: 5,
  });
  const range = airy(extent(modes.map((mode) => [z[mode], low[mode], high[mode]])));
  const panels = modes.map((mode, i) => {
    const box = boxes[i];
    const { x, xs } = timeAxis(box);
    const y = linear(range, box.y + box.h, box.y);
    const last = i + columns >= modes.length;
    axes(svg, box, last ? x : null, y, { format: i % columns ? () => "" : tickText });
    svg.append(
      el(
        "g",
        { class: `panel ${colour(mode)}` },
        el(
          "text",
          { class: "name", "data-mode": mode, x: box.x, y: box.y - 21, "font-weight": 600 },
          modeName(mode),
        ),
        el(
          "text",
          { class: "tick", x: box.x, y: box.y - 6 },
          fitted(`${percent(share[mode])}, ${count(size[mode])} weights`, box.w + 6, 11.5),
        ),
        el("path", { class: "band", "data-mode": mode, d: between(xs, low[mode], high[mode], y) }),
        el("path", { class: "line solid", "data-mode": mode, d: through(xs, z[mode], y) }),
      ),
    );
    const spread = (_, t) =>
      low[mode][t] === null ? "none" : `${num(low[mode][t], 3)} to ${num(high[mode][t], 3)}`;
    const series = [
      { name: "reference", mode, values: z[mode], y },
      { name: "95 % of its sampled weights", mode, values: high[mode], y, text: spread },
    ];
    return { box, xs, head: (t) => `${modeName(mode)}, ${atStep(t)}`, series };
  });
  return {
    height: height + 12,
    label: `Profiles of ${modes.length} of ${M} modes with 95 % bands; ${sampled.filter((n) => n > 1).length} modes have a band.`,
    probe: seriesProbe(panels),
    now: stepMarks(
      svg,
      boxes,
      panels.map(({ xs }) => xs),
    ),
  };
}

const csvBands = () => [
  ["mode", DATA.unit, "reference", "low 2.5 %", "high 97.5 %", "as stored"],
  ...DATA.profiles.z.flatMap((values, mode) =>
    STEPS.map((step, t) => [
      mode,
      step,
      values[t],
      DATA.profiles.low[mode][t],
      DATA.profiles.high[mode][t],
      DATA.profiles.raw[mode][t],
    ]),
  ),
];
