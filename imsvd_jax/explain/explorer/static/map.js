/* The map: images by the two largest principal components of the features, or
   by t-SNE. */
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
  constructor(all) {
    this.all = all;
    this.path = null;  // Of the lasso while it is drawn.
    this.isLasso = false;
    this.status = h("div", { class: "controls small", role: "status",
      id: "chosen" });
    this.coloring = core.factors.length ? "f0" : "none";
    this.legend = h("div", { class: "legend" });
    this.canvas = h("canvas", { tabindex: "0", role: "application",
      "aria-label": "Map of the embedding. Arrow keys move, plus and minus "
        + "zoom, zero fits.",
      onpointerdown: (event) => this.press(event),
      onpointermove: (event) => this.hover(event), onpointerleave: hideTip,
      onpointerup: () => this.release(),
      onpointercancel: () => this.release(true),
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
      core.numBins, (k) => binTitle(at, k)];
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
    const isEmpty = (k) => !this.groups[k].members.length;
    const entries = total === 1 ? [] : range(total)
      .sort((a, b) => isEmpty(a) - isEmpty(b)).slice(0, MAX_LEGEND);
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
    const alpha = count > 5000 ? 0.65 : 0.85;
    for (const { color, members } of this.groups) {
      context.fillStyle = color;
      for (const i of members) {
        context.globalAlpha = isSelected(this.slots[i]) ? alpha : 0.12;
        const [x, y] = this.screen(i);
        if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
        context.fillRect(x - side / 2, y - side / 2, side, side);
      }
    }
    context.globalAlpha = 1;
    if (this.path) this.drawPath(context);
  }

  drawPath(context) {
    context.strokeStyle = token("--ink");
    context.lineWidth = 1.5;
    context.beginPath();
    this.path.forEach(([x, y]) => context.lineTo(x, y));
    context.closePath();
    context.stroke();
  }

  /* Shows the points {slots, positions} of another map. */
  show(layout) {
    Object.assign(this, layout);
    this.view.fit();
    this.group();
    this.tell();
  }

  /* Selects the points of which inside(x, y) is true, on the screen. */
  choose(inside) {
    select([...this.slots].filter((_, i) => inside(...this.screen(i))));
    this.tell();
    this.view.ask();
  }

  tell() {
    this.status.replaceChildren(...(selection ? [
      h("span", {}, `${countImages(selection.size)} selected.`),
      h("a", { href: "#/images" }, "Show these images"),
      core.hasCodes && h("a", { href: "#/variables" }, "Their variables"),
    ].filter(Boolean) : []));
    this.clear.disabled = !selection;
  }

  buttons() {
    const button = (text, act) => h("button", { type: "button",
      onclick: act }, text);
    const lasso = button("Lasso", () => {
      this.isLasso = !this.isLasso;
      lasso.setAttribute("aria-pressed", String(this.isLasso));
    });
    lasso.setAttribute("aria-pressed", "false");
    lasso.id = "lasso";
    this.clear = button("Select none", () => this.choose(() => false));
    return [lasso, button("Select what is in view", () => this.choose((x, y) =>
      x >= 0 && y >= 0 && x <= this.view.width && y <= this.view.height)),
    this.clear];
  }

  press(event) {
    if (!this.isLasso && !event.shiftKey) return;
    this.path = [[event.offsetX, event.offsetY]];
    this.view.isStill = true;
    hideTip();
  }

  release(isCancelled = false) {
    const path = isCancelled ? null : this.path;
    this.path = null;
    this.view.isStill = false;
    if (path?.length > 2) this.choose((x, y) => isInside(path, x, y));
    else this.view.ask();
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
    if (this.path) {
      this.path.push([event.offsetX, event.offsetY]);
      this.view.ask();
      return;
    }
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

/* Whether a point is in a polygon: a ray to the right crosses its border an
   odd number of times. */
function isInside(path, x, y) {
  let inside = false;
  path.forEach(([x1, y1], i) => {
    const [x2, y2] = path[(i + 1) % path.length];
    if (y1 > y !== y2 > y && x < x1 + ((y - y1) / (y2 - y1)) * (x2 - x1)) {
      inside = !inside;
    }
  });
  return inside;
}

/* What a map shows, and what is on its axes. */
function mapText(kind, count, explained) {
  const images = `${countImages(count)}. Select a point to open its image.`;
  if (kind === "tsne") {
    return "t-SNE of the features: images that are alike are close. Neither "
      + "axis has a unit, and distances between groups mean little. A sample "
      + `of ${images}`;
  }
  const [x, y] = explained;
  return "Across and up: the first two principal components of the features; "
    + `they explain ${percent(x)} and ${percent(y)} of the variance. Each axis `
    + `is scaled to fill the square. ${images}`;
}

let mapKind = "pca";

pages.map = async () => {
  const [raw, all] = await Promise.all([load("map"), images()]);
  const points = new Points(all);
  const about = h("p", { class: "soft" });
  const kinds = [["pca", "principal components"], ["tsne", "t-SNE"]]
    .filter(([kind]) => raw[kind]);
  const show = async () => {
    const { slots, points: places } = raw[mapKind];
    points.show({ slots: await typed(Int32Array, slots),
      positions: await typed(Uint16Array, places) });
    about.textContent = mapText(mapKind, points.slots.length, raw.explained);
  };
  page.redraws.push(() => points.group());
  page.afterShow = show;
  return [
    h("div", { class: "head" }, heading("Map of the embedding"),
      h("div", { class: "controls" }, kinds.length > 1 && choice("Layout",
        kinds, mapKind, (kind) => { mapKind = kind; show(); }, "layout"),
      choice("Color by", colorings(),
        points.coloring, (chosen) => {
          points.coloring = chosen;
          points.group();
        }, "color-by"))),
    about,
    h("div", { class: "controls", id: "map-tools" }, points.buttons(),
      points.status),
    h("div", { class: "stage" }, points.canvas, points.view.buttons()),
    points.legend,
  ];
};
