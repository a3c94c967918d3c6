/* The joint matrix: information of pairs of variables; zoomed in, pairs of
   bins. */
"use strict";

// --- Pairs of variables --------------------------------------------------

class Pairs {
  constructor() {
    this.count = core.numVariables;
    this.floors = floats(core.floor);
    this.tables = { joint: floats(core.information),
      cross: core.crossInformation && floats(core.crossInformation) };
    this.kind = "joint";
    this.picture = document.createElement("canvas");
  }

  information(a, c) { return this.tables[this.kind][a * this.count + c]; }

  floor(a, c) { return this.floors[a * this.count + c]; }

  excess(a, c) {
    return Math.max(this.information(a, c) - this.floor(a, c), 0);
  }

  /* Whether it is a variable with itself in one view. */
  isDiagonal(a, c) { return a === c && this.kind === "joint"; }

  paint() {
    const { count } = this;
    this.most = 1e-9;
    for (let a = 0; a < count; a++) {
      for (let c = 0; c < count; c++) {
        if (a !== c) this.most = Math.max(this.most, this.excess(a, c));
      }
    }
    const table = palette("sequential");
    const gray = isDark() ? pixel(58, 62, 68, 255) : pixel(214, 211, 204, 255);
    fillPixels(this.picture, count, count, (i) => {
      const [a, c] = [Math.floor(i / count), i % count];
      if (this.isDiagonal(a, c)) return gray;
      const share = clamp(this.excess(a, c) / this.most, 0, 1);
      return table[Math.round(255 * Math.sqrt(share))];
    });
  }
}

// --- Pairs of bins -------------------------------------------------------

const MAX_ROWS = 40;  // Rows of blocks in memory; the oldest are dropped.
const MAX_BLOCKS = 600;  // Pictures of blocks in memory.

/* Blocks of the matrix, loaded by rows when they are looked at. */
class Blocks {
  constructor(arrived) {
    this.arrived = arrived;
    this.rows = new Map();
    this.pictures = new Map();
  }

  /* Levels of row m, or null until they have arrived. */
  row(m) {
    if (this.rows.has(m)) return this.rows.get(m).levels;
    const entry = { levels: null };
    remember(this.rows, m, entry, MAX_ROWS, (old) => forget(`joint_${old}`));
    load(`joint_${m}`).then(async (raw) => {
      entry.levels = await typed(Uint8Array, raw.blocks);
      this.arrived();
    }).catch(() => {});  // The row stays blank.
    return null;
  }

  /* Level of a cell, or -1: the matrix is symmetric, and its upper half is
     stored. */
  level(a, c, d, e) {
    if (a > c) return this.level(c, a, e, d);
    const levels = this.row(a);
    const b = core.numBins;
    return levels ? levels[((c - a) * b + d) * b + e] : -1;
  }

  has(a, c) { return this.pictures.has(`${a} ${c}`); }

  /* A canvas of one block, or null until its row has arrived. */
  picture(a, c) {
    const key = `${a} ${c}`;
    if (this.pictures.has(key)) return this.pictures.get(key);
    if (!this.row(Math.min(a, c))) return null;
    const b = core.numBins;
    const table = palette("ratio");
    const node = fillPixels(document.createElement("canvas"), b, b, (i) =>
      table[this.level(a, c, Math.floor(i / b), i % b)]);
    remember(this.pictures, key, node, MAX_BLOCKS);
    return node;
  }
}

// --- The canvas ----------------------------------------------------------

const DETAIL = 44;  // Blocks at least this wide show their cells.
const MIN_CELL = 5;  // The cursor marks cells at least this wide.
const BUDGET = 24;  // Blocks painted per frame, to keep frames short.

class Matrix {
  constructor(first, second) {
    this.count = core.numVariables;
    this.marginal = floats(core.marginal);
    this.pairs = new Pairs();
    this.blocks = new Blocks(() => this.view.ask());
    // Variables a (down) and c (across), bins d and e.
    this.cursor = [first ?? 0, second ?? Math.min(1, this.count - 1), 0, 0];
    this.cursorShown = first !== undefined;
    this.most = h("span", {});
    this.canvas = h("canvas", { tabindex: "0", role: "application",
      "aria-label": "Joint matrix. Arrow keys move, plus and minus zoom, "
        + "zero fits, Enter opens the variable.",
      onpointermove: (event) => this.hover(event),
      onpointerleave: hideTip, onblur: hideTip,
      onclick: (event) => this.click(event),
      ondblclick: (event) => this.view.zoom(3, event.offsetX, event.offsetY),
      onkeydown: (event) => this.key(event) });
    this.view = new View(this.canvas, this.count,
      Math.max(24 * core.numBins, 900), () => this.draw());
  }

