// The matrix of |corr|: an image, and the blocks of the modes above it.

/** The images stand under the drawing; they are in the data and in no other place, for they are large. */
function showMatrix() {
  const matrix = document.querySelector(".matrix");
  if (!matrix) return;
  const { ordered, unordered, shown: n, modes } = DATA.correlation;
  const words = `Matrix of |corr| between ${count(n)} sampled weights`;
  matrix.prepend(
    html("img", { id: "matrix-ordered", src: ordered, alt: `${words}, by mode: ${modes.length} blocks` }),
    html("img", {
      id: "matrix-unordered",
      src: unordered,
      alt: `${words}, in the order of the model`,
      hidden: "",
    }),
  );
}

function drawCorrelation(svg, width) {
  const { edges, modes, within, between, shown: total } = DATA.correlation;
  const at = (edge) => (edge / total) * width;
  const ordered = !byId("matrix-ordered").hidden;
  const blockAt = (x) =>
    Math.max(
      0,
      modes.findIndex((_, b) => x < at(edges[b + 1]) || b === modes.length - 1),
    );
  if (ordered) {
    modes.forEach((mode, b) => {
      const [from, size] = [at(edges[b]), at(edges[b + 1]) - at(edges[b])];
      svg.append(
        el("rect", { class: "across", "data-mode": mode, x: 0, y: from, width, height: size }),
        el("rect", { class: "across", "data-mode": mode, x: from, y: 0, width: size, height: width }),
        ...(modes.length > 60
          ? []
          : [el("rect", { class: "shade", x: from, y: from, width: size, height: size })]),
        el("rect", {
          class: "block",
          "data-mode": mode,
          x: from + 0.5,
          y: from + 0.5,
          width: Math.max(size - 1, 0.5),
          height: Math.max(size - 1, 0.5),
        }),
      );
    });
  }
  const size = (b) => edges[b + 1] - edges[b];
  const middle = (b) => (at(edges[b]) + at(edges[b + 1])) / 2;
  const probe = ordered
    ? {
        first: () => ({ i: 0, j: 0 }),
        at: (x, y) => ({ i: blockAt(y), j: blockAt(x) }),
        move: ({ i }, dx, dy) => {
          const b = Math.min(Math.max(i + (dx || dy), 0), modes.length - 1);
          return { i: b, j: b };
        },
        read: ({ i, j }) => ({
          x: middle(j),
          y: middle(i),
          lines:
            i === j
              ? [
                  modeName(modes[i]),
                  `mean |corr| ${num(within[i], 3)}`,
                  `${count(size(i))} of ${count(total)} sampled weights`,
                ]
              : [
                  `modes ${modes[i]} and ${modes[j]}`,
                  ...(between ? [`mean |corr| ${num(between[i][j], 3)}`] : []),
                  `${count(size(i))} × ${count(size(j))} pairs of weights`,
                ],
          mode: modes[i],
        }),
      }
    : marksProbe([
        {
          x: width / 2,
          y: width / 2,
          lines: ["the order of the model", `${count(total)} sampled weights`],
        },
      ]);
  if (!ordered)
    svg.append(el("rect", { class: "block", x: 0.5, y: 0.5, width: width - 1, height: width - 1 }));
  const pairs = modes.map((_, b) => size(b) ** 2);
  const sum = (values) => values.reduce((all, value) => all + value, 0);
  const mean = sum(pairs.map((n, b) => n * within[b])) / sum(pairs);
  const words = ordered
    ? `ordered by mode: ${modes.length} blocks along the diagonal, mean |corr| within them ${num(mean, 3)}`
    : "in the order of the model";
  return { height: width, label: `|corr| between ${count(total)} sampled weights, ${words}.`, probe };
}

const csvCorrelation = () => {
  const { edges, modes, within, between } = DATA.correlation;
  return [
    [
      "mode",
      "first weight",
      "weights",
      "mean |corr| within",
      ...(between ? modes.map((mode) => `mean |corr| with mode ${mode}`) : []),
    ],
    ...modes.map((mode, b) => [
      mode,
      edges[b],
      edges[b + 1] - edges[b],
      within[b],
      ...(between ? between[b] : []),
    ]),
  ];
};
