// Draws the charts with uPlot, and makes the sliders and the routes of the report work. No request leaves the page.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  // Distinguishable with red-green colour blindness (Okabe and Ito 2008); as in analysis/figures.py.
  const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a900", "#6e6e6e", "#78783c",
    "#9678dc", "#3c3ca0", "#a0c85a"];
  const colour = (k) => COLOURS[k % COLOURS.length];
  const make = (tag, parent, text, props) => {
    const node = Object.assign(document.createElement(tag), props || {});
    if (text !== undefined) node.textContent = text;
    return parent.appendChild(node);
  };

  const drawChart = (figure, chart) => {
    const curves = chart.curves;
    const aligned = uPlot.join(curves.map((c) => [c.x, c.y]));
    const series = curves.map((c, i) => {
      const points = c.kind === "fault" || c.kind === "restart" || c.x.length < 3;
      return {
        label: c.label, spanGaps: true, width: points ? 0 : 2, stroke: c.kind === "fault" ? "#d00" : colour(i),
        points: { show: points, size: 9, fill: c.kind === "fault" ? "#d00" : undefined },
        value: (u, v) => (v === null || v === undefined ? "" : String(v)),
      };
    });
    const axis = { stroke: "#444", grid: { stroke: "#ddd", width: 1 } };
    const size = () => ({ width: Math.max(240, figure.clientWidth), height: 240 });
    const short = (u, ticks) => ticks.map((v) => (v === 0 ? "0" : Math.abs(v) >= 1e4 || Math.abs(v) < 1e-3 ?
      v.toExponential(1) : String(+v.toPrecision(4))));
    const plot = new uPlot({
      ...size(), scales: { x: { time: false } },
      series: [{ label: chart.x }, ...series],
      axes: [{ ...axis, values: short, label: chart.x, labelSize: 18 }, { ...axis, values: short, size: 62 }],
    }, aligned, figure);
    new ResizeObserver(() => plot.setSize(size())).observe(figure);
  };
  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    drawChart(figure, data.charts[figure.dataset.chart]);
  }

  // A slider over the steps of something; `show` is called with the chosen entry.
  const slider = (parent, entries, show) => {
    const label = make("label", parent);
    const text = make("span", label);
    const input = make("input", label, undefined, { type: "range", min: 0, max: entries.length - 1, step: 1 });
    input.value = entries.length - 1;
    input.hidden = entries.length < 2;
    const update = () => {
      const entry = entries[input.value];
      text.textContent = `step ${entry.step} (${+input.value + 1} of ${entries.length}) `;
      show(entry);
    };
    input.addEventListener("input", update);
    return update;
  };

  for (const box of document.querySelectorAll("[data-samples]")) {
    const update = slider(box, data.samples[box.dataset.samples], (entry) => {
      image.src = entry.src;
      image.alt = `sample grid of step ${entry.step}`;
    });
    const image = make("img", box, undefined, { className: "grid" });
    update();
  }

  const drawRegion = (canvas, region, k) => {
    const [h, w, cells] = region;
    canvas.width = w; canvas.height = h;
    const context = canvas.getContext("2d");
    for (let i = 0; i < h * w; i++) {
      context.fillStyle = cells[i] === "1" ? colour(k) + "99" : "#ffffffcc";
      context.fillRect(i % w, Math.floor(i / w), 1, 1);
    }
    return cells.split("1").length - 1;
  };
  const buttons = (parent, count, name, colourOf, className, chosen, choose) => {
    parent.replaceChildren();
    for (let i = 0; i < count; i++) {
      const button = make("button", parent, name(i), { className, type: "button" });
      button.setAttribute("aria-pressed", i === chosen);
      if (colourOf) button.style.background = colourOf(i);
      button.addEventListener("click", () => choose(i));
    }
  };
  const drawRoutes = (box) => {
    const entries = data.routes[box.dataset.routes];
    let routes, word, block = 0, pass = 0;
    const head = make("div", box);
    const prompt = make("p", box);
    const path = make("p", box, "", { className: "path" });
    const panel = {};
    for (const [key, title] of [["words", "1. Word"], ["blocks", "2. Block: the space expert of the word in each block"],
      ["region", "3. Region of the word in this block"], ["passes", "4. Timestep: the time expert of this block"]]) {
      make("h3", box, title);
      panel[key] = make("div", box);
    }
    const overlay = make("div", panel.region, undefined, { className: "overlay" });
    const image = make("img", overlay, undefined, { alt: "the sampled image" });
    const canvas = make("canvas", overlay);
    const refresh = () => {
      word = Math.min(word, routes.words.length - 1);
      const space = word >= 0 && routes.space.length ? routes.space[word] : [];
      const time = routes.time.length ? routes.time[block] : [];
      buttons(panel.words, routes.words.length, (i) => routes.words[i], null, "", word, (i) => { word = i; refresh(); });
      buttons(panel.blocks, Math.max(space.length, routes.time.length), (i) => `${i}: ${space[i] ?? "-"}`,
        (i) => colour(space[i] ?? 7), "cell", block, (i) => { block = i; refresh(); });
      buttons(panel.passes, time.length, (i) => `${Math.round(routes.timesteps[i])}: ${time[i]}`, (i) => colour(time[i]),
        "cell step", pass, (i) => { pass = i; refresh(); });
      const parts = [];
      if (space.length) {
        const region = routes.regions[word][block];
        const cells = drawRegion(canvas, region, space[block]);
        parts.push(`"${routes.words[word]}"`, `region of ${Math.round((100 * cells) / (region[0] * region[1]))}% in block ` +
          `${block} (at timestep ${Math.round(routes.at)})`, `space expert ${space[block]}`);
      }
      if (time.length) parts.push(`timestep ${Math.round(routes.timesteps[pass])}: time expert ${time[pass]}`);
      path.textContent = parts.join(" \u2192 ");
    };
    slider(head, entries, (entry) => {
      routes = entry.routes;
      word ??= routes.words.indexOf(routes.words.reduce((a, b) => (b.length > a.length ? b : a), ""));
      block = Math.min(block, Math.max(routes.time.length, (routes.space[0] || []).length) - 1);
      pass = Math.min(pass, routes.timesteps.length - 1);
      prompt.textContent = `Prompt: ${routes.prompt}`;
      image.src = `data:image/jpeg;base64,${routes.image}`;
      refresh();
    })();
  };
  document.querySelectorAll("[data-routes]").forEach(drawRoutes);
})();