  get hasDetail() {
    return this.pairs.kind === "joint"
      && this.view.scale >= Math.max(DETAIL, 1.4 * this.view.fitScale);
  }

  get cursorIsCell() {
    return this.hasDetail && this.view.scale / core.numBins >= MIN_CELL;
  }

  paint() {
    this.pairs.paint();
    this.blocks.pictures.clear();
    this.most.textContent = nats(this.pairs.most);
    this.view.ask();
  }

  /* Moves the middle of the screen to the middle of a pair. */
  open(a, c) {
    this.view.center(c + 0.5, a + 0.5,
      Math.min(this.view.width, this.view.height) * 0.8);
  }

  draw() {
    const { view, count } = this;
    const [context, width, height] = canvasFor(this.canvas);
    context.fillStyle = token("--panel");
    context.fillRect(0, 0, width, height);
    context.imageSmoothingEnabled = false;
    const [x, y] = view.screen(0, 0);
    context.drawImage(this.pairs.picture, x, y, count * view.scale,
      count * view.scale);
    if (this.hasDetail) {
      const pairOf = (v) => clamp(Math.floor(v), 0, count - 1);
      const [left, up] = view.world(0, 0).map(pairOf);
      const [right, down] = view.world(width, height).map(pairOf);
      this.drawBlocks(context, up, down, left, right);
      this.drawLabels(context, up, down, left, right);
    }
    if (this.cursorShown) this.drawCursor(context);
  }

  drawBlocks(context, up, down, left, right) {
    const { view, blocks } = this;
    context.fillStyle = token("--line");
    let budget = BUDGET;
    for (let a = up; a <= down; a++) {
      for (let c = left; c <= right; c++) {
        if (!blocks.has(a, c) && budget-- <= 0) {
          view.ask();
          continue;
        }
        const picture = blocks.picture(a, c);
        if (!picture) continue;
        const [x, y] = view.screen(c, a);
        context.fillRect(x - 0.5, y - 0.5, view.scale, view.scale);
        context.drawImage(picture, x, y, view.scale - 1, view.scale - 1);
      }
    }
  }

  drawLabels(context, up, down, left, right) {
    context.font = `12px ${token("--sans")}`;
    const tag = (text, x, y) => {
      const wide = context.measureText(text).width + 8;
      context.fillStyle = token("--panel");
      context.globalAlpha = 0.86;
      context.fillRect(x, y, wide, 18);
      context.globalAlpha = 1;
      context.fillStyle = token("--ink");
      context.fillText(text, x + 4, y + 13);
    };
    for (let c = left; c <= right; c++) {
      tag(`v${c}`, this.view.screen(c, 0)[0] + 2, 2);
    }
    for (let a = up; a <= down; a++) {
      tag(`v${a}`, 2, this.view.screen(0, a)[1] + 2);
    }
  }

  drawCursor(context) {
    const cell = this.cursorIsCell;
    const [a, c, d, e] = this.cursor;
    const b = core.numBins;
    const size = cell ? this.view.scale / b : this.view.scale;
    const [x, y] = this.view.screen(c + (cell ? e / b : 0),
      a + (cell ? d / b : 0));
    context.strokeStyle = isDark() ? "#fff" : "#000";
    context.lineWidth = 2;
    context.strokeRect(x - 1, y - 1, size + 2, size + 2);
  }

  describe(a, c, d, e) {
    const { pairs } = this;
    const lines = [pairs.isDiagonal(a, c) ? `Variable ${a} with itself`
      : `Variables ${a} and ${c}`,
    `mutual information ${nats(pairs.information(a, c))}, floor `
      + `${nats(pairs.floor(a, c))}`];
    const level = this.hasDetail ? this.blocks.level(a, c, d, e) : -1;
    if (level === 0) lines.push(`bins ${d}, ${e}: P = 0`);
    if (level > 0) {
      const ratio = 2 ** ((level - 128) * core.ratioRange / 127);
      const independent = this.marginal[a * core.numBins + d]
        * this.marginal[c * core.numBins + e];
      lines.push(`bins ${d}, ${e}: P ≈ ${probability(ratio * independent)}, `
        + `${ratio.toPrecision(2)} × independent`);
    }
    return lines;
  }

  /* Shows the tooltip of a place; returns its text. */
  showTip(place, x, y) {
    const lines = this.describe(...place);
    showTextTip(lines, x, y);
    return lines.join(", ");
  }

  /* Variables and bins at a point of the canvas, or null outside. */
  placeAt(x, y) {
    const [c, a] = this.view.world(x, y);
    if (c < 0 || a < 0 || c >= this.count || a >= this.count) return null;
    const b = core.numBins;
    return [Math.floor(a), Math.floor(c), Math.floor((a % 1) * b),
      Math.floor((c % 1) * b)];
  }

