// The page's data, and an SVG plot with axes, ticks and shares of the full model.
// Without scripts the page still shows its picture and tables.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const TOP = 46, BOTTOM = 56;
let WIDTH, HEIGHT, LEFT, RIGHT, TICKS;

// Plots have their own size on a phone, because a scaled one would be too small to read.
const phone = matchMedia("(max-width: 640px)");
function setSizes() {
  [WIDTH, HEIGHT, LEFT, RIGHT, TICKS] = phone.matches ? [400, 360, 46, 46, 5] : [940, 500, 74, 64, 8];
}

function svgElement(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Round steps of 1, 2 or 5 times a power of ten, about `count` of them.
function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

function formatNumber(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size && (size >= 1e5 || size < 1e-3)) return value.toExponential(2).replace("e+", "e");
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
}

function formatMetric(name, value) {
  if (value === null || value === undefined) return "";
  // No number of draws can show a confidence of 0 or 1.
  if (data.confidences.includes(name))
    return value > 0.99 ? ">0.99" : value < 0.01 ? "<0.01" : value.toFixed(2);
  if (data.points.includes(name)) return (100 * value).toFixed(1);
  return data.percent.includes(name) ? (100 * value).toFixed(1) + "%" : formatNumber(value);
}

class Plot {
  constructor(xs, ys, { flip = false } = {}) {
    const span = (values, margin) => {
      const low = Math.min(...values), high = Math.max(...values);
      const pad = (high - low || Math.abs(high) || 1) * margin;
      return [low - pad, high + pad];
    };
    [this.x0, this.x1] = span(xs, 0.06);
    [this.y0, this.y1] = span(ys, 0.08);
    this.flip = flip;
    this.svg = svgElement("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  }
  x(value) { return LEFT + (WIDTH - LEFT - RIGHT) * (value - this.x0) / (this.x1 - this.x0); }
  y(value) {
    const share = (value - this.y0) / (this.y1 - this.y0);
    return TOP + (HEIGHT - TOP - BOTTOM) * (this.flip ? share : 1 - share);
  }
  text(x, y, content, attributes = {}) {
    this.svg.append(svgElement("text", { x, y, ...attributes }, content));
  }
  drawAxes(xTitle, yTitle, yText = formatNumber) {
    const right = WIDTH - RIGHT, bottom = HEIGHT - BOTTOM;
    for (const tick of ticks(this.x0, this.x1, TICKS)) {
      const x = this.x(tick);
      this.svg.append(svgElement("line", { x1: x, x2: x, y1: TOP, y2: bottom, class: "grid" }));
      this.text(x, bottom + 18, formatNumber(tick), { "text-anchor": "middle" });
    }
    for (const tick of ticks(this.y0, this.y1, 7)) {
      const y = this.y(tick);
      this.svg.append(svgElement("line", { x1: LEFT, x2: right, y1: y, y2: y, class: "grid" }));
      this.text(LEFT - 8, y + 4, yText(tick), { "text-anchor": "end" });
    }
    this.text((LEFT + right) / 2, HEIGHT - 14, xTitle, { "text-anchor": "middle" });
    const middle = (TOP + bottom) / 2;
    if (phone.matches) {
      this.text(2, 16, yTitle, {});
      return;
    }
    const turn = `rotate(-90 18 ${middle})`;
    this.text(18, middle, yTitle, { "text-anchor": "middle", transform: turn });
  }
  drawShareAxes(cost, quality) {
    const right = WIDTH - RIGHT;
    for (const tick of ticks(100 * this.x0 / cost, 100 * this.x1 / cost, TICKS))
      this.text(this.x(tick * cost / 100), TOP - 8, formatNumber(tick) + "%",
        { "text-anchor": "middle", class: "soft" });
    for (const tick of ticks(100 * this.y0 / quality, 100 * this.y1 / quality, 7))
      this.text(right + 8, this.y(tick * quality / 100) + 4, formatNumber(tick) + "%", { class: "soft" });
    const title = phone.matches ? "% of the full model's" : "share of the full model's, also on the right";
    this.text(phone.matches ? WIDTH - 4 : (LEFT + right) / 2, 16, title,
      { "text-anchor": phone.matches ? "end" : "middle", class: "soft" });
  }
}

