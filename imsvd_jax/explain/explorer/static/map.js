/* The map: images by the two largest principal components of the features. */
"use strict";

const MAX_LEGEND = 12;  // Entries.

/* What points can be colored by: [key, label] pairs. */
function colorings() {
  return [["none", "nothing"],
    ...core.factors.map((f, i) => [`f${i}`, f.name]),
    ...(core.hasCodes ? range(core.numVariables).map((m) => [`v${m}`,
      `variable ${m}`]) : [])];
}

class Points {
  constructor(all, slots, positions) {
    Object.assign(this, { all, slots, positions });
    this.coloring = core.factors.length ? "f0" : "none";
    this.legend = h("div", { class: "legend" });
    this.canvas = h("canvas", { tabindex: "0", role: "application",
      "aria-label": "Map of the embedding. Arrow keys move, plus and minus "
        + "zoom, zero fits.",
      onpointermove: (event) => this.hover(event), onpointerleave: hideTip,
      onclick: (event) => this.click(event),
      onkeydown: (event) => this.key(event) });
    this.view = new View(this.canvas, 1, 1e5, () => this.draw());
  }

  /* The group of a slot, the number of groups and their names. */
  grouping() {
    const { all, coloring } = this;
    const at = +coloring.slice(1);
    if (coloring === "none") return [() => 0, 1, () => ""];
    if (coloring[0] === "f") {
      return [(slot) => all.factors[at][slot], core.factors[at].values.length,
        (k) => core.factors[at].values[k]];
    }
    return [(slot) => all.codes[at * all.indices.length + slot],
      core.numBins, (k) => `bin ${k}`];
  }

  /* Sorts the points into groups of one color; the last has no value. */
  group() {
    const [value, total, name] = this.grouping();
    const colors = range(total).map((k) => (total === 1 ? token("--accent")
      : category(k, total)));
    this.groups = [...colors, token("--soft")].map((color) => ({ color,
      members: [] }));
    this.slots.forEach((slot, i) => {
      const k = value(slot);
      this.groups[k < 0 ? total : k].members.push(i);
    });
    const entries = total === 1 ? [] : range(Math.min(total, MAX_LEGEND));
    this.legend.replaceChildren(...entries.map((k) => h("span", {},
      h("span", { class: "swatch", style: { background: colors[k] } }),
      name(k))),
    total > MAX_LEGEND ? h("span", {}, `and ${total - MAX_LEGEND} more`) : "");
    this.view.ask();
  }

  screen(i) {
    return this.view.screen(this.positions[2 * i] / 65535,
      1 - this.positions[2 * i + 1] / 65535);
  }

  draw() {
    const [context, width, height] = canvasFor(this.canvas);
    const count = this.slots.length;
    context.fillStyle = token("--panel");
    context.fillRect(0, 0, width, height);
    const side = clamp((count > 8000 ? 1.6 : 3.2)
      * Math.sqrt(this.view.scale / this.view.fitScale), 1.5, 9);
    context.globalAlpha = count > 5000 ? 0.65 : 0.85;
    for (const { color, members } of this.groups) {
      context.fillStyle = color;
      for (const i of members) {
        const [x, y] = this.screen(i);
        if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
        context.fillRect(x - side / 2, y - side / 2, side, side);
      }
    }
    context.globalAlpha = 1;
  }

  /* The slot of the point within 12 pixels that is nearest, or -1. */
  nearest(x, y) {
    let found = -1;
    let closest = 12 ** 2;
    this.slots.forEach((slot, i) => {
      const [px, py] = this.screen(i);
      const apart = (px - x) ** 2 + (py - y) ** 2;
      if (apart < closest) [closest, found] = [apart, slot];
    });
    return found;
  }

  hover(event) {
    const slot = this.nearest(event.offsetX, event.offsetY);
    if (slot < 0) hideTip();
    else showTip(imageTip(this.all, slot), event.clientX, event.clientY);
  }

  click(event) {
    const slot = this.nearest(event.offsetX, event.offsetY);
    if (slot < 0 || !this.view.clicked) return;
    location.hash = `#/image/${this.all.indices[slot]}`;
  }

  key(event) {
    if (this.view.key(event)) return;
    const move = { ArrowUp: [0, 60], ArrowDown: [0, -60], ArrowLeft: [60, 0],
      ArrowRight: [-60, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    this.view.pan(...move);
  }
}

pages.map = async () => {
  const [raw, all] = await Promise.all([load("map"), images()]);
  const points = new Points(all, await typed(Int32Array, raw.slots),
    await typed(Uint16Array, raw.points));
  page.redraws.push(() => points.group());
  page.afterShow = () => { points.view.fit(); points.group(); };
  const [x, y] = raw.explained;
  return [
    h("div", { class: "head" }, heading("Map of the embedding"),
      h("div", { class: "controls" }, choice("Color by", colorings(),
        points.coloring, (chosen) => {
          points.coloring = chosen;
          points.group();
        }, "color-by"))),
    h("p", { class: "soft" }, `The first two principal components of the `
      + `features explain ${percent(x)} and ${percent(y)} of the variance; `
      + "each axis is scaled to fill the square. "
      + `${number(points.slots.length)} images. Select a point to open its `
      + "image."),
    h("div", { class: "stage" }, points.canvas, points.view.buttons()),
    points.legend,
  ];
};
