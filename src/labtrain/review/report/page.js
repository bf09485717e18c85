// Draws the charts with plotly.js. The reader can zoom by mouse or keyboard, use a log scale, and hide runs.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const shown = new Set(data.names.keys());
  const touch = matchMedia("(pointer: coarse)").matches;  // there a finger on a chart must scroll the page
  const plots = data.charts.map((chart, number) => ({ chart, number, place: document.getElementById(`plot-${number}`) }));
  const PATTERNS = { complete: "", interrupted: "/", killed: "x", failed: "\\", running: "." };
  const TONES = { complete: "good", interrupted: "part", killed: "bad", failed: "bad", running: "muted" };
  let printing = false;

  // Charts with the same kind of x axis share its range.
  const whole = {};
  for (const kind of ["step", "time"]) {
    let low = Infinity, high = -Infinity;
    for (const chart of data.charts.filter((each) => each.kind === kind)) {
      for (const x of [...chart.traces.flatMap((trace) => [trace.x[0], trace.x.at(-1)]), ...chart.marks.map((mark) => mark.at)]) {
        low = Math.min(low, x);
        high = Math.max(high, x);
      }
    }
    const edge = (high - low) * 0.02 || 1;
    whole[kind] = [low - edge, high + edge];
  }

  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const of_run = (run) => colour(`run-${run % data.colours}`);
  // Plotly interprets text as a subset of HTML.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  const axis = () => ({
    color: colour("muted"), gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, automargin: true,
    tickfont: { size: 12 }, title: { font: { size: 12 }, standoff: 8 },
  });

  function layout(plot) {
    const base = {
      paper_bgcolor: colour("paper"), plot_bgcolor: colour("paper"), margin: { l: 48, r: 12, t: 12, b: 40 },
      font: { family: "system-ui, sans-serif", size: 13, color: colour("text") }, showlegend: false, autosize: true,
      dragmode: touch ? false : "zoom", hovermode: "x unified", hoverdistance: 40,
      hoverlabel: { bgcolor: colour("raised"), bordercolor: colour("line"), font: { color: colour("text") }, namelength: -1 },
      xaxis: { ...axis(), showspikes: true, spikemode: "across", spikethickness: 1, spikedash: "solid", spikecolor: colour("muted") },
      yaxis: axis(),
    };
    if (plot.chart.kind === "timeline") {
      return {
        ...base, barmode: "overlay", hovermode: "closest", showlegend: true, height: 92 + 34 * plot.chart.rows.length,
        legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", itemclick: false, itemdoubleclick: false },
        margin: { ...base.margin, t: 40 }, bargap: 0.35,
        xaxis: { ...base.xaxis, type: "date", showspikes: false },
        yaxis: {
          ...base.yaxis, autorange: false, range: [plot.chart.rows.length - 0.5, -0.5], fixedrange: true, showgrid: false,
          tickvals: [...plot.chart.rows.keys()], ticktext: plot.chart.rows.map(plain),
        },
      };
    }
    const { marks } = plot.chart, narrow = plot.place.clientWidth < 480, [from, to] = whole[plot.chart.kind];
    const apart = ((narrow ? 40 : 110) / Math.max(plot.place.clientWidth, 1)) * (to - from);  // the width of a label
    const close = marks.some((mark, place) => place && mark.at - marks[place - 1].at < apart);
    const rows = close ? Math.min(marks.length, 3) : Math.min(marks.length, 1);
    return {
      ...base,
      xaxis: { ...base.xaxis, title: { ...base.xaxis.title, text: plot.chart.axis },
        unifiedhovertitle: { text: plot.chart.kind === "step" ? "step %{x}" : `%{x:.4~g} ${plain(plot.chart.axis)}` }, range: [...whole[plot.chart.kind]] },
      margin: { ...base.margin, t: 12 + 16 * rows },
      shapes: marks.map((mark) => ({
        type: "line", xref: "x", x0: mark.at, x1: mark.at, yref: "paper", y0: 0, y1: 1,
        line: { color: colour("text"), width: 1, dash: "4px,3px" },
      })),
      annotations: marks.map((mark, place) => ({
        xref: "x", x: mark.at, yref: "paper", y: 1, yanchor: "bottom", yshift: 16 * (place % rows), xanchor: mark.at - from < (to - from) / 3 ? "left" : to - mark.at < (to - from) / 3 ? "right" : "center", showarrow: false,
        text: plain(narrow ? mark.labels : mark.text), font: { size: 12, color: colour("text") },
      })),
    };
  }

  function traces(plot) {
    const { chart } = plot;
    if (chart.kind === "timeline") {
      return chart.traces.map((trace) => ({
        type: "bar", orientation: "h", name: trace.status,
        y: trace.bars.map((bar) => bar.row),
        base: trace.bars.map((bar) => new Date(bar.from * 1000).toISOString()),
        x: trace.bars.map((bar) => (bar.to - bar.from) * 1000),
        customdata: trace.bars.map((bar) => [new Date(bar.from * 1000).toISOString().slice(0, 19).replace("T", " "), bar.text]),
        hovertemplate: `${trace.status}<br>from %{customdata[0]} UTC<br>%{customdata[1]}<extra></extra>`,
        marker: {
          color: colour(TONES[trace.status]), line: { color: colour("text"), width: 1 },
          pattern: { shape: PATTERNS[trace.status], fillmode: "overlay", fgcolor: colour("paper"), fgopacity: 1, size: 7, solidity: 0.35 },
        },
      }));
    }
    const mode = chart.traces.every((trace) => trace.x.length <= 60) ? "lines+markers" : "lines";
    return chart.traces.map((trace) => ({
      type: "scatter", mode, x: trace.x, y: trace.y, connectgaps: false,
      name: plain(trace.of ? `${data.names[trace.run]}, ${trace.of}` : data.names[trace.run]),
      visible: shown.has(trace.run), opacity: trace.x.length > 1000 && chart.traces.length > 1 ? 0.8 : 1,
      xhoverformat: chart.kind === "step" ? "d" : ".4~g",
      line: { color: of_run(trace.run), width: trace.x.length > 1000 ? 1.2 : 1.75, dash: dash(trace.run) }, marker: { size: 5, color: of_run(trace.run) },
    }));
  }

  function dash(run) {
    const found = data.dashes[run % data.dashes.length];
    return found ? found.split(" ").map((part) => `${part}px`).join(",") : "solid";
  }

  function draw(plot) {
    Plotly.newPlot(plot.place, traces(plot), layout(plot), {
      displayModeBar: false, displaylogo: false, responsive: true, scrollZoom: false, showTips: false, doubleClick: "reset",
    });
    plot.place.on("plotly_relayout", () => follow(plot));
    plot.drawn = true;
  }

  // Show the same range of x in all charts of the kind. Each of them fires the event again, and finds nothing to change.
  function follow(plot) {
    const { range } = plot.place.layout.xaxis;
    for (const other of plots) {
      const there = other.drawn && other.chart.kind === plot.chart.kind ? other.place.layout.xaxis.range : range;
      if (there[0] !== range[0] || there[1] !== range[1]) Plotly.relayout(other.place, { "xaxis.range": [...range], ...fitted(other, range) });
    }
  }

  // The y range of the points between two x values; nothing if there are no points.
  function fitted(plot, [from, to]) {
    if (plot.chart.kind === "timeline") return {};
    let low = Infinity, high = -Infinity;
    for (const trace of plot.chart.traces.filter((each) => shown.has(each.run))) {
      trace.y.forEach((value, place) => {
        if (value === null || (plot.log && value <= 0) || trace.x[place] < from || trace.x[place] > to) return;
        const height = plot.log ? Math.log10(value) : value;
        low = Math.min(low, height);
        high = Math.max(high, height);
      });
    }
    const edge = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    return high >= low ? { "yaxis.range": [low - edge, high + edge] } : {};
  }

  function zoom(plot, factor) {
    const { range, type } = plot.place.layout.xaxis;
    const ends = range.map((end) => (type === "date" ? new Date(`${end.replace(" ", "T")}Z`).getTime() : end));
    const middle = (ends[0] + ends[1]) / 2, half = ((ends[1] - ends[0]) / 2) * factor;
    const wanted = [middle - half, middle + half];
    Plotly.relayout(plot.place, {
      "xaxis.range": type === "date" ? wanted.map((end) => new Date(end).toISOString().slice(0, -1)) : wanted, ...fitted(plot, wanted),
    });
  }

  const actions = {
    in: (plot) => zoom(plot, 0.5),
    out: (plot) => zoom(plot, 2),
    reset: (plot) => Plotly.relayout(plot.place, plot.chart.kind === "timeline" ? { "xaxis.autorange": true } : { "xaxis.range": [...whole[plot.chart.kind]], "yaxis.autorange": true }),
    log: (plot, button) => {
      const log = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(log));
      plot.log = log;
      const lost = plot.chart.traces.some((trace) => trace.y.some((value) => value !== null && value <= 0));
      plot.place.parentElement.querySelector(".note").hidden = !(log && lost);
      Plotly.relayout(plot.place, { "yaxis.type": log ? "log" : "linear", "yaxis.autorange": true, ...fitted(plot, plot.place.layout.xaxis.range) });
    },
  };

  // Update colours and width, and keep the visible range.
  function restyle() {
    for (const plot of plots.filter((each) => each.drawn)) {
      const before = plot.place.layout, after = layout(plot);
      for (const name of ["xaxis", "yaxis"]) {
        const { range, autorange, type } = before[name];
        Object.assign(after[name], autorange ? { autorange, type } : { range, autorange, type });
      }
      if (printing) Object.assign(after, { width: 680, autosize: false }, plot.chart.kind === "timeline" ? {} : { height: 260 });
      Plotly.react(plot.place, traces(plot), after);
    }
  }

  root.classList.add("live");
  for (const plot of plots) {
    for (const button of plot.place.parentElement.querySelectorAll("button")) {
      button.addEventListener("click", () => plot.drawn && actions[button.dataset.do](plot, button));
    }
  }
  const legend = document.querySelector(".legend");
  if (legend && data.names.length > 1) {
    legend.hidden = false;
    legend.addEventListener("change", ({ target }) => {
      target.checked ? shown.add(Number(target.value)) : shown.delete(Number(target.value));
      restyle();
    });
  }
  for (const link of document.querySelectorAll("a.download")) {
    const text = document.getElementById(link.dataset.receipt).textContent;
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.hidden = false;
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
  // In print, show every chart and every number in light colours at paper width, but not the receipts.
  const closed = [];
  addEventListener("beforeprint", () => {
    printing = true;
    plots.filter((each) => !each.drawn).forEach(draw);
    restyle();
    for (const each of document.querySelectorAll("details:not(.receipt):not([open])")) closed.push(each), (each.open = true);
  });
  addEventListener("afterprint", () => {
    printing = false;
    restyle();
    for (const each of closed.splice(0)) each.open = false;
  });

  // Draw one at a time, so that the page stays responsive.
  const waiting = [...plots];
  (function next() {
    const plot = waiting.shift();
    if (!plot) return void (root.dataset.charts = "drawn");
    if (!plot.drawn) draw(plot);
    setTimeout(next);
  })();
})();
