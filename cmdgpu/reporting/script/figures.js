// Figures are registered, drawn, pointed at; a mode and a step go through all of them.

// ---- figures: drawing, pointing, focus ----------------------------------------------------------

const figures = new Map();

/** Register a figure. draw(svg, width) fills it and gives {height, label, probe, now(t)}; csv() gives rows. */
function figure(id, parts) {
  const host = document.querySelector(`#fig-${id} .plot`);
  if (host) figures.set(id, { id, host, svg: null, place: null, ...parts });
}

const widthOf = (fig) => Math.max(state.paper ?? fig.host.clientWidth, 240);

function redraw(id, width) {
  const fig = figures.get(id);
  if (!fig) return;
  if (!fig.svg) {
    fig.svg = el("svg", { role: "img", tabindex: 0, "aria-describedby": "keys" });
    fig.host.replaceChildren(fig.svg);
    listen(fig);
  }
  fig.svg.replaceChildren();
  fig.width = width ?? widthOf(fig);
  fig.place = null;
  fig.drawn = fig.draw(fig.svg, fig.width);
  fig.svg.setAttribute("viewBox", `0 0 ${fig.width} ${Math.ceil(fig.drawn.height)}`);
  fig.svg.setAttribute("aria-label", fig.drawn.label);
  fig.drawn.now?.(state.t);
  markLit(fig.svg);
}

/** One figure that cannot be drawn takes no other with it; the console and window.onerror hear of it. */
function redrawAll() {
  unpoint();
  const widths = new Map([...figures.values()].map((fig) => [fig, widthOf(fig)])); // one layout for all
  for (const [fig, width] of widths) {
    try {
      redraw(fig.id, width);
    } catch (error) {
      fig.host.replaceChildren(html("p", { class: "missing" }, "This figure could not be drawn."));
      fig.svg = null;
      reportError(error);
    }
  }
}

function listen(fig) {
  const { svg } = fig;
  const under = (event) => {
    const frame = svg.getBoundingClientRect();
    const zoom = fig.width / frame.width;
    return fig.drawn.probe.at((event.clientX - frame.left) * zoom, (event.clientY - frame.top) * zoom);
  };
  svg.addEventListener("pointermove", (event) => {
    fig.place = under(event);
    const there = point(fig);
    svg.classList.toggle("chosen", there !== null && there.mode !== null);
  });
  svg.addEventListener("pointerleave", unpoint);
  svg.addEventListener("click", (event) => {
    fig.place = under(event);
    const there = point(fig);
    if (there && there.mode !== null) toggle(there.mode);
  });
  svg.addEventListener("focus", () => {
    if (!svg.matches(":focus-visible")) return;
    fig.place ??= fig.drawn.probe.first();
    say(point(fig));
  });
  svg.addEventListener("blur", unpoint);
  svg.addEventListener("keydown", (event) => {
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[
      event.key
    ] ?? [0, 0];
    const enter = event.key === "Enter" || event.key === " ";
    if (!dx && !dy && !enter) return;
    event.preventDefault();
    fig.place ??= fig.drawn.probe.first();
    if (fig.place === null) return;
    if (!enter) fig.place = fig.drawn.probe.move(fig.place, dx, dy);
    const there = point(fig);
    if (!enter) say(there);
    else if (there && there.mode !== null) {
      const kept = fig.place; // a figure that is drawn again for the mode forgets its place
      toggle(there.mode);
      fig.place ??= kept;
    }
  });
}

let pointed = null; // {fig, there} of the values that are shown

/** Show what is at the figure's place; null where nothing is. */
function point(fig) {
  unpoint();
  if (fig.place === null) return null;
  const there = fig.drawn.probe.read(fig.place);
  pointed = { fig, there };
  for (const look of ["cursor halo", "cursor"])
    fig.svg.append(el("circle", { class: look, cx: there.x, cy: there.y, r: 5 }));
  const tip = byId("tip");
  tip.replaceChildren(...there.lines.map((line) => html("div", {}, html("bdi", {}, shown(line)))));
  placeTip();
  return there;
}

/** The values stay at their mark while the page is scrolled, and go with it. */
function placeTip() {
  if (!pointed) return;
  const { fig, there } = pointed;
  const tip = byId("tip");
  tip.hidden = false;
  const frame = fig.svg.getBoundingClientRect();
  const zoom = frame.width / fig.width;
  const [x, y] = [frame.left + there.x * zoom, frame.top + there.y * zoom];
  tip.hidden = y < 0 || y > innerHeight;
  const right = x + 14 + tip.offsetWidth < document.documentElement.clientWidth - 4;
  tip.style.left = `${Math.max(right ? x + 14 : x - 14 - tip.offsetWidth, 4)}px`;
  tip.style.top = `${Math.min(Math.max(y - tip.offsetHeight - 10, 4), innerHeight - tip.offsetHeight - 4)}px`;
}

