// Recorded scalars against the step.

function drawScalars(svg, width) {
  const names = Object.keys(DATA.scalars);
  const { boxes, height } = gridOf(width, names.length, {
    least: 210,
    height: 120,
    most: 3,
    left: 50,
    bottom: 40,
  });
  const panels = names.map((name, i) => {
    const [box, values] = [boxes[i], DATA.scalars[name]];
    const known = values.map((_, t) => t).filter((t) => values[t] !== null); // a scalar may come at some steps only
    const { x, xs } = timeAxis(box);
    const y = linear(airy(extent(values)), box.y + box.h, box.y);
    axes(svg, box, x, y, { xName: DATA.unit });
    svg.append(
      el("text", { class: "name", x: box.x, y: box.y - 9, "font-weight": 600 }, fitted(name, box.w, 12, 600)),
      el("path", {
        class: "line ink solid",
        d: through(
          known.map((t) => xs[t]),
          known.map((t) => values[t]),
          y,
        ),
      }),
    );
    if (known.length < Math.min(values.length, 60))
      svg.append(...known.map((t) => el("circle", { class: "bar ink", cx: xs[t], cy: y(values[t]), r: 2 })));
    return { box, xs, head: atStep, series: [{ name, values, y }] };
  });
  const said = names
    .slice(0, 8)
    .map(
      (name) =>
        `${shown(name).slice(0, 60)} ends at ${num(DATA.scalars[name].findLast((value) => value !== null))}`,
    );
  return {
    height,
    label: `${names.length} recorded scalars: ${said.join(", ")}.`,
    probe: seriesProbe(panels),
    now: stepMarks(
      svg,
      boxes,
      panels.map(({ xs }) => xs),
    ),
  };
}

const csvScalars = () => {
  const names = Object.keys(DATA.scalars);
  return [
    [DATA.unit, ...names],
    ...STEPS.map((step, t) => [step, ...names.map((name) => DATA.scalars[name][t])]),
  ];
};
