// The page of `gns-pretrain report`. Names and texts come from run directories and are not trusted:
// they become text nodes, and in plots, which know some HTML, they are escaped.
"use strict";
(() => {
  const report = JSON.parse(document.getElementById("report").textContent);
  const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"];
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const AXES = { step: "optimizer steps", tokens: "tokens", samples: "images", seconds: "training time" };
  const WARM_UP = 0.1; // the y-axis of a loss fits what comes after this share of the x-axis
  const groups = [...new Set(report.runs.map((run) => run.group))];
  // Over about a fiftieth of the longest record.
  const longest = Math.max(...report.runs.map((run) => run.train.step?.length ?? 0));
  const smoothing = Math.round(100 * Math.min(0.95, Math.max(0, 1 - 50 / longest))) / 100;
  const axes = Object.keys(AXES).filter((axis) =>
    report.runs.some((run) => run.train[axis] || run.validation[axis]));
  const axis = !axes.includes("tokens") && axes.includes("samples") ? "samples" : "tokens";
  const shown = { axis, smoothing, log: false, single: false, all: false };
  const lacks = (run, axis) => [run.train, run.validation].some((points) => points.step && !points[axis]);
  const hidden = new Set();
  let sorting = { column: "lowest validation loss", descending: false };

  // ---- elements and texts

  function element(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;");
  const isNumber = (value) => typeof value === "number";
  const colorOf = (run) => COLORS[groups.indexOf(run.group) % COLORS.length];
  const dashOf = (run) => DASHES[Math.floor(groups.indexOf(run.group) / COLORS.length) % DASHES.length];

  function key(run) {
    const made = element("span", { className: "key" });
    const styles = { solid: "solid", dash: "dashed", dot: "dotted", dashdot: "dashed" };
    made.style.borderTop = `3px ${styles[dashOf(run)]} ${colorOf(run)}`;
    return made;
  }

  function valueText(value) {
    if (value === null || value === undefined) return "";
    if (!isNumber(value)) return typeof value === "object" ? JSON.stringify(value) : String(value);
    const size = Math.abs(value);
    return Number.isInteger(value) || (size >= 0.001 && size < 1e6) ? value.toLocaleString("en-US", {
      maximumSignificantDigits: 12 }) : value.toExponential().replace("e+", "e");
  }

  // ---- the table of runs

  const RESULTS = [
    ["lowest validation loss", "nats", (value) => value.toFixed(4)],
    ["final validation loss", "nats", (value) => value.toFixed(4)],
    ["steps", "", (value) => value.toLocaleString("en-US")],
    ["tokens", "", (value) => value.toLocaleString("en-US")],
    ["samples", "images", (value) => value.toLocaleString("en-US")],
    ["final batch", "samples", (value) => value.toLocaleString("en-US")],
    ["time", "s of training", (value) => value.toLocaleString("en-US", { maximumFractionDigits: 1 })],
    ["speed", "tokens or images/s, median", (value) => Math.round(value).toLocaleString("en-US")],
  ];

  function valueIn(run, column) {
    if (column === "run") return run.name;
    if (column === "outcome") return run.outcome;
    return column in run.results ? run.results[column] : run.settings[column];
  }

  function compared(one, other) {
    const [a, b] = [one, other].map((run) => valueIn(run, sorting.column) ?? null);
    if (a === null || b === null) return (a === null) - (b === null); // what is missing comes last
    const order = isNumber(a) && isNumber(b) ? a - b
      : valueText(a).localeCompare(valueText(b), "en", { numeric: true });
    return sorting.descending ? -order : order;
  }

  const sorted = () => [...report.runs].sort(compared);

  function header(column, unit, className) {
    const title = element("span", {}, column);
    const head = element("th", { className: `sortable ${className}`, tabIndex: 0 }, title);
    if (unit) head.append(element("small", {}, unit));
    if (sorting.column === column) head.ariaSort = sorting.descending ? "descending" : "ascending";
    const sort = () => {
      sorting = { column, descending: sorting.column === column && !sorting.descending };
      drawTables();
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
    return head;
  }

  function drawRuns() {
    const head = element("tr", {}, header("run", "", ""), header("outcome", "", ""),
      ...RESULTS.map(([column, unit]) => header(column, unit, "number")),
      ...report.varying.map((column) => header(column, "", "")));
    const lowest = Math.min(...report.runs.map((run) => run.results["lowest validation loss"] ?? Infinity));
    const rows = sorted().map((run) => {
      const box = element("input", { type: "checkbox", checked: !hidden.has(run), title: "show its curves" });
      box.addEventListener("change", () => toggle(run));
      const name = element("td", {}, box, " ", key(run), run.name);
      const outcome = element("td", { className: "text", title: run.error }, run.outcome);
      if (run.error) outcome.append(`: ${run.error}`);
      const results = RESULTS.map(([column, , text]) => {
        const value = run.results[column];
        const best = column === "lowest validation loss" && value === lowest ? " best" : "";
        return element("td", { className: `number${best}` }, isNumber(value) ? text(value) : "");
      });
      const settings = report.varying.map((column) => {
        const text = valueText(run.settings[column]);
        return element("td", { className: "text", title: text }, text);
      });
      return element("tr", { className: hidden.has(run) ? "hidden-run" : "" }, name, outcome, ...results, ...settings);
    });
    document.getElementById("runs").replaceChildren(
      element("thead", {}, head), element("tbody", {}, ...rows));
  }

  // ---- settings side by side

  function drawSettings() {
    const runs = sorted().filter((run) => !hidden.has(run) && Object.keys(run.settings).length);
    const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))].sort();
    const rows = names.map((name) => [name, runs.map((run) => valueText(run.settings[name]))])
      .filter(([name, texts]) => shown.all || (name !== "run_name" && new Set(texts).size > 1))
      .map(([name, texts]) => element("tr", {}, element("td", {}, name), ...texts.map((text) => element("td",
        { className: `text${text === texts[0] ? "" : " other"}`, title: text }, text))));
    const head = element("tr", {}, element("th", {}, "setting"),
      ...runs.map((run) => element("th", {}, key(run), run.short)));
    document.getElementById("settings").replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
  }

  // ---- curves

  function timeUnit() {
    const longest = Math.max(0, ...report.runs.map((run) => run.results.time ?? 0));
    if (longest > 7200) return [3600, "h"];
    return longest > 300 ? [60, "min"] : [1, "s"];
  }

  const [perUnit, unit] = timeUnit();

  function along(points) {
    const x = points[shown.axis] ?? points.step.map(() => null);
    return shown.axis === "seconds" ? x.map((value) => (value === null ? null : value / perUnit)) : x;
  }

  // An average of the points so far, as TensorBoard's: the first ones are not drawn towards 0.
  function smoothed(values, decay) {
    let total = 0, weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      total = decay * total + (1 - decay) * value;
      weight = decay * weight + (1 - decay);
      return total / weight;
    });
  }

  function trace(run, points, values, label, more) {
    const name = escaped(run.short);
    return {
      x: along(points), y: values, name, mode: "lines", showlegend: false, connectgaps: true,
      customdata: points.step.map((step, i) => [step, (points.tokens ?? points.samples)?.[i] ?? null, points.seconds?.[i] ?? null]),
      hovertemplate: `${label} <b>%{y:.6~g}</b><br>step %{customdata[0]:,}` +
        (points.tokens || points.samples ? `<br>%{customdata[1]:,} ${points.tokens ? "tokens" : "images"}` : "") +
        (points.seconds ? "<br>%{customdata[2]:,.1f} s" : "") + "<extra>%{fullData.name}</extra>",
      ...more,
      line: { color: colorOf(run), dash: dashOf(run), width: 1.8, ...more?.line },
    };
  }

  const plain = (part, column, label) => (run) =>
    run[part][column] ? [trace(run, run[part], run[part][column], label)] : [];

  const withRaw = (column, label) => (run) => {
    const values = run.train[column];
    if (!values) return [];
    if (shown.smoothing === 0) return [trace(run, run.train, values, label, { line: { width: 1.2 } })];
    const opacity = Math.max(0.08, 0.3 / Math.sqrt(report.runs.length));
    const faint = { opacity, hoverinfo: "skip", hovertemplate: null, line: { width: 1, dash: "solid" } };
    return [
      trace(run, run.train, values, label, faint),
      trace(run, run.train, smoothed(values, shown.smoothing), `${label}, smoothed`),
    ];
  };

  function batchTraces(run) {
    const traces = [];
    if (run.batch.batch_size) traces.push(trace(run, run.batch, run.batch.batch_size, "batch size", { line: { shape: "hv" } }));
    if (run.decisions.to) {
      const { from, to, target, why, lr_multiplier: multiplier, step } = run.decisions;
      traces.push(trace(run, run.decisions, to, "", {
        mode: "markers", marker: { color: colorOf(run), size: 7, line: { color: "#fff", width: 1 } },
        text: step.map((_, i) => `batch size ${from[i]} → <b>${to[i]}</b> at step ${step[i]}` +
          (isNumber(target?.[i]) ? `<br>target ${target[i].toPrecision(4)}` : "") +
          (why?.[i] ? `<br>${escaped(why[i])}` : "") +
          (isNumber(multiplier?.[i]) ? `<br>learning rate × ${multiplier[i].toPrecision(4)}` : "")),
        hovertemplate: "%{text}<extra>%{fullData.name}</extra>",
      }));
    }
    return traces;
  }

  // Manhattan, plug-in: of manhattan/plug_in.
  const noiseText = (name) => escaped(name[0].toUpperCase() + name.slice(1).replace("/", ", ").replace("_", "-"));

  const noiseNames = [...new Set(report.runs.flatMap((run) =>
    Object.keys(run.noise).filter((name) => run.noise[name].step)))].sort();

  // Colors are the runs' and dashes the noise scales'; of one run, both are the noise scales'.
  function noiseTraces(run) {
    return Object.entries(run.noise).filter(([, points]) => points.step).map(([name, points]) => {
      const number = noiseNames.indexOf(name);
      const values = shown.single ? points.noise_scale : points.noise_scale_ema ?? points.gns_ema;
      const line = { dash: DASHES[number % DASHES.length], width: name === run.followed ? 2.6 : 1.5 };
      if (groups.length === 1) line.color = COLORS[number % COLORS.length];
      const label = `${noiseText(name)}${name === run.followed ? ", decides on the batch" : ""}<br>noise scale`;
      return trace(run, points, values ?? [], label, { line });
    });
  }

  function noiseLegend() {
    return noiseNames.map((name, number) => {
      const color = groups.length === 1 ? COLORS[number % COLORS.length] : "#60646c";
      const line = { color, dash: DASHES[number % DASHES.length], width: 2 };
      return { x: [null], y: [null], mode: "lines", name: noiseText(name), showlegend: true, line };
    });
  }

  const PANELS = [
    { title: "Validation loss", unit: "nats", loss: true,
      traces: plain("validation", "loss", "validation loss") },
    { title: "Validation accuracy", unit: "", traces: plain("validation", "accuracy", "validation accuracy") },
    { title: "Training loss", unit: "nats", loss: true, traces: withRaw("train_loss", "training loss"),
      note: () => (shown.smoothing ? `smoothed (${shown.smoothing}); faint: as recorded` : "as recorded") },
    { title: "Batch size", unit: "samples", traces: batchTraces, fromZero: true,
      note: () => "points: decisions of the batch-size policy; hover for target and reason" },
    { title: "Noise scale", unit: "samples", log: true, ticks: "~g", traces: noiseTraces, legend: noiseLegend,
      note: () => `${shown.single ? "each measurement" : "running average"}; thick: the one that decides on the batch` },
    { title: "Learning rate", unit: "", log: true, ticks: ".0e", traces: plain("train", "lr", "learning rate") },
    { title: "Gradient norm", unit: "Euclidean, before clipping", log: true, ticks: "~g",
      traces: withRaw("grad_norm", "gradient norm") },
  ].filter((panel) => report.runs.some((run) => panel.traces(run).length));

  // [low, high] of what is drawn after the first steps, with some room.
  function rangeAfterWarmUp(traces, isLog) {
    const values = traces.flatMap((one) =>
      one.y.filter((y, i) => isNumber(y) && isNumber(one.x[i]) && one.x[i] >= WARM_UP * lastX()));
    if (!values.length) return undefined;
    const [low, high] = values.reduce(([a, b], y) => [Math.min(a, y), Math.max(b, y)], [Infinity, -Infinity]);
    const room = isLog ? 0.04 * Math.log10(high / low) : 0.06 * (high - low);
    if (!(room > 0)) return undefined;
    return isLog ? [Math.log10(low) - room, Math.log10(high) + room] : [low - room, high + room];
  }

  // The end of the x-axis of all panels.
  function lastX() {
    const parts = report.runs.flatMap((run) => [run.train, run.validation]);
    return Math.max(0, ...parts.map((points) => (points[shown.axis] ? along(points).at(-1) : 0)));
  }

  function drawPanel(panel) {
    const traces = report.runs.filter((run) => !hidden.has(run)).flatMap(panel.traces);
    const isLog = panel.loss ? shown.log : panel.log;
    const yaxis = { type: isLog ? "log" : "linear", automargin: true, gridcolor: "#eceef1", zeroline: false,
      tickformat: panel.ticks, dtick: isLog && !panel.loss ? "D2" : undefined };
    if (panel.loss) yaxis.range = rangeAfterWarmUp(traces, isLog);
    if (panel.fromZero) yaxis.rangemode = "tozero";
    const text = shown.axis === "seconds" ? `${AXES.seconds} (${unit})` : AXES[shown.axis];
    const xaxis = { title: { text, standoff: 6 }, exponentformat: "B", gridcolor: "#eceef1", zeroline: false,
      range: [0, 1.02 * lastX()] };
    const layout = {
      font: { family: "system-ui, sans-serif", size: 12, color: "#1c2024" },
      margin: { l: 54, r: 14, t: 8, b: 44 }, hovermode: "closest", dragmode: "zoom",
      uirevision: shown.axis + shown.log, // what was zoomed stays so until then
      xaxis, yaxis, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      hoverlabel: { align: "left", bgcolor: "#fff", bordercolor: "#c5c9d0", font: { color: "#1c2024" } },
    };
    const config = { displaylogo: false, responsive: true, plotlyServerURL: "", // nothing is uploaded
      modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]] };
    panel.noteAt.textContent = panel.note?.() ?? "\u00a0"; // as high as a note
    return Plotly.react(panel.plot, [...traces, ...(panel.legend?.() ?? [])], layout, config);
  }

  // A part of the x-axis that is chosen in one panel is shown in all.
  function linkAxes(panel) {
    panel.plot.on("plotly_relayout", (change) => {
      const range = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      const wanted = isNumber(range[0]) ? { "xaxis.range": range } : { "xaxis.autorange": true };
      if (!isNumber(range[0]) && !change["xaxis.autorange"]) return;
      for (const other of PANELS) {
        const axis = other.plot.layout.xaxis;
        const same = wanted["xaxis.range"] ? String(axis.range) === String(range) : axis.autorange;
        if (other !== panel && !same) Plotly.relayout(other.plot, wanted);
      }
    });
  }

  const drawPanels = () => Promise.all(PANELS.map(drawPanel));

  // ---- what can be chosen

  function toggle(run) {
    if (!hidden.delete(run)) hidden.add(run);
    drawTables();
    drawControls();
    drawPanels();
  }

  function button(text, pressed, act, className = "") {
    const made = element("button", { type: "button", className, ariaPressed: String(pressed) }, text);
    made.addEventListener("click", act);
    return made;
  }

  function checkbox(text, name, draw) {
    const box = element("input", { type: "checkbox", checked: shown[name] });
    box.addEventListener("change", () => {
      shown[name] = box.checked;
      draw();
    });
    return element("label", {}, box, ` ${text}`);
  }

  function drawControls() {
    const choices = axes.map((axis) =>
      button(AXES[axis], shown.axis === axis, () => {
        shown.axis = axis;
        drawControls();
        drawPanels();
      }));
    const slider = element("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: shown.smoothing });
    const label = element("label", {}, "smoothing ", slider);
    slider.addEventListener("input", () => {
      shown.smoothing = Number(slider.value);
      drawPanels();
    });
    const chips = report.runs.map((run) => {
      const chip = button(run.short, !hidden.has(run), () => toggle(run), "chip");
      chip.prepend(key(run));
      chip.title = run.name;
      return chip;
    });
    const all = button(hidden.size ? "show all" : "hide all", false, () => {
      const hide = !hidden.size;
      hidden.clear();
      if (hide) report.runs.forEach((run) => hidden.add(run));
      drawTables();
      drawControls();
      drawPanels();
    }, "all");
    const lacking = report.runs.filter((run) => lacks(run, shown.axis));
    document.getElementById("lacking").textContent = lacking.length
      ? `Not drawn over ${AXES[shown.axis]}, which their records lack: ${lacking.map((run) => run.short).join("; ")}` : "";
    document.getElementById("controls").replaceChildren(
      element("span", { className: "choice" }, ...choices), label,
      checkbox("logarithmic loss", "log", drawPanels),
      ...(noiseNames.length ? [checkbox("each noise measurement", "single", drawPanels)] : []),
      element("div", { className: "chips" }, ...chips, ...(chips.length > 1 ? [all] : [])));
  }

  function drawTables() {
    drawRuns();
    drawSettings();
  }

  report.runs = sorted();
  if (report.runs.some((run) => lacks(run, shown.axis))) shown.axis = "step";
  if (report.runs.every((run) => !Object.keys(run.settings).length)) document.getElementById("side-by-side").hidden = true;
  document.getElementById("about").textContent = report.about;
  if (report.notes.length) {
    document.getElementById("notes").append(element("div", { className: "notes" },
      ...report.notes.map((note) => element("p", {}, note))));
  }
  for (const panel of PANELS) {
    panel.plot = element("div", { className: "plot" });
    panel.noteAt = element("p");
    const title = panel.unit ? `${panel.title} (${panel.unit})` : panel.title;
    document.getElementById("panels").append(
      element("div", { className: "panel" }, element("h3", {}, title), panel.noteAt, panel.plot));
  }
  document.getElementById("which").append(checkbox("all settings, also those that agree", "all", drawSettings));
  drawTables();
  drawControls();
  drawPanels().then(() => {
    PANELS.forEach(linkAxes);
    document.body.dataset.drawn = "true";
  });
})();
