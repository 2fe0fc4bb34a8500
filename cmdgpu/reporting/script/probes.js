// What is under the pointer, and what the arrow keys come to.

// at(x, y) and first() give a place, move(place, dx, dy) the next one, read(place) what is there:
// {x, y, lines, mode}.

/** Of panels {box, xs, head(i), series: [{name, mode, values, y, text(value, i)}]}. */
function seriesProbe(panels) {
  const nearest = (list, distance) => {
    let [best, least] = [0, Infinity];
    list.forEach((item, i) => {
      const away = distance(item, i);
      if (away < least) [best, least] = [i, away];
    });
    return best;
  };
  const outside = (box, x, y) =>
    Math.max(box.x - x, 0, x - box.x - box.w) + Math.max(box.y - y, 0, y - box.y - box.h);
  return {
    first: () => ({ p: 0, i: panels[0].xs.length - 1, s: 0 }),
    at(x, y) {
      const p = nearest(panels, (panel) => outside(panel.box, x, y));
      const i = nearest(panels[p].xs, (at) => Math.abs(at - x));
      const s = nearest(panels[p].series, ({ values, y: scale }) => {
        const value = values[i];
        return value === null || value === undefined ? Infinity : Math.abs(scale(value) - y);
      });
      return { p, i, s };
    },
    move({ p, i, s }, dx, dy) {
      let [q, r] = [p, s + dy];
      if (r < 0 && p > 0) [q, r] = [p - 1, panels[p - 1].series.length - 1];
      else if (r >= panels[p].series.length && p + 1 < panels.length) [q, r] = [p + 1, 0];
      const clamp = (value, length) => Math.min(Math.max(value, 0), length - 1);
      return { p: q, i: clamp(i + dx, panels[q].xs.length), s: clamp(r, panels[q].series.length) };
    },
    read({ p, i, s }) {
      const panel = panels[p];
      const say = (one) => {
        const value = one.values[i];
        return `${one.name}: ${one.text ? one.text(value, i) : num(value)}`;
      };
      const one = panel.series[s];
      const others = panel.series.length <= 7 ? panel.series.filter((_, k) => k !== s) : [];
      const value = one.values[i];
      const there = value !== null && value !== undefined;
      return {
        x: panel.xs[i],
        y: there
          ? Math.min(Math.max(one.y(value), panel.box.y), panel.box.y + panel.box.h)
          : panel.box.y + panel.box.h,
        lines: [panel.head(i), say(one), ...others.map(say)],
        mode: one.mode ?? null,
      };
    },
  };
}

/** Of marks {x, y, w, h, lines, mode, row}: boxes or points; up and down change the row where there are rows. */
function marksProbe(marks) {
  const away = (mark, x, y) =>
    Math.hypot(
      Math.max(mark.x - x, 0, x - mark.x - (mark.w ?? 0)),
      Math.max(mark.y - y, 0, y - mark.y - (mark.h ?? 0)),
    );
  const closest = (x, y, wanted = () => true) => {
    let [best, least] = [null, Infinity];
    marks.forEach((mark, i) => {
      const distance = wanted(mark) ? away(mark, x, y) : Infinity;
      if (distance < least) [best, least] = [i, distance];
    });
    return best;
  };
  const centre = (mark) => [mark.x + (mark.w ?? 0) / 2, mark.y + (mark.h ?? 0) / 2];
  return {
    first: () => (marks.length ? 0 : null),
    at: (x, y) => closest(x, y),
    move(i, dx, dy) {
      if (dy && marks[i].row !== undefined)
        return closest(...centre(marks[i]), (mark) => mark.row === marks[i].row + dy) ?? i;
      return Math.min(Math.max(i + dx + dy, 0), marks.length - 1);
    },
    read(i) {
      const [x, y] = centre(marks[i]);
      const lines = typeof marks[i].lines === "function" ? marks[i].lines() : marks[i].lines;
      return { x, y, lines, mode: marks[i].mode ?? null };
    },
  };
}
