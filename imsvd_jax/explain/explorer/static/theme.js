/* The theme, light or dark, and the colors of charts and overlays. */
"use strict";

const THEMES = { auto: "Auto", light: "Light", dark: "Dark" };
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
let theme = "auto";
try {
  theme = localStorage.getItem("imsvd-theme") || "auto";
} catch { /* Some browsers forbid storage for files. */ }
if (!Object.hasOwn(THEMES, theme)) theme = "auto";

function applyTheme() {
  const dark = theme === "dark" || (theme === "auto" && prefersDark.matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  $("theme").textContent = THEMES[theme];
  $("theme").setAttribute("aria-label", `Theme: ${THEMES[theme]}`);
  page.redraws.forEach((draw) => draw());
}

$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  theme = names[(names.indexOf(theme) + 1) % names.length];
  try {
    localStorage.setItem("imsvd-theme", theme);
  } catch { /* Kept for this page only. */ }
  applyTheme();
});
prefersDark.addEventListener("change", applyTheme);
applyTheme();

/* A color of the style sheet. */
const token = (name) => getComputedStyle(document.documentElement)
  .getPropertyValue(name).trim();
const isDark = () => document.documentElement.dataset.theme === "dark";

/* One pixel as a word of four bytes, in the order of ImageData. */
const pixel = (...rgba) => new Uint32Array(new Uint8Array(rgba).buffer)[0];

const palettes = {};

/* The pixels of levels 0 to 255: "sequential", "ratio" or "heat". The
   opacity of heat follows its strength. */
function palette(kind) {
  const name = { sequential: isDark() ? "dark" : "light",
    ratio: isDark() ? "ratioDark" : "ratioLight", heat: "heat" }[kind];
  if (palettes[name]) return palettes[name];
  const rgb = bytes(core.colors[name]);
  palettes[name] = Uint32Array.from({ length: 256 }, (_, level) => pixel(
    ...rgb.subarray(3 * level, 3 * level + 3),
    kind === "heat" ? Math.round(level * 0.72) : 255));
  return palettes[name];
}

const CATEGORIES = ["#3a7ca5", "#d1803c", "#4f9d69", "#b5525c", "#7d6bb0",
  "#9a7b4f", "#c86fa5", "#7f8c8d", "#a3a533", "#35a0a8"];
const category = (k, count) => (count <= 10 ? CATEGORIES[k]
  : `hsl(${Math.round((k * 360) / count)} 58% ${k % 2 ? 58 : 46}%)`);
