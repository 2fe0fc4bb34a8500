// Controls, contents, paper; then everything is drawn once.

// ---- controls -----------------------------------------------------------------------------------

/** Buttons of which one is pressed. */
function choice(key, pressed, changed) {
  const buttons = [...document.querySelectorAll(`[data-${key}]`)];
  const show = (value) =>
    buttons.forEach((button) => button.setAttribute("aria-pressed", button.dataset[key] === value));
  buttons.forEach((button) =>
    button.addEventListener("click", () => {
      show(button.dataset[key]);
      changed(button.dataset[key]);
    }),
  );
  show(pressed);
}

/** Fill a select with [value, words] and act on a change. */
function options(id, entries, value, changed) {
  const select = byId(id);
  if (!select) return;
  select.replaceChildren(
    ...entries.map(([key, words]) => html("option", { value: key }, fitted(words, 260))),
  );
  select.value = value;
  select.addEventListener("change", () => changed(select.value));
}

function more(id, field, figureId, words) {
  const button = byId(id);
  button?.addEventListener("click", () => {
    state[field] = !state[field];
    button.setAttribute("aria-expanded", state[field]);
    if (words) button.textContent = words(state[field]);
    redraw(figureId);
  });
}

function theme() {
  const sheet = byId("dark");
  const button = byId("theme");
  const dark = () => matchMedia(sheet.media).matches;
  const name = () => (button.textContent = dark() ? "Light colours" : "Dark colours");
  button.addEventListener("click", () => {
    sheet.media = dark() ? "not all" : "screen";
    name();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();
}

function controls() {
  const redraws = (field, id) => (value) => {
    state[field] = value;
    redraw(id);
  };
  choice("order", "ordered", (order) => {
    byId("matrix-ordered").hidden = order !== "ordered";
    byId("matrix-unordered").hidden = order === "ordered";
    redraw("correlation");
  });
  choice("level", state.level, (level) => {
    state.allBars = false;
    redraws("level", "network")(level);
  });
  for (const button of document.querySelectorAll("[data-level]"))
    button.hidden = !DATA.network[button.dataset.level].length;
  more("more-bands", "allBands", "bands", (all) =>
    all ? `show the ${FIRST_PANELS} largest` : `show all ${M} modes`,
  );
  more("more-network", "allBars", "network");
  byId("log-histogram")?.addEventListener("change", (event) => {
    state.logarithmic = event.target.checked;
    for (const id of ["abs_correlation", "r2"]) redraw(id);
  });
  if (DATA.histogram)
    legend("legend-histogram", [
      ["the weights", "bar grey"],
      ...Object.keys(DATA.histogram.chance).map((model, k) => [model, `thin ink ${NULL_LOOKS[k % 3]}`]),
    ]);
  const sampled = [...new Set(DATA.weights.map((weight) => weight.mode))].sort((a, b) => a - b);
  options(
    "weights-mode",
    sampled.map((mode) => [mode, `${mode} (${percent(DATA.profiles.share[mode])})`]),
    state.weightsMode,
    (mode) => chooseWeights(Number(mode)),
  );
  options(
    "rebuilt-method",
    REBUILDERS.map((label) => [label, label]),
    CMD,
    redraws("method", "rebuilt"),
  );
  if (REBUILDERS.length > 1) byId("rebuilt-by").hidden = false;
  byId("step")?.addEventListener("input", (event) => toStep(Number(event.target.value)));
  if (DATA.methods && DATA.methods.batch_norm.length > 1) {
    byId("batch-norm").hidden = false;
    options(
      "treatment",
      DATA.methods.batch_norm.map((name) => [name, name]),
      state.treatment,
      redraws("treatment", "methods"),
    );
  }
  const directions = [
    ...(DATA.plane ? [0, 1].map((k) => [`component ${k}`, `component ${k + 1}`]) : []),
    ...Array.from({ length: M }, (_, mode) => [`mode ${mode}`, modeName(mode)]),
  ];
  options("plane-x", directions, state.across, redraws("across", "plane"));
  options("plane-y", directions, state.up, redraws("up", "plane"));
  if (DATA.landscape)
    options(
      "landscape-score",
      Object.keys(DATA.landscape.scores).map((name) => [name, name]),
      state.score,
      redraws("score", "landscape"),
    );
  if (byId("filter")) filterTensors();
  document.querySelectorAll("table.sortable").forEach(sortable);
  for (const link of document.querySelectorAll("a.csv")) {
    link.href = "#";
    link.addEventListener("click", () => download(link));
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("button[data-mode]");
    if (button) toggle(Number(button.dataset.mode));
  });
  byId("pill-clear").addEventListener("click", () => light(null));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    unpoint();
    if (state.lit !== null) light(null);
  });
  document.addEventListener("pointerdown", (event) => {
    if (!pointed?.fig.svg.contains(event.target)) unpoint(); // a finger leaves no figure by lifting
  });
  addEventListener("scroll", placeTip, { passive: true });
  addEventListener("hashchange", fromAddress);
}