function unpoint() {
  pointed?.fig.svg?.querySelectorAll(".cursor").forEach((old) => old.remove());
  pointed = null;
  byId("tip").hidden = true;
}

function say(there) {
  if (there) byId("said").textContent = there.lines.map(shown).join(", ");
}

// ---- one mode through every figure --------------------------------------------------------------

const toggle = (mode) => light(mode === state.lit ? null : mode);

function markLit(root) {
  for (const node of root.querySelectorAll("[data-mode]")) {
    const lit = Number(node.dataset.mode) === state.lit;
    node.classList.toggle("lit", lit);
    if (node.matches("button")) node.setAttribute("aria-pressed", lit);
    if (lit && node.matches(".line")) node.parentNode.append(node); // above the others
  }
}

function light(mode) {
  state.lit = mode;
  document.documentElement.classList.toggle("dim", mode !== null);
  if (mode === null) document.documentElement.removeAttribute("data-lit");
  else document.documentElement.dataset.lit = mode;
  if (mode !== null && DATA.weights.some((weight) => weight.mode === mode)) chooseWeights(mode);
  const otherwise = ["network", "abs_correlation", ...(M > FIRST_PANELS && !state.allBands ? ["bands"] : [])];
  for (const id of otherwise) redraw(id); // these show a lit mode in another way
  markLit(document);
  byId("pill").hidden = mode === null;
  if (mode !== null) {
    const share = DATA.profiles.share[mode];
    byId("pill-name").textContent = `mode ${mode}, ${percent(share)} of the weights that move`;
    byId("said").textContent = `mode ${mode} is lit`;
  }
  const place = mode === null ? location.pathname + location.search : `#mode=${mode}`;
  if (mode !== null || location.hash.startsWith("#mode=")) history.replaceState(null, "", place);
}

/** The mode that the address names, if there is such a mode. */
function fromAddress() {
  const found = /^#mode=(\d+)$/.exec(location.hash);
  if (found && Number(found[1]) < M) light(Number(found[1]));
}

// ---- one step through every figure --------------------------------------------------------------

/** A line at the chosen step in every box; gives the function that moves it. */
function stepMarks(svg, boxes, xs) {
  const lines = boxes.map((box) => el("line", { class: "now", y1: box.y, y2: box.y + box.h }));
  svg.append(...lines);
  return (t) =>
    lines.forEach((line, i) => {
      line.setAttribute("x1", xs[i][t]);
      line.setAttribute("x2", xs[i][t]);
    });
}

function toStep(t) {
  state.t = t;
  const [slider, output] = [byId("step"), byId("step-shown")];
  if (slider) {
    slider.value = t;
    slider.setAttribute("aria-valuetext", atStep(t));
    output.textContent = count(STEPS[t]);
  }
  for (const fig of figures.values()) fig.drawn?.now?.(t);
}

/** x of every step in a box, and the scale. */
function timeAxis(box) {
  const x = linear(
    STEPS.length > 1 ? [STEPS[0], STEPS.at(-1)] : airy([STEPS[0], STEPS[0]]),
    box.x,
    box.x + box.w,
  );
  return { x, xs: STEPS.map(x) };
}

// ---- legends ------------------------------------------------------------------------------------

const METHODS = [CMD];
for (const weight of DATA.weights)
  for (const label of Object.keys(weight.rebuilt)) if (!METHODS.includes(label)) METHODS.push(label);
for (const row of DATA.methods?.methods ?? []) {
  if (row.method !== "recorded" && row.method !== "cmd" && !METHODS.includes(row.label))
    METHODS.push(row.label);
}
const methodColour = (label) => `c${METHODS.indexOf(label) % COLOURS}`;

/** Keys of lines and bars, and what was chosen for the figure: on paper no control tells it. */
function legend(id, entries, chosen = "") {
  byId(id)?.replaceChildren(
    ...entries.map(([words, look]) =>
      html(
        "span",
        { class: `key ${look.startsWith("bar") ? "" : "line "}${look}` },
        html("bdi", {}, fitted(words, 300)),
      ),
    ),
    ...(chosen ? [html("span", { class: "soft" }, fitted(chosen, 300))] : []),
  );
}