  hover(event) {
    const place = this.placeAt(event.offsetX, event.offsetY);
    if (place) this.showTip(place, event.clientX, event.clientY);
    else hideTip();
  }

  click(event) {
    const place = this.placeAt(event.offsetX, event.offsetY);
    if (!place || !this.view.clicked) return;
    this.cursor = place;
    this.cursorShown = true;
    this.view.ask();
    this.hover(event);
  }

  key(event) {
    if (this.view.key(event)) return;
    if (event.key === "Enter") location.hash = `#/variable/${this.cursor[0]}`;
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1],
      ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    this.moveCursor(move, this.cursorIsCell, event.shiftKey);
  }

  /* Moves by one bin where bins are marked, else or with Shift by one
     variable; the first move only shows the cursor. */
  moveCursor(move, cell, shift) {
    const { cursor, view, count } = this;
    const b = core.numBins;
    move.forEach((delta, axis) => {
      if (!cell || shift) {
        const by = this.cursorShown ? delta : 0;
        cursor[axis] = clamp(cursor[axis] + by, 0, count - 1);
        return;
      }
      const flat = clamp(cursor[axis] * b + cursor[axis + 2] + delta, 0,
        count * b - 1);
      cursor[axis] = Math.floor(flat / b);
      cursor[axis + 2] = flat % b;
    });
    this.cursorShown = true;
    const [a, c, d, e] = cursor;
    const [x, y] = view.screen(c + (cell ? e / b : 0.5),
      a + (cell ? d / b : 0.5));
    if (x < 30 || y < 30 || x > view.width - 30 || y > view.height - 30) {
      view.center(c + e / b, a + d / b, view.scale);
    }
    view.ask();
    const box = this.canvas.getBoundingClientRect();
    say(this.showTip(cursor, box.left + clamp(x, 0, view.width),
      box.top + clamp(y, 0, view.height)));
  }

  /* A form that opens the pair of two variables. */
  pairForm() {
    const input = (label, value) => h("input", { type: "number", min: 0,
      max: this.count - 1, value, "aria-label": label,
      style: { width: "5rem" } });
    const inputs = [input("First variable", this.cursor[0]),
      input("Second variable", this.cursor[1])];
    const open = (event) => {
      event.preventDefault();
      const [a, c] = inputs.map(({ value }) => clamp(Math.round(+value) || 0,
        0, this.count - 1));
      this.cursor = [a, c, 0, 0];
      this.cursorShown = true;
      this.open(a, c);
    };
    return h("form", { class: "controls", onsubmit: open },
      h("span", { class: "field" }, "Pair", inputs[0], "×", inputs[1]),
      h("button", {}, "Go"));
  }

  kindChoice() {
    if (!this.pairs.tables.cross) return null;
    const kinds = [["joint", "one view (joint)"],
      ["cross", "two views (cross-joint)"]];
    return h("div", { class: "controls" }, choice("Show", kinds,
      this.pairs.kind, (kind) => {
        this.pairs.kind = kind;
        this.paint();
      }, "matrix-kind"));
  }

  legend() {
    return h("div", { class: "legend" },
      h("span", {}, `down and across: variables 0 to ${this.count - 1}`),
      h("span", {}, "pairs: floor", ramp("sequential"), this.most),
      h("span", {}, "bins: ", `1/${2 ** core.ratioRange} ×`, ramp("ratio"),
        `${2 ** core.ratioRange} × independent`));
  }
}

/* All colors of a palette in a row. */
function ramp(kind) {
  const canvas = h("canvas", { "aria-hidden": "true" });
  const paint = () => {
    const table = palette(kind);
    fillPixels(canvas, 256, 1, (i) => table[i]);
  };
  paint();
  page.redraws.push(paint);
  return canvas;
}

pages.matrix = ({ first, second }) => {
  const matrix = new Matrix(first, second);
  page.redraws.push(() => matrix.paint());
  page.afterShow = () => {
    matrix.paint();
    matrix.view.fit();
    if (first < matrix.count && second < matrix.count) {
      matrix.open(first, second);
    }
  };
  return [
    heading("Joint matrix"),
    h("p", { class: "soft" }, "Each square is a pair of variables; its "
      + "color is their mutual information above the finite-sample floor. "
      + "Zoom in to see every pair of bins: how much more or less often they "
      + "occur together than if they were independent."),
    h("div", { class: "head" }, matrix.pairForm(), matrix.kindChoice()),
    h("div", { class: "stage" }, matrix.canvas, matrix.view.buttons()),
    matrix.legend(),
  ];
};