/** The contents say where the reader is. */
function contents() {
  const nav = document.querySelector("nav");
  const links = new Map([...nav.querySelectorAll("a")].map((link) => [link.hash.slice(1), link]));
  const observer = new IntersectionObserver(
    (entries) => {
      const entry = entries.findLast(({ isIntersecting }) => isIntersecting);
      if (!entry) return;
      for (const link of links.values()) link.removeAttribute("aria-current");
      const link = links.get(entry.target.id);
      link.setAttribute("aria-current", "true");
      nav.scrollLeft = link.offsetLeft - 40;
    },
    { rootMargin: "-12% 0px -78% 0px" },
  );
  for (const id of links.keys()) observer.observe(byId(id));
}

/** Figures are as wide as their place; on paper as wide as a page. */
function follow() {
  let width = byId("main").clientWidth;
  let due = 0;
  new ResizeObserver(() => {
    cancelAnimationFrame(due);
    due = requestAnimationFrame(() => {
      if (byId("main").clientWidth === width || state.paper) return;
      width = byId("main").clientWidth;
      redrawAll();
    });
  }).observe(byId("main"));
  const onPaper = (printing) => {
    state.paper = printing ? 680 : null;
    redrawAll();
  };
  addEventListener("beforeprint", () => onPaper(true));
  addEventListener("afterprint", () => onPaper(false));
  matchMedia("print").addEventListener("change", (event) => onPaper(event.matches));
}

// ---- all of it ----------------------------------------------------------------------------------

document.documentElement.classList.add("live");
showMatrix();
figure("scalars", { draw: drawScalars, csv: csvScalars });
figure("chance", { draw: drawChance, csv: csvChance });
figure("correlation", { draw: drawCorrelation, csv: csvCorrelation });
figure("profiles", { draw: drawProfiles, csv: csvProfiles });
figure("bands", { draw: drawBands, csv: csvBands });
figure("network", { draw: drawNetwork, csv: csvNetwork });
figure("abs_correlation", {
  draw: drawHistogram("abs_correlation", "|corr|"),
  csv: csvHistogram("abs_correlation"),
});
figure("r2", { draw: drawHistogram("r2", "R²"), csv: csvHistogram("r2") });
figure("weights", { draw: drawWeights, csv: csvWeights });
figure("rebuilt", { draw: drawRebuilt, csv: csvRebuilt });
figure("methods", { draw: drawMethods, csv: csvMethods });
figure("fits", { draw: drawFits, csv: csvFits });
figure("plane", { draw: drawPlane, csv: csvPlane });
figure("landscape", { draw: drawLandscape, csv: csvLandscape });
controls();
redrawAll();
toStep(state.t);
markLit(document);
theme();
contents();
follow();
fromAddress();
document.documentElement.dataset.ready = "1";
