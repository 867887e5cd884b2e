// The front on any two metrics: points by role and sweep, staircase lines, tooltips.

const INK = "#1c1c1c";
const sweepColor = (row) => data.series.length
  ? COLORS[data.series.indexOf(row.sweep) % COLORS.length] : COLORS[0];

function star(x, y, radius) {
  const corners = [...Array(10).keys()].map((i) => {
    const r = i % 2 ? radius * 0.42 : radius, angle = Math.PI * (i / 5 - 0.5);
    return `${x + r * Math.cos(angle)},${y + r * Math.sin(angle)}`;
  });
  return svgElement("polygon", { points: corners.join(" ") });
}

// Sweeps differ by shape as well as color: circle, square, diamond, triangle.
function sweepShape(series, x, y, r) {
  const kind = Math.max(series, 0) % 4;
  if (kind === 0) return svgElement("circle", { cx: x, cy: y, r });
  const corners = [
    [[-r, -r], [r, -r], [r, r], [-r, r]],
    [[0, -1.3 * r], [1.3 * r, 0], [0, 1.3 * r], [-1.3 * r, 0]],
    [[0, -1.2 * r], [1.1 * r, r], [-1.1 * r, r]],
  ][kind - 1];
  return svgElement("polygon", { points: corners.map(([dx, dy]) => `${x + dx},${y + dy}`).join(" ") });
}

function drawMark(row, member, x, y) {
  let shape;
  if (row.role === "teacher") {
    shape = star(x, y, 12);
    shape.setAttribute("fill", "#e69f00");
    shape.setAttribute("stroke", "#1c1c1c");
  } else if (row.role === "baseline") {
    const turn = `rotate(45 ${x} ${y})`;
    shape = svgElement("rect", { x: x - 6, y: y - 6, width: 12, height: 12, transform: turn });
    shape.setAttribute("fill", "#fff");
    shape.setAttribute("stroke", "#1c1c1c");
  } else {
    const color = sweepColor(row);
    shape = sweepShape(data.series.indexOf(row.sweep), x, y, member ? 7 : 5.5);
    shape.setAttribute("fill", member ? color : "#fff");
    shape.setAttribute("stroke", color);
    if (!member) shape.setAttribute("opacity", 0.5);
  }
  shape.setAttribute("stroke-width", 1.6);
  shape.classList.add("mark");
  return shape;
}

function highlight(key) {
  for (const element of document.querySelectorAll("[data-key]"))
    element.classList.toggle("active", element.dataset.key === key);
}

function addTooltip(group, row, tip, holder, x, y) {
  const show = () => {
    highlight(row.key);
    const numbers = data.hover.filter((name) => row[name] !== null && row[name] !== undefined);
    tip.replaceChildren();
    const title = document.createElement("b");
    title.textContent = [row.name, row.sweep, row.threshold && `threshold ${row.threshold}`]
      .filter(Boolean).join(", ");
    const table = document.createElement("table");
    for (const name of numbers) {
      const error = row[name + "_stderr"];
      const line = table.insertRow();
      line.insertCell().textContent = data.titles[name] || name;
      const low = row[name + "_low"], high = row[name + "_high"];
      line.insertCell().textContent = formatMetric(name, row[name])
        + (error ? " ± " + formatMetric(name, error) : "")
        + (typeof low === "number" ? ` (${formatMetric(name, low)} to ${formatMetric(name, high)})` : "");
    }
    tip.append(title, table);
    tip.hidden = false;
    const scale = holder.clientWidth / WIDTH;
    const left = Math.min(x * scale + 14, holder.clientWidth - tip.offsetWidth);
    const above = y * scale - tip.offsetHeight - 12;
    tip.style.left = Math.max(left, 0) + "px";
    tip.style.top = (above > 0 ? above : y * scale + 16) + "px";
  };
  const hide = () => { tip.hidden = true; highlight(null); };
  for (const event of ["mouseenter", "focus", "click"]) group.addEventListener(event, show);
  for (const event of ["mouseleave", "blur"]) group.addEventListener(event, hide);
}

