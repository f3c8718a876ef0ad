"use strict";
(() => {
  const root = document.documentElement;
  const all = (query, from = document) => [...from.querySelectorAll(query)];
  const by = (id) => document.getElementById(id);
  root.classList.add("js");

  // The table: sorting moves whole bodies, so that details stay with their row; rows without a value come last.
  const table = by("rows");
  const bodies = all("tbody", table);
  const valueOf = (body, column) => body.rows[0].cells[column].dataset.value;
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y;
  };
  const sort = (head, column) => {
    const up = head.getAttribute("aria-sort") === "descending" || (head.getAttribute("aria-sort") === "none" && !head.dataset.down);
    all("th[aria-sort]", table).forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const known = bodies.filter((body) => valueOf(body, column) !== "");
    const unknown = bodies.filter((body) => valueOf(body, column) === "");
    known.sort((a, b) => (up ? 1 : -1) * compare(valueOf(a, column), valueOf(b, column)));
    table.append(...known, ...unknown);
  };
  all("thead button", table).forEach((button) => {
    button.addEventListener("click", () => sort(button.closest("th"), Number(button.dataset.column)));
  });

  // Filters: a row is shown if it has all words and matches every selection; the shown rows are counted.
  const form = by("filters");
  const filter = () => {
    const words = by("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = all("select", form).filter((select) => select.value !== "*");
    let shown = 0;
    for (const body of bodies) {
      const fits = words.every((word) => body.dataset.words.includes(word))
        && chosen.every((select) => body.getAttribute(`data-by-${select.dataset.by}`) === select.value);
      body.hidden = !fits;
      shown += fits;
    }
    by("count").textContent = `${shown} of ${bodies.length} rows`;
    by("count").classList.toggle("part", shown < bodies.length);
    by("empty").hidden = shown > 0;
  };
  for (const event of ["input", "change"]) form.addEventListener(event, filter); // some inputs fire only one of them
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  filter(); // a browser that returns to the page restores what was typed

  all(".toggle").forEach((button) => button.addEventListener("click", () => {
    const open = by(button.getAttribute("aria-controls")).classList.toggle("open");
    button.setAttribute("aria-expanded", String(open));
  }));

  const copyByHand = (text) => {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done ? Promise.resolve() : Promise.reject(new Error("refused"));
  };
  const copy = (text) => (navigator.clipboard ? navigator.clipboard.writeText(text).catch(() => copyByHand(text)) : copyByHand(text));
  all(".copy").forEach((button) => button.addEventListener("click", async () => {
    const said = button.textContent;
    const done = await copy(button.dataset.copy).then(() => true, () => false);
    button.textContent = done ? "copied" : "see details";
    button.classList.toggle("copied", done);
    setTimeout(() => { button.textContent = said; button.classList.remove("copied"); }, 1500);
  }));

  // Figures take the page's colours, so they are drawn again when the colours change.
  const figures = JSON.parse(by("data").textContent);
  const hidden = new Set();
  const config = { displaylogo: false, responsive: true, displayModeBar: "hover", modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
  const small = window.matchMedia("(max-width: 640px)");
  const wrapped = (text, longest) => text.split(" ").reduce((lines, word) => {
    const joined = `${lines.at(-1)} ${word}`.trim();
    return joined.length > longest && lines.at(-1) ? [...lines, word] : [...lines.slice(0, -1), joined];
  }, [""]).join("<br>");
  const fitted = (axis, width) => ({ ...axis, title: { ...axis.title, text: wrapped(axis.title?.text ?? "", Math.floor((width - 70) / 8.5)) } });
  const halved = (text) => { // two lines, broken at the space nearest to the middle
    const spaces = [...text.matchAll(/ /g)].map((found) => found.index).sort((a, b) => Math.abs(a - text.length / 2) - Math.abs(b - text.length / 2));
    return text.length > 12 && spaces.length ? `${text.slice(0, spaces[0])}<br>${text.slice(spaces[0] + 1)}` : text;
  };
  const named = (axis) => (small.matches && axis.ticktext ? { ...axis, ticktext: axis.ticktext.map(halved), tickfont: { size: 10 } } : axis);
  const draw = (figure, width) => {
    const div = by(`plot-${figure.key}`);
    const style = getComputedStyle(root);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const axis = (given) => ({ gridcolor: colour("line"), linecolor: colour("soft"), zerolinecolor: colour("line"), tickcolor: colour("soft"), ...given });
    const data = figure.data.map((trace) => ({
      ...trace,
      ...(trace.meta?.ink ? { line: { ...trace.line, color: colour("ink") }, textfont: { ...trace.textfont, color: colour("ink") } } : {}),
      visible: !hidden.has(trace.meta?.series),
    }));
    const layout = {
      ...figure.layout,
      xaxis: axis(fitted(figure.layout.xaxis, width ?? div.clientWidth)),
      yaxis: axis(named(fitted(figure.layout.yaxis, 280))), // a legend leaves the plot little more
      shapes: (figure.layout.shapes ?? []).map((shape) => ({ ...shape, line: { ...shape.line, color: colour("soft") } })),
      font: { family: style.getPropertyValue("--sans").trim(), size: 13, color: colour("ink") },
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("soft"), font: { color: colour("ink") }, align: "left" },
      modebar: { color: colour("soft"), activecolor: colour("ink"), bgcolor: "rgba(0,0,0,0)" },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      ...(width ? { width, autosize: false } : { autosize: true }),
    };
    return Plotly.react(div, data, layout, config);
  };
  const drawAll = (width) => Promise.all(figures.map((figure) => draw(figure, width)));
  all(".chip").forEach((chip) => chip.addEventListener("click", () => {
    const on = chip.getAttribute("aria-pressed") !== "true";
    chip.setAttribute("aria-pressed", String(on));
    hidden[on ? "delete" : "add"](chip.dataset.series);
    drawAll();
  }));

  const system = window.matchMedia("(prefers-color-scheme: dark)");
  by("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
    root.dataset.theme = dark ? "light" : "dark";
    drawAll();
  });
  for (const media of [system, small]) media.addEventListener("change", () => drawAll());
  let before;
  window.addEventListener("beforeprint", () => { before = root.dataset.theme; root.dataset.theme = "light"; drawAll(900); });
  window.addEventListener("afterprint", () => {
    if (before) root.dataset.theme = before; else delete root.dataset.theme;
    drawAll();
  });
  drawAll().then(() => { root.dataset.drawn = String(figures.length); });
})();
