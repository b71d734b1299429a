"use strict";
// Draws the figures, sorts and saves the tables, changes the theme. Nothing is kept or loaded.
const modelkin = (() => {
  const root = document.documentElement;
  const figures = new Map(); // plot element -> its figure as written in the page

  function colour(name) {
    return getComputedStyle(root).getPropertyValue("--" + name.slice(1)).trim();
  }

  // Colours of the theme stand as "@name", only where Plotly expects a colour.
  function resolved(part, key = "") {
    const isColour = /color$/i.test(key);
    if (typeof part === "string") return isColour && part[0] === "@" ? colour(part) : part;
    if (Array.isArray(part)) {
      return isColour || typeof part[0] === "object" && !Array.isArray(part[0])
        ? part.map((item) => resolved(item, key)) : part;
    }
    if (part === null || typeof part !== "object") return part;
    const copy = {};
    for (const name of Object.keys(part)) copy[name] = resolved(part[name], name);
    return copy;
  }

  function template() {
    const axis = {
      gridcolor: colour("@line"), zerolinecolor: colour("@line"), linecolor: colour("@line"),
      automargin: true, title: { standoff: 8 },
    };
    return {
      layout: {
        font: { family: "system-ui, sans-serif", color: colour("@ink"), size: 13 },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        colorway: [1, 2, 3, 4, 5, 6].map((n) => colour("@series" + n)),
        xaxis: axis, yaxis: axis,
        margin: { l: 48, r: 16, t: 32, b: 44 },
        legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
        modebar: {
          bgcolor: "rgba(0,0,0,0)", color: colour("@muted"), activecolor: colour("@accent"),
        },
        hoverlabel: {
          bgcolor: colour("@box"), bordercolor: colour("@line"), align: "left",
          font: { color: colour("@ink"), family: "system-ui, sans-serif" }, namelength: -1,
        },
        // A finger that scrolls the page must not be caught by a figure.
        dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      },
    };
  }

  // On a phone the legend is a column above the figure, which needs room of its own.
  function makeRoom(plot, spec) {
    const named = spec.data.filter((trace) => trace.name && trace.showlegend !== false
      && trace.visible !== false).length;
    const column = plot.parentElement.clientWidth < 600 && named > 1;
    plot.style.height = spec.height + (column ? 19 * named : 0) + "px";
  }

  function draw(plot) {
    const spec = figures.get(plot);
    makeRoom(plot, spec);
    const layout = { ...resolved(spec.layout), template: template(), autosize: true };
    return Plotly.react(plot, resolved(spec.data), layout,
      { responsive: true, displaylogo: false });
  }

  function choose(spec, chosen) {
    const grouped = new Set(spec.choices.flat());
    const shown = new Set(spec.choices[chosen]);
    spec.data.forEach((trace, position) => {
      if (grouped.has(position)) trace.visible = shown.has(position);
    });
  }

  function prepare(box) {
    const plot = box.querySelector(".plot");
    const spec = JSON.parse(box.querySelector("script").textContent);
    spec.height = parseInt(plot.style.height);
    figures.set(plot, spec);
    const select = box.querySelector("select");
    if (select && spec.choices) {
      choose(spec, 0);
      select.addEventListener("change", () => { choose(spec, +select.value); draw(plot); });
    }
  }

  // Tables

  function value(row, column) {
    const cell = row.cells[column];
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    return cell.textContent;
  }

  function compare(one, other) {
    if (one === "" || other === "") return 0;
    if (typeof one === "number" && typeof other === "number") return one - other;
    return String(one).localeCompare(String(other), "en", { numeric: true });
  }

  function sort(table, head) {
    const column = head.cellIndex;
    const up = head.getAttribute("aria-sort") !== "ascending";
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [value(row, column), row]);
    rows.sort(([one], [other]) => {
      // Nothing is last whichever way.
      if ((one === "") !== (other === "")) return one === "" ? 1 : -1;
      return up ? compare(one, other) : compare(other, one);
    });
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows.map(([, row]) => row));
  }

  function csv(table) {
    const quoted = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    return [...table.rows].map((row) => [...row.cells].map((cell) =>
      quoted(cell.dataset.value ?? cell.textContent)).join(",") + "\n").join("");
  }

  function save(box) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv(box.querySelector("table"))],
      { type: "text/csv" }));
    link.download = box.dataset.name + ".csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // Theme

  function setTheme(theme) {
    root.dataset.theme = theme;
    document.getElementById("theme").textContent = theme === "dark" ? "Light" : "Dark";
    for (const plot of figures.keys()) if (plot.data) draw(plot);
  }

  // A page that is served while its run goes on

  async function watch() {
    const kept = history.state;
    if (kept && kept.theme) setTheme(kept.theme);
    if (kept && kept.scroll) scrollTo(0, kept.scroll);
    const shown = document.body.dataset.live;
    const look = async () => {
      try {
        if (await (await fetch("version")).text() !== shown) {
          history.replaceState({ scroll: scrollY, theme: root.dataset.theme }, "");
          location.reload();
          return;
        }
      } catch { /* The server is gone for now; the page stays. */ }
      setTimeout(look, 2000);
    };
    setTimeout(look, 2000);
  }

  async function start() {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    setTheme(dark.matches ? "dark" : "light");
    dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
    document.getElementById("theme").addEventListener("click",
      () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
    for (const box of document.querySelectorAll(".table")) {
      const table = box.querySelector("table");
      for (const head of table.tHead.rows[0].cells) {
        head.querySelector("button").addEventListener("click", () => sort(table, head));
      }
      box.querySelector(".csv").addEventListener("click", () => save(box));
    }
    if ("live" in document.body.dataset) watch();
    for (const plot of figures.keys()) {
      await draw(plot);
      if (!performance.getEntriesByName("opened").length) performance.mark("opened");
      // Let the browser show it, and answer, before the next one.
      await new Promise((resolve) => setTimeout(resolve));
    }
    performance.mark("complete");
    root.dataset.ready = "true";
  }

  document.querySelectorAll(".figure").forEach(prepare);
  // A page's own script runs before this, and may change figures before they are drawn.
  document.addEventListener("DOMContentLoaded", start);
  return { draw, figures };
})();