function drawSteps(plot, members, cost, quality, end, style) {
  const [first, ...others] = members.map((row) => [plot.x(row[cost]), plot.y(row[quality])]);
  if (!first) return;
  const steps = others.map(([x, y]) => `H${x}V${y}`).join("");
  plot.svg.append(svgElement("path", { d: `M${first}${steps}H${end}`, fill: "none", ...style }));
}

// The paper's headline, if it lies inside the plot.
function drawPaperMark(plot, cost, quality) {
  const x = plot.x(cost), y = plot.y(quality);
  const inside = cost > plot.x0 && cost < plot.x1 && quality > plot.y0 && quality < plot.y1;
  if (!inside) return;
  plot.svg.append(svgElement("path", { d: `M${x - 6},${y - 6}l12,12m0,-12l-12,12`, stroke: INK,
    "stroke-width": 2.6, class: "paper" }, svgElement("title", {}, data.paper.name)));
  if (!phone.matches) plot.text(x + 10, y + 4, data.paper.name, { class: "soft" });
}

function drawFront(holder, cost, quality) {
  const rows = data.rows.filter((row) => typeof row[cost] === "number"
    && typeof row[quality] === "number");
  holder.replaceChildren();
  if (!rows.length) { holder.textContent = "No result has both numbers."; return; }
  const higher = data.higher.includes(quality);
  const error = (row) => row[quality + "_stderr"] || 0;
  const plot = new Plot(rows.map((row) => row[cost]),
    rows.flatMap((row) => [row[quality] - error(row), row[quality] + error(row)]),
    { flip: !higher });
  plot.drawAxes(data.titles[cost] || cost, data.titles[quality] || quality,
    (value) => formatMetric(quality, value));
  // Python finds the fronts (reporting/pareto.py); here they are row numbers.
  const { full: fullNumber, members, sweeps } = data.fronts[cost][quality];
  const full = data.rows[fullNumber], front = members.map((number) => data.rows[number]);
  if (full && full[cost] && full[quality]) plot.drawShareAxes(full[cost], full[quality]);
  const end = plot.x(Math.max(...rows.map((row) => row[cost])));
  for (const numbers of sweeps) {
    const own = numbers.map((number) => data.rows[number]);
    if (own.length) drawSteps(plot, own, cost, quality, end,
      { stroke: sweepColor(own[0]), "stroke-width": 1.6, opacity: 0.45 });
  }
  drawSteps(plot, front, cost, quality, end,
    { stroke: data.series.length ? INK : COLORS[0], "stroke-width": 2 });
  if (data.paper && full && data.percent.includes(quality) && quality === data.axes.quality)
    drawPaperMark(plot, full[cost] * data.paper.cost, full[quality] * data.paper.quality);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  // Trials first, so that full models and baselines are drawn above them.
  for (const row of [...rows].sort((a, b) => (a.role !== "trial") - (b.role !== "trial"))) {
    const x = plot.x(row[cost]), y = plot.y(row[quality]);
    const group = svgElement("g", { class: "point", tabindex: 0, "data-key": row.key });
    const member = front.includes(row);
    if (error(row)) group.append(svgElement("line", { x1: x, x2: x,
      y1: plot.y(row[quality] - error(row)), y2: plot.y(row[quality] + error(row)),
      stroke: row.role === "baseline" ? "#757575" : sweepColor(row),
      opacity: member || row.role === "teacher" ? 0.8 : 0.35 }));
    group.append(svgElement("circle", { cx: x, cy: y, r: 15, fill: "transparent" }));
    group.append(drawMark(row, member, x, y));
    addTooltip(group, row, tip, holder, x, y);
    if (row.role !== "trial") plot.text(x > WIDTH - RIGHT - 80 ? x - 14 : x + 12, y - 8, row.name,
      { class: "soft", "text-anchor": x > WIDTH - RIGHT - 80 ? "end" : "start" });
    plot.svg.append(group);
  }
  holder.append(plot.svg, tip);
}

// Legend of the sweeps; empty for a single sweep.
function drawSweepKey(holder) {
  data.series.forEach((name, number) => {
    const shape = sweepShape(number, 8, 8, 5);
    shape.setAttribute("fill", COLORS[number % COLORS.length]);
    const entry = document.createElement("span");
    entry.append(svgElement("svg", { viewBox: "0 0 16 16" }, shape), name);
    holder.append(entry);
  });
}

