"use strict";
// Charts of one run or several, drawn by uPlot: one cursor and one zoom for all, values under the cursor in the legends,
// light, dark and paper, and the keyboard. sftCharts(place).show(runs) draws; called again with more, it goes on where
// the reader is. A run is {name, moments, curves}, as report.json has them.
const sftCharts = place => {
  // In order; below them come numbers of plugins, each in a chart of its own.
  const CHARTS = {
    loss: { title: "Loss", unit: "nats a target token", format: "plain", log: true },
    learning_rate: { title: "Learning rate", unit: "", format: "exponent" },
    grad_norm: { title: "Gradient norm", unit: "before it is clipped", format: "plain", log: true },
    tokens_per_second: { title: "Speed", unit: "tokens a second", format: "whole" },
    memory_mib: { title: "Memory", unit: "MiB, the most so far", format: "whole" },
    padding: { title: "Padding", unit: "of the tokens in rows", format: "share" },
    accuracy: { title: "Accuracy", unit: "target tokens that are the likeliest token", format: "share" },
    objective: { title: "Objective", unit: "on dev data", format: "plain", log: true },
    answers: { title: "Answers", unit: "scores of the dev answers, 0 to 1", format: "plain" },
  };
  const COLOURS = {
    light: ["#0b5cad", "#b8460e", "#12795a", "#7a3db8", "#b3261e", "#0c7285", "#7d5a00", "#5b6470"],
    dark: ["#6cb2f7", "#f3965c", "#52c79b", "#c39af0", "#ff8a80", "#58c4d6", "#dcb545", "#aab4bf"],
  };
  const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3]];
  const NAMES = ["train", "dev", "each step"]; // have the same colours in each chart
  const AXES = { steps: "step", epochs: "epoch", tokens: "tokens", seconds: "time" };
  const POINTS = 40; // a curve of fewer points shows them
  const state = { axis: "steps", log: false, smooth: 0, range: null, full: [0, 1], off: new Set(), runs: [], paper: false };
  const charts = new Map();

  const make = (tag, given = {}, ...children) => {
    const one = document.createElement(tag);
    for (const [name, value] of Object.entries(given)) one.setAttribute(name, value);
    one.append(...children);
    return one;
  };
  const short = value => Number(value.toPrecision(6));
  const clock = seconds => {
    const whole = Math.round(seconds);
    const two = number => String(number).padStart(2, "0");
    return `${Math.floor(whole / 3600)}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
  };
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
  const figures = {
    plain: value => (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5) ? value.toExponential(2) : value.toPrecision(4)),
    exponent: value => (value === 0 ? "0" : value.toExponential(2)),
    whole: value => Math.round(value).toLocaleString("en"),
    share: value => `${(100 * value).toFixed(1)} %`,
  };
  const ticks = {
    plain: value => (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5) ? short(value).toExponential() : String(short(value))),
    exponent: value => (value === 0 ? "0" : short(value).toExponential()),
    whole: value => (Math.abs(value) >= 1e4 ? compact.format(value) : short(value).toLocaleString("en")),
    share: value => `${short(100 * value)} %`,
  };
  const onAxis = {
    steps: value => Math.round(value).toLocaleString("en"),
    epochs: value => String(Number(value.toPrecision(4))),
    tokens: value => compact.format(value),
    seconds: clock,
  };

  // --- the tools above the charts ---

  const axis = make("select");
  for (const [name, label] of Object.entries(AXES)) axis.append(make("option", { value: name }, label));
  const log = make("input", { type: "checkbox" });
  const smooth = make("input", { type: "range", min: "0", max: "0.98", step: "0.02", value: "0" });
  const whole = make("button", { type: "button" }, "Whole run");
  const where = make("output", { class: "where", "aria-live": "polite" });
  const grid = make("div", { class: "grid" });
  place.replaceChildren(
    make("div", { class: "tools" },
      make("label", {}, "By ", axis), make("label", {}, log, " Losses on a log scale"),
      make("label", {}, "Smoothing ", smooth), whole, where),
    grid);
  axis.addEventListener("change", () => { state.axis = axis.value; state.range = null; draw(); });
  log.addEventListener("change", () => { state.log = log.checked; draw(); });
  smooth.addEventListener("input", () => { state.smooth = Number(smooth.value); draw(); });
  whole.addEventListener("click", () => zoom(...state.full));

  // --- one cursor, one zoom ---

  const near = (a, b) => Math.abs(a - b) <= 1e-9 * Math.max(1, Math.abs(a), Math.abs(b));

  function zoom(from, to) {
    const [first, last] = state.full;
    const min = Math.max(first, Math.min(from, to)), max = Math.min(last, Math.max(from, to));
    if (!(max > min)) return;
    state.range = near(min, first) && near(max, last) ? null : [min, max];
    for (const { drawn } of charts.values()) drawn?.setScale("x", { min, max });
  }

  function zoomed(drawn, key) {
    const { min, max } = drawn.scales.x, wanted = state.range ?? state.full;
    if (key === "x" && min !== null && !(near(min, wanted[0]) && near(max, wanted[1]))) zoom(min, max);
  }

  function pressed(event, chart) {
    const drawn = chart.drawn;
    if (drawn === null || event.ctrlKey || event.metaKey || event.altKey) return;
    const { min, max } = drawn.scales.x, xs = drawn.data[0], width = max - min;
    const here = drawn.cursor.idx ?? null;
    const middle = here === null ? (min + max) / 2 : xs[here];
    const shift = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (shift !== undefined && event.shiftKey) {
      const by = Math.max(state.full[0] - min, Math.min(state.full[1] - max, shift * width / 4));
      zoom(min + by, max + by);
    } else if (shift !== undefined) {
      const inside = xs.map((x, number) => number).filter(number => xs[number] >= min && xs[number] <= max);
      const at = here === null ? (shift > 0 ? -1 : inside.length) : inside.indexOf(here);
      const next = inside[Math.max(0, Math.min(inside.length - 1, at + shift))];
      if (next !== undefined) drawn.setCursor({ left: drawn.valToPos(xs[next], "x"), top: drawn.over.clientHeight / 2 }, true, true);
    } else if (event.key === "+" || event.key === "=") {
      zoom(middle - width / 4, middle + width / 4);
    } else if (event.key === "-") {
      zoom(middle - width, middle + width);
    } else if (event.key === "Home" || event.key === "0") {
      zoom(...state.full);
    } else if (event.key === "Escape") {
      drawn.setCursor({ left: -10, top: -10 }, true, true);
    } else {
      return;
    }
    event.preventDefault();
  }

  // --- what is drawn ---

  // Steps as places on the axis; between two logged steps what is counted grows evenly. Places ascend.
  function placed(run, steps) {
    const at = run.moments.steps, to = run.moments[state.axis];
    let number = 0, before = -Infinity;
    return steps.map(step => {
      let x = step;
      if (state.axis !== "steps") {
        while (number < at.length && at[number] < step) number += 1;
        const first = number > 0 ? at[number - 1] : 0, from = number > 0 ? to[number - 1] : 0;
        x = number === at.length ? from : from + (to[number] - from) * (step - first) / (at[number] - first || 1);
      }
      before = x > before ? x : before + 1e-6;
      return before;
    });
  }

  // An exponential mean that does not begin at zero (as Adam's moments are corrected).
  function smoothed(values, share) {
    let mean = 0, weight = 0;
    return values.map(value => {
      mean = share * mean + (1 - share) * value;
      weight = share * weight + (1 - share);
      return mean / weight;
    });
  }

  function lines(chart) {
    const of = state.runs.map(run => run.curves.filter(curve => curve.chart === chart));
    const names = [...new Set(of.flatMap(curves => curves.map(curve => curve.name)))];
    const alone = state.runs.length === 1;
    return of.flatMap((curves, number) => curves.map(curve => {
      const name = names.indexOf(curve.name), shared = NAMES.indexOf(curve.name);
      const hue = shared >= 0 ? shared : NAMES.length + names.filter(one => !NAMES.includes(one)).indexOf(curve.name);
      const label = alone ? curve.name : names.length === 1 ? state.runs[number].name : `${state.runs[number].name}: ${curve.name}`;
      return {
        key: `${chart} ${label}`, label, faint: curve.name === "each step", colour: alone ? hue : number, dash: alone ? [] : DASHES[name % DASHES.length],
        xs: placed(state.runs[number], curve.steps), ys: curve.values,
      };
    }));
  }

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const dark = !state.paper && matchMedia("(prefers-color-scheme: dark)").matches;
    const named = name => style.getPropertyValue(name).trim();
    return {
      of: COLOURS[dark ? "dark" : "light"],
      ink: state.paper ? "#333" : named("--soft"), line: state.paper ? "#ccc" : named("--line"), ground: state.paper ? "#fff" : named("--card"),
    };
  }

  function draw() {
    const had = new Set(state.runs.flatMap(run => run.curves.map(curve => curve.chart)));
    const names = [...Object.keys(CHARTS).filter(name => had.has(name)), ...[...had].filter(name => !(name in CHARTS))];
    const found = new Map(names.map(name => [name, lines(name)]));
    let [first, last] = [Infinity, -Infinity];
    for (const line of [...found.values()].flat()) {
      first = Math.min(first, line.xs[0]);
      last = Math.max(last, line.xs[line.xs.length - 1]);
    }
    state.full = first < last ? [first, last] : [first - 0.5, first + 0.5];
    for (const [name, chart] of charts) {
      if (!found.has(name)) {
        chart.drawn?.destroy();
        chart.figure.remove();
        charts.delete(name);
      }
    }
    const theme = colours();
    for (const [name, own] of found) {
      if (!charts.has(name)) charts.set(name, framed(name));
      const chart = charts.get(name);
      if (chart.figure.parentNode === null) grid.append(chart.figure);
      redraw(chart, own, theme);
    }
  }

  function framed(name) {
    const said = CHARTS[name] ?? { title: name, unit: "", format: "plain" };
    const plot = make("div", { class: "plot", tabindex: "0", role: "group" });
    const legend = make("ul", { class: "legend" });
    const figure = make("figure", { "data-chart": name },
      make("figcaption", {}, make("strong", {}, said.title), " ", make("span", { class: "unit" }, said.unit)), plot, legend);
    const chart = { name, said, figure, plot, legend, drawn: null, values: [] };
    plot.addEventListener("keydown", event => pressed(event, chart));
    new ResizeObserver(() => fit(chart)).observe(plot);
    return chart;
  }

  const size = chart => ({ width: state.paper ? 330 : Math.max(120, chart.plot.clientWidth), height: state.paper ? 170 : 210 });

  function fit(chart) {
    const wanted = size(chart);
    if (chart.drawn !== null && wanted.width !== chart.drawn.width) chart.drawn.setSize(wanted);
  }

  function redraw(chart, own, theme) {
    const { said, plot, legend } = chart;
    const series = [{}], tables = [], shown = [];
    for (const line of own) {
      const colour = theme.of[line.colour % theme.of.length];
      const usual = { label: line.label, stroke: colour, dash: line.dash, width: line.faint ? 1 : 2, alpha: line.faint ? 0.5 : 1, show: !state.off.has(line.key) };
      const points = { show: line.xs.length <= POINTS && !line.faint, size: 5, width: 1.5, fill: theme.ground };
      const is = state.smooth > 0 && line.xs.length > 8;
      shown.push({ line, colour, number: series.length + (is ? 1 : 0), all: is ? [series.length, series.length + 1] : [series.length] });
      if (is) {
        series.push({ ...usual, alpha: 0.3, width: 1, points: { show: false } });
        tables.push([line.xs, line.ys]);
      }
      series.push({ ...usual, points: is ? { show: false } : points });
      tables.push([line.xs, is ? smoothed(line.ys, state.smooth) : line.ys]);
    }
    const lowest = Math.min(...own.map(line => line.ys.reduce((a, b) => Math.min(a, b), Infinity)));
    const isLog = state.log && said.log && lowest > 0;
    const tick = ticks[said.format], strokes = series.map(one => one.stroke);
    const options = {
      ...size(chart),
      legend: { show: false },
      cursor: {
        drag: { x: true, y: false, dist: 4 },
        bind: { dblclick: () => () => { zoom(...state.full); return null; } },
        sync: { key: "sft", filters: { pub: type => type === "mousemove" || type === "mouseleave", sub: () => true } },
        points: { size: 8, fill: (_, number) => strokes[number], stroke: (_, number) => strokes[number] },
      },
      scales: {
        x: { time: false, range: (_, min, max) => [min, max] },
        y: isLog ? { distr: 3 } : { range: (_, low, high) => around(low, high) },
      },
      axes: [
        { stroke: theme.ink, grid: { show: false }, ticks: { stroke: theme.line, size: 4 }, size: 28, gap: 4, values: (_, all) => all.map(onAxis[state.axis]), incrs: INCREMENTS[state.axis], font: FONT },
        { stroke: theme.ink, grid: { stroke: theme.line, width: 1 }, ticks: { show: false }, gap: 6, values: (_, all) => all.map(value => (value === null ? "" : tick(value))), size: (_, all) => 14 + 7 * Math.max(2, ...(all ?? []).map(text => text.length)), font: FONT },
      ],
      series,
      hooks: { setScale: [zoomed], setCursor: [drawn => tell(chart, drawn)] },
    };
    chart.drawn?.destroy();
    chart.drawn = new uPlot(options, uPlot.join(tables), plot);
    const [min, max] = state.range ?? state.full;
    chart.drawn.setScale("x", { min, max });
    legend.replaceChildren();
    chart.values = shown.map(({ line, colour, number, all }) => {
      const value = make("span", { class: "value" });
      const button = make("button", { type: "button", "aria-pressed": String(!state.off.has(line.key)) }, swatch(colour, line.dash), line.label);
      button.addEventListener("click", () => {
        const hides = !state.off.delete(line.key);
        if (hides) state.off.add(line.key);
        button.setAttribute("aria-pressed", String(!hides));
        for (const one of all) chart.drawn.setSeries(one, { show: !hides });
      });
      legend.append(make("li", {}, button, " ", value));
      return { value, number, line };
    });
    const ends = own.map(line => `${line.label} ${figures[said.format](line.ys[0])} to ${figures[said.format](line.ys[line.ys.length - 1])}`);
    plot.setAttribute("aria-label", `${said.title}: ${ends.join(", ")}. Arrow keys move the cursor, plus and minus zoom, Home shows the whole run.`);
    tell(chart, chart.drawn);
  }

  const FONT = "12px system-ui, sans-serif";
  const tens = [...Array(13).keys()].flatMap(power => [1, 2, 5].map(one => one * 10 ** power));
  // What two marks on the axis may be apart; undefined leaves it to uPlot.
  const INCREMENTS = { steps: tens, tokens: tens, seconds: [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, ...tens.map(one => one * 3600)] };

  // A little room above and below; a curve that does not move lies in the middle.
  function around(low, high) {
    if (low === null || high === null) return [0, 1];
    const far = Math.max(Math.abs(low), Math.abs(high));
    if (high - low <= 1e-9 * far) return far === 0 ? [-0.1, 1] : [low - far * 0.1, high + far * 0.1];  // rounding moves it
    const room = (high - low) * 0.06;
    return [low >= 0 && low < room * 4 ? 0 : low - room, high + room];
  }

  function swatch(colour, dash) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    for (const [name, value] of Object.entries({ width: 22, height: 10, viewBox: "0 0 22 10", "aria-hidden": "true" })) svg.setAttribute(name, value);
    for (const [name, value] of Object.entries({ x1: 0, y1: 5, x2: 22, y2: 5, stroke: colour, "stroke-width": 3, "stroke-dasharray": dash.join(" ") || "none" })) line.setAttribute(name, value);
    svg.append(line);
    return svg;
  }

  // The values under the cursor; without one, the last ones.
  function tell(chart, drawn) {
    const on = drawn.cursor.idx ?? null;
    for (const { value, number, line } of chart.values) {
      const at = on === null ? null : drawn.cursor.idxs[number];
      const found = on === null ? line.ys[line.ys.length - 1] : at === null || at === undefined ? null : drawn.data[number][at];
      value.textContent = found === null || found === undefined ? "" : figures[chart.said.format](found);
    }
    where.textContent = on === null ? "" : `${AXES[state.axis]} ${onAxis[state.axis](drawn.data[0][on])}`;
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  addEventListener("beforeprint", () => { state.paper = true; draw(); });
  addEventListener("afterprint", () => { state.paper = false; draw(); });

  return {
    show(runs) {
      state.runs = runs;
      draw();
    },
  };
};
