/* Drawing on canvases: pixels, bars, and views to pan and zoom. */
"use strict";

/* Fits a canvas to its box; returns its context, width and height. */
function canvasFor(node) {
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  const box = node.getBoundingClientRect();
  node.width = Math.max(1, Math.round(box.width * ratio));
  node.height = Math.max(1, Math.round(box.height * ratio));
  const context = node.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return [context, box.width, box.height];
}

/* Makes a canvas of the pixels pixelAt(0), pixelAt(1), ..., row by row. */
function fillPixels(canvas, width, height, pixelAt) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const words = new Uint32Array(image.data.buffer);
  for (let i = 0; i < words.length; i++) words[i] = pixelAt(i);
  context.putImageData(image, 0, 0);
  return canvas;
}

/* Bars up to `most`; `room` pixels above the tallest stay free. */
function drawBars([context, width, height], values, most, room) {
  const step = width / values.length;
  context.fillStyle = token("--accent");
  values.forEach((value, i) => {
    const tall = Math.max((value / most) * (height - room), value ? 1 : 0);
    context.fillRect(i * step, height - tall, Math.max(step * 0.78, 0.5), tall);
  });
}

/* Bars with a tooltip each, drawn when they are near the screen.

   Options: most, the value at the top; unit(value), as text; tip(i); open(i);
   axis, texts below. */
function barChart(values, label, options) {
  const canvas = h("canvas", { class: "chart", role: "img",
    "aria-label": label, onpointerleave: hideTip });
  const most = options.most ?? Math.max(...values, 1e-12);
  const draw = () => {
    const drawing = canvasFor(canvas);
    const [context, width, height] = drawing;
    context.fillStyle = token("--line");
    context.fillRect(0, 0.5, width, 1);
    context.fillRect(0, height - 1, width, 1);  // Where bars are empty.
    drawBars(drawing, values, most, 2);
  };
  lazily(canvas, draw);
  page.redraws.push(draw);
  const at = (event) => clamp(Math.floor(event.offsetX / canvas.clientWidth
    * values.length), 0, values.length - 1);
  canvas.addEventListener("pointermove", (event) =>
    showTextTip(options.tip(at(event)), event.clientX, event.clientY));
  if (options.open) {
    canvas.style.cursor = "pointer";
    canvas.addEventListener("click", (event) => options.open(at(event)));
  }
  return h("div", { class: "bars" },
    h("div", { class: "scale" }, h("span", {}, options.unit(most)),
      h("span", {}, "0")),
    canvas, h("div", { class: "axis" },
      options.axis.map((text) => h("span", {}, text))));
}

/* Small bars without labels, for a table. */
function sparkline(values) {
  const canvas = h("canvas", { class: "spark", "aria-hidden": "true" });
  const draw = () => drawBars(canvasFor(canvas), values,
    Math.max(...values, 1), 1);
  let drawn = false;
  lazily(canvas, () => { drawn = true; draw(); });
  page.redraws.push(() => { if (drawn) draw(); });
  return canvas;
}

/* Maps the square world [0, size] x [0, size] to a canvas. */
class View {
  constructor(canvas, size, maxScale, draw) {
    Object.assign(this, { canvas, size, maxScale });
    this.ask = oncePerFrame(() => { if (canvas.isConnected) draw(); });
    this.pointers = new Map();
    this.moved = 0;
    this.isStill = false;  // Whether a drag does something else.
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0018)),
        event.offsetX, event.offsetY);
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
      this.moved = 0;
    });
    canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) =>
        this.pointers.delete(event.pointerId));
    }
    const resize = () => this.fit();
    addEventListener("resize", resize);
    page.cleanups.push(() => removeEventListener("resize", resize));
  }

  get width() { return this.canvas.clientWidth; }

  get height() { return this.canvas.clientHeight; }

  get fitScale() {
    return (Math.min(this.width, this.height) - 24) / this.size;
  }

  fit() {
    this.scale = this.fitScale;
    this.left = (this.size - this.width / this.scale) / 2;
    this.top = (this.size - this.height / this.scale) / 2;
    this.ask();
  }

  center(x, y, scale) {
    this.scale = clamp(scale, this.fitScale, this.maxScale);
    this.left = x - this.width / this.scale / 2;
    this.top = y - this.height / this.scale / 2;
    this.ask();
  }

  zoom(factor, x = this.width / 2, y = this.height / 2) {
    const [worldX, worldY] = this.world(x, y);
    this.scale = clamp(this.scale * factor, this.fitScale * 0.8, this.maxScale);
    this.left = worldX - x / this.scale;
    this.top = worldY - y / this.scale;
    this.ask();
  }

  pan(x, y) {
    this.left -= x / this.scale;
    this.top -= y / this.scale;
    this.left = clamp(this.left, -this.width / this.scale / 2,
      this.size - this.width / this.scale / 2);
    this.top = clamp(this.top, -this.height / this.scale / 2,
      this.size - this.height / this.scale / 2);
    this.ask();
  }

  world(x, y) {
    return [this.left + x / this.scale, this.top + y / this.scale];
  }

  screen(x, y) {
    return [(x - this.left) * this.scale, (y - this.top) * this.scale];
  }

  /* Pans with one pointer, zooms with two. */
  move(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) return;
    const now = [event.offsetX, event.offsetY];
    this.moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
    const others = [...this.pointers].filter(([id]) =>
      id !== event.pointerId).map(([, at]) => at);
    if (others.length) {
      const [x, y] = others[0];
      const apart = (p) => Math.max(Math.hypot(p[0] - x, p[1] - y), 1);
      this.zoom(apart(now) / apart(before), x, y);
    } else if (!this.isStill) this.pan(now[0] - before[0], now[1] - before[1]);
    this.pointers.set(event.pointerId, now);
  }

  /* Whether the pointer hardly moved since it was pressed: a click. */
  get clicked() { return this.moved <= 4; }

  /* Acts on +, - and 0; returns whether the key was one of them. */
  key(event) {
    const act = { "+": () => this.zoom(1.5), "=": () => this.zoom(1.5),
      "-": () => this.zoom(1 / 1.5), 0: () => this.fit() }[event.key];
    if (!act || event.ctrlKey || event.metaKey) return false;
    event.preventDefault();
    act();
    return true;
  }

  buttons() {
    const button = (text, label, act) => h("button", { type: "button",
      "aria-label": label, onclick: act }, text);
    return h("div", { class: "zoom" },
      button("+", "Zoom in", () => this.zoom(1.6)),
      button("−", "Zoom out", () => this.zoom(1 / 1.6)),
      button("⤢", "Fit", () => this.fit()));
  }
}
