// Selects for the two metrics, training curves, sortable tables, and links between points and rows.
// Folded sections are opened for printing.

function fillSelect(select, names, chosen) {
  for (const name of names) {
    const option = new Option(data.titles[name] || name, name, name === chosen, name === chosen);
    select.add(option);
  }
}

function setUpFront() {
  const holder = document.getElementById("front");
  const cost = document.getElementById("cost"), quality = document.getElementById("quality");
  fillSelect(cost, data.costs, data.axes.cost);
  fillSelect(quality, data.qualities, data.axes.quality);
  const draw = () => drawFront(holder, cost.value, quality.value);
  cost.addEventListener("change", draw);
  quality.addEventListener("change", draw);
  document.getElementById("controls").hidden = false;
  draw();
  return draw;
}

function drawCurves(holder) {
  const series = (data.curves[holder.dataset.curves] || []).filter((curve) => curve.points.length > 1);
  if (!series.length) return;
  const all = series.flatMap((curve) => curve.points);
  const plot = new Plot(all.map((p) => p[0]), all.map((p) => p[1]));
  const [what, against] = holder.dataset.curves.split(" against ");
  plot.drawAxes(against || "Step", what);
  const key = document.createElement("div");
  key.className = "key";
  series.forEach((curve, number) => {
    const color = COLORS[number % COLORS.length];
    const dash = number >= COLORS.length ? "6 4" : "none";
    const points = curve.points.map((p) => `${plot.x(p[0])},${plot.y(p[1])}`).join(" ");
    plot.svg.append(svgElement("polyline", { points, fill: "none", stroke: color, "stroke-width": 1.8,
      "stroke-dasharray": dash }));
    const entry = document.createElement("span");
    const line = svgElement("line", { x1: 0, x2: 16, y1: 8, y2: 8,
      stroke: color, "stroke-width": 3, "stroke-dasharray": dash });
    const swatch = svgElement("svg", { viewBox: "0 0 16 16" }, line);
    entry.append(swatch, curve.name);
    key.append(entry);
  });
  holder.replaceChildren(plot.svg, key);
}

function setUpTable(table) {
  const body = table.tBodies[0];
  for (const row of body.rows) {
    row.addEventListener("mouseenter", () => highlight(row.dataset.key));
    row.addEventListener("mouseleave", () => highlight(null));
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

addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});

setSizes();
const redrawFront = setUpFront();
const drawAllCurves = () => document.querySelectorAll("[data-curves]").forEach(drawCurves);
drawSweepKey(document.getElementById("series"));
drawAllCurves();
phone.addEventListener("change", () => { setSizes(); redrawFront(); drawAllCurves(); });
document.querySelectorAll("table.rows").forEach(setUpTable);
document.documentElement.dataset.ready = "yes";
