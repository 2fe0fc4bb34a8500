// Numbers to take away, tables to sort and filter.

// ---- CSV ----------------------------------------------------------------------------------------

/** Quoted where it must be; text that a spreadsheet would take for a formula gets an apostrophe before it. */
function csvCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "string") return String(value);
  const safe = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function download(link) {
  const rows = link.dataset.csv === "tensors" ? csvTensors() : figures.get(link.dataset.csv).csv();
  const text = rows.map((row) => row.map(csvCell).join(",")).join("\r\n") + "\r\n";
  const url = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.href = url;
  setTimeout(() => {
    URL.revokeObjectURL(url);
    link.href = "#";
  }, 10000);
}

// ---- tables: sorted by a click on a heading, filtered by text -----------------------------------

/** What a cell is sorted by: a number, or text; null comes last whichever way. */
function sortKey(cell) {
  const text = (cell.dataset.v ?? cell.textContent).trim();
  if (text === "" || text === "–") return null;
  const number = Number(text.replace(/,/g, "").replace(/\s*%$/, ""));
  return Number.isNaN(number) ? text : number;
}

function sortable(table) {
  const body = table.tBodies[0];
  const first = [...body.rows];
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = html("button", { type: "button" }, heading.textContent);
    heading.replaceChildren(button);
    heading.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const keys = new Map(first.map((row) => [row, sortKey(row.cells[column])]));
      const numeric = [...keys.values()].every((key) => key === null || typeof key === "number");
      const ways = numeric ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
      const way = ways[(ways.indexOf(heading.getAttribute("aria-sort")) + 1) % 3];
      for (const other of table.tHead.rows[0].cells)
        other.setAttribute("aria-sort", other === heading ? way : "none");
      const sign = way === "descending" ? -1 : 1;
      const compare = (a, b) => {
        const [p, q] = [keys.get(a), keys.get(b)];
        if (p === null || q === null) return (p === null) - (q === null);
        return sign * (numeric ? p - q : String(p).localeCompare(String(q), "en", { numeric: true }));
      };
      body.append(...(way === "none" ? first : [...first].sort(compare)));
    });
  });
}

function filterTensors() {
  const table = byId("table-tensors");
  const rows = [...table.tBodies[0].rows];
  const names = new Map(rows.map((row, i) => [row, DATA.network.tensors[i].name.toLowerCase()]));
  byId("filter").addEventListener("input", (event) => {
    state.filter = event.target.value.toLowerCase();
    for (const [row, name] of names) row.hidden = !name.includes(state.filter);
    const left = rows.filter((row) => !row.hidden).length;
    byId("filtered").textContent = state.filter ? `${left} of ${rows.length}` : "";
    if (state.level === "tensors") redraw("network");
  });
}
