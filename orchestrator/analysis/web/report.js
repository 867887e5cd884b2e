// The moving parts of a report: the front on any two numbers, curves, sorting, and hovering that links
// points and rows. Reads the JSON in #data; without this file the page still has picture and tables.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const WIDTH = 940, HEIGHT = 500, LEFT = 74, RIGHT = 64, TOP = 46, BOTTOM = 56;

function node(name, attributes, ...children) {
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

function short(value) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size && (size >= 1e5 || size < 1e-3)) return value.toExponential(2).replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

function shown(name, value) {
  if (value === null || value === undefined) return "";
  return data.percent.includes(name) ? (100 * value).toFixed(1) + "%" : short(value);
}

class Plot {
  constructor(xs, ys, { flip = false } = {}) {
    const span = (values, room) => {
      const low = Math.min(...values), high = Math.max(...values);
      const pad = (high - low || Math.abs(high) || 1) * room;
      return [low - pad, high + pad];
    };
    [this.x0, this.x1] = span(xs, 0.06);
    [this.y0, this.y1] = span(ys, 0.08);
    this.flip = flip;
    this.svg = node("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  }
  x(value) { return LEFT + (WIDTH - LEFT - RIGHT) * (value - this.x0) / (this.x1 - this.x0); }
  y(value) {
    const share = (value - this.y0) / (this.y1 - this.y0);
    return TOP + (HEIGHT - TOP - BOTTOM) * (this.flip ? share : 1 - share);
  }
  text(x, y, content, attributes = {}) {
    this.svg.append(node("text", { x, y, ...attributes }, content));
  }
  dress(xTitle, yTitle, yText = short) {
    const right = WIDTH - RIGHT, bottom = HEIGHT - BOTTOM;
    for (const tick of ticks(this.x0, this.x1, 8)) {
      const x = this.x(tick);
      this.svg.append(node("line", { x1: x, x2: x, y1: TOP, y2: bottom, class: "grid" }));
      this.text(x, bottom + 18, short(tick), { "text-anchor": "middle" });
    }
    for (const tick of ticks(this.y0, this.y1, 7)) {
      const y = this.y(tick);
      this.svg.append(node("line", { x1: LEFT, x2: right, y1: y, y2: y, class: "grid" }));
      this.text(LEFT - 8, y + 4, yText(tick), { "text-anchor": "end" });
    }
    this.text((LEFT + right) / 2, HEIGHT - 14, xTitle, { "text-anchor": "middle" });
    const middle = (TOP + bottom) / 2;
    const turn = `rotate(-90 18 ${middle})`;
    const turned = { "text-anchor": "middle", class: "ytitle", transform: turn };
    this.text(18, middle, yTitle, turned);
  }
  shares(cost, quality) {
    const right = WIDTH - RIGHT;
    for (const tick of ticks(100 * this.x0 / cost, 100 * this.x1 / cost, 8))
      this.text(this.x(tick * cost / 100), TOP - 8, short(tick) + "%",
        { "text-anchor": "middle", class: "soft" });
    for (const tick of ticks(100 * this.y0 / quality, 100 * this.y1 / quality, 7))
      this.text(right + 8, this.y(tick * quality / 100) + 4, short(tick) + "%", { class: "soft" });
    this.text((LEFT + right) / 2, 16, "share of the full model's, also on the right",
      { "text-anchor": "middle", class: "soft" });
  }
}

function star(x, y, radius) {
  const corners = [...Array(10).keys()].map((i) => {
    const r = i % 2 ? radius * 0.42 : radius, angle = Math.PI * (i / 5 - 0.5);
    return `${x + r * Math.cos(angle)},${y + r * Math.sin(angle)}`;
  });
  return node("polygon", { points: corners.join(" ") });
}

function mark(row, member, x, y) {
  let shape;
  if (row.role === "teacher") {
    shape = star(x, y, 12);
    shape.setAttribute("fill", "#e69f00");
    shape.setAttribute("stroke", "#1c1c1c");
  } else if (row.role === "reference") {
    const turn = `rotate(45 ${x} ${y})`;
    shape = node("rect", { x: x - 6, y: y - 6, width: 12, height: 12, transform: turn });
    shape.setAttribute("fill", "#fff");
    shape.setAttribute("stroke", "#1c1c1c");
  } else {
    const fill = member ? COLORS[0] : "#fff";
    shape = node("circle", { cx: x, cy: y, r: member ? 7 : 5.5, fill, stroke: COLORS[0] });
    if (!member) shape.setAttribute("opacity", 0.5);
  }
  shape.setAttribute("stroke-width", 1.6);
  shape.classList.add("mark");
  return shape;
}

function frontOf(rows, cost, quality, sign) {
  const candidates = rows.filter((row) => row.role !== "reference");
  const beats = (a, b) => a[cost] <= b[cost] && sign * a[quality] >= sign * b[quality]
    && (a[cost] < b[cost] || sign * a[quality] > sign * b[quality]);
  return candidates.filter((row) => !candidates.some((other) => beats(other, row)))
    .sort((a, b) => a[cost] - b[cost]);
}

function fullModel(rows, cost) {
  const candidates = rows.filter((row) => row.role !== "reference");
  const teachers = candidates.filter((row) => row.role === "teacher");
  return (teachers.length ? teachers : candidates).reduce(
    (most, row) => (most && most[cost] >= row[cost] ? most : row), null);
}

function activate(key) {
  for (const element of document.querySelectorAll("[data-key]"))
    element.classList.toggle("active", element.dataset.key === key);
}

function hoverable(group, row, tip, holder, x, y) {
  const show = () => {
    activate(row.key);
    const numbers = data.hover.filter((name) => row[name] !== null && row[name] !== undefined);
    tip.replaceChildren();
    const title = document.createElement("b");
    title.textContent = row.name + (row.threshold ? ` (threshold ${row.threshold})` : "");
    const table = document.createElement("table");
    for (const name of numbers) {
      const error = row[name + "_stderr"];
      const line = table.insertRow();
      line.insertCell().textContent = data.titles[name] || name;
      line.insertCell().textContent = shown(name, row[name])
        + (error ? " ± " + shown(name, error) : "");
    }
    tip.append(title, table);
    tip.hidden = false;
    const scale = holder.clientWidth / WIDTH;
    const left = Math.min(x * scale + 14, holder.clientWidth - tip.offsetWidth - 4);
    const above = y * scale - tip.offsetHeight - 12;
    tip.style.left = Math.max(left, 0) + "px";
    tip.style.top = (above > 0 ? above : y * scale + 16) + "px";
  };
  const hide = () => { tip.hidden = true; activate(null); };
  for (const event of ["mouseenter", "focus", "click"]) group.addEventListener(event, show);
  for (const event of ["mouseleave", "blur"]) group.addEventListener(event, hide);
}

function drawFront(holder, cost, quality) {
  const rows = data.rows.filter((row) => typeof row[cost] === "number"
    && typeof row[quality] === "number");
  holder.replaceChildren();
  if (!rows.length) { holder.textContent = "No result has both numbers."; return; }
  const higher = data.higher.includes(quality), sign = higher ? 1 : -1;
  const error = (row) => row[quality + "_stderr"] || 0;
  const plot = new Plot(rows.map((row) => row[cost]),
    rows.flatMap((row) => [row[quality] - error(row), row[quality] + error(row)]),
    { flip: !higher });
  plot.dress(data.titles[cost] || cost, data.titles[quality] || quality,
    (value) => shown(quality, value));
  const full = fullModel(rows, cost);
  if (full && full[cost] && full[quality]) plot.shares(full[cost], full[quality]);
  const front = frontOf(rows, cost, quality, sign);
  const end = plot.x(Math.max(...rows.map((row) => row[cost])));
  let path = "";
  for (const row of front)
    path += path ? `H${plot.x(row[cost])}V${plot.y(row[quality])}`
      : `M${plot.x(row[cost])},${plot.y(row[quality])}`;
  if (path) plot.svg.append(node("path",
    { d: path + `H${end}`, fill: "none", stroke: COLORS[0], "stroke-width": 2 }));
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  for (const row of rows) {
    const x = plot.x(row[cost]), y = plot.y(row[quality]);
    const group = node("g", { class: "point", tabindex: 0, "data-key": row.key });
    const member = front.includes(row);
    if (error(row)) group.append(node("line", { x1: x, x2: x,
      y1: plot.y(row[quality] - error(row)), y2: plot.y(row[quality] + error(row)),
      stroke: row.role === "reference" ? "#757575" : COLORS[0],
      opacity: member || row.role === "teacher" ? 0.8 : 0.35 }));
    group.append(node("circle", { cx: x, cy: y, r: 15, fill: "transparent" }));
    group.append(mark(row, member, x, y));
    hoverable(group, row, tip, holder, x, y);
    plot.svg.append(group);
  }
  holder.append(plot.svg, tip);
}

function choose(select, names, chosen) {
  for (const name of names) {
    const option = new Option(data.titles[name] || name, name, name === chosen, name === chosen);
    select.add(option);
  }
}

function setUpFront() {
  const holder = document.getElementById("front");
  const cost = document.getElementById("cost"), quality = document.getElementById("quality");
  choose(cost, data.costs, data.axes.cost);
  choose(quality, data.qualities, data.axes.quality);
  const draw = () => drawFront(holder, cost.value, quality.value);
  cost.addEventListener("change", draw);
  quality.addEventListener("change", draw);
  document.getElementById("controls").hidden = false;
  draw();
}

function drawCurves(holder) {
  const series = (data.curves[holder.dataset.curves] || []).filter((curve) => curve.points.length > 1);
  if (!series.length) return;
  const all = series.flatMap((curve) => curve.points);
  const plot = new Plot(all.map((p) => p[0]), all.map((p) => p[1]));
  plot.dress("Step", holder.dataset.curves);
  const key = document.createElement("div");
  key.className = "key";
  series.forEach((curve, number) => {
    const color = COLORS[number % COLORS.length];
    const dash = number >= COLORS.length ? "6 4" : "none";
    const points = curve.points.map((p) => `${plot.x(p[0])},${plot.y(p[1])}`).join(" ");
    plot.svg.append(node("polyline", { points, fill: "none", stroke: color, "stroke-width": 1.8,
      "stroke-dasharray": dash }));
    const entry = document.createElement("span");
    const swatch = node("svg", { viewBox: "0 0 16 16" }, node("line", { x1: 0, x2: 16, y1: 8, y2: 8,
      stroke: color, "stroke-width": 3, "stroke-dasharray": dash }));
    entry.append(swatch, curve.name);
    key.append(entry);
  });
  holder.replaceChildren(plot.svg, key);
}

function setUpTable(table) {
  const body = table.tBodies[0];
  for (const row of body.rows) {
    row.addEventListener("mouseenter", () => activate(row.dataset.key));
    row.addEventListener("mouseleave", () => activate(null));
  }
  [...table.tHead.rows[0].cells].forEach((head, number) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = (row) => row.cells[number].dataset.value ?? row.cells[number].textContent;
      const compare = (a, b) => {
        const [p, q] = [value(a), value(b)];
        const numbers = p !== "" && q !== "" && !isNaN(p) && !isNaN(q);
        return numbers ? p - q : p.localeCompare(q);
      };
      const sorted = [...body.rows].sort((a, b) => (down ? -1 : 1) * compare(a, b));
      body.append(...sorted);
    });
  });
}

setUpFront();
document.querySelectorAll("[data-curves]").forEach(drawCurves);
document.querySelectorAll("table.rows").forEach(setUpTable);
document.documentElement.dataset.ready = "yes";
