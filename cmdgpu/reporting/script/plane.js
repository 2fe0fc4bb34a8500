// The path of training in a plane.

/** What an axis of the plane shows: {name, recorded, rebuilt or null, mode or null}. */
function direction(axis) {
  const [kind, number] = axis.split(" ");
  const k = Number(number);
  if (kind === "mode")
    return { name: `profile of mode ${k}`, recorded: DATA.profiles.z[k], rebuilt: null, mode: k };
  const { recorded, rebuilt, explained } = DATA.plane;
  return {
    name: `principal component ${k + 1} (${percent(explained[k])})`,
    recorded: recorded[k],
    rebuilt: rebuilt[k],
    mode: null,
  };
}

function drawPlane(svg, width) {
  const [across, up] = [direction(state.across), direction(state.up)];
  const box = { x: 60, y: 26, w: Math.min(width - 76, 620), h: Math.min(0.75 * width, 360) };
  const both = across.rebuilt && up.rebuilt;
  const x = linear(airy(extent([across.recorded, both ? across.rebuilt : []]), 0.08), box.x, box.x + box.w);
  const y = linear(airy(extent([up.recorded, both ? up.rebuilt : []]), 0.08), box.y + box.h, box.y);
  axes(svg, box, x, y, { xName: across.name, yName: up.name });
  const paths = [
    ["recorded", "ink", across.recorded, up.recorded],
    ...(both ? [[`rebuilt by ${CMD}`, methodColour(CMD), across.rebuilt, up.rebuilt]] : []),
  ];
  legend("legend-plane", paths.length > 1 ? paths.map(([name, look]) => [name, look]) : []);
  const marks = [];
  for (const [name, look, xs, ys] of paths) {
    const at = xs.map((value) => (value === null ? NaN : x(value)));
    svg.append(
      el("path", {
        class: `line solid thin ${look}`,
        "stroke-opacity": 0.6,
        d: through(
          at,
          ys.map((value, t) => (xs[t] === null ? null : value)),
          y,
        ),
      }),
    );
    xs.forEach((value, t) => {
      if (value === null || ys[t] === null) return;
      svg.append(
        el("circle", {
          class: `bar ${look}`,
          cx: at[t],
          cy: y(ys[t]),
          r: 3,
          "fill-opacity": 0.2 + (0.8 * (t + 1)) / xs.length,
        }),
      );
      marks.push({
        x: at[t],
        y: y(ys[t]),
        mode: across.mode ?? up.mode,
        lines: [`${name}, ${atStep(t)}`, `${across.name}: ${num(value)}`, `${up.name}: ${num(ys[t])}`],
      });
    });
  }
  for (const [t, anchor] of [
    [0, "start"],
    [STEPS.length - 1, "end"],
  ]) {
    if (across.recorded[t] === null || up.recorded[t] === null) continue;
    const [cx, cy] = [x(across.recorded[t]), y(up.recorded[t])];
    const side = cx > box.x + 0.5 * box.w ? "end" : "start";
    svg.append(
      el(
        "text",
        {
          class: "name over",
          x: cx + (side === "end" ? -12 : 12),
          y: cy + (cy < box.y + 18 ? 16 : -8),
          "text-anchor": side,
        },
        `${anchor === "start" ? "first" : "last"}: ${fitted(atStep(t), 120)}`,
      ),
    );
  }
  const dots = paths.map(() => el("circle", { class: "now-dot", r: 5.5 }));
  svg.append(...dots);
  return {
    height: box.y + box.h + 38,
    label: `Path of training over ${STEPS.length} snapshots: ${across.name} against ${up.name}.`,
    probe: marksProbe(marks),
    now: (t) =>
      paths.forEach(([, , xs, ys], i) => {
        const known = xs[t] !== null && ys[t] !== null;
        dots[i].setAttribute("cx", known ? x(xs[t]) : -1e6);
        dots[i].setAttribute("cy", known ? y(ys[t]) : -1e6);
      }),
  };
}

const csvPlane = () => {
  const [across, up] = [direction(state.across), direction(state.up)];
  const both = across.rebuilt && up.rebuilt;
  return [
    [DATA.unit, across.name, up.name, ...(both ? ["rebuilt across", "rebuilt up"] : [])],
    ...STEPS.map((step, t) => [
      step,
      across.recorded[t],
      up.recorded[t],
      ...(both ? [across.rebuilt[t], up.rebuilt[t]] : []),
    ]),
  ];
};
