"use strict";
// Everything that comes from a run is set as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const ROWS = 100; // of a table that are shown at first
  const $ = (id) => document.getElementById(id);

  function node(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function number(value, digits = 4) {
    if (value === null || value === undefined) return "–";
    if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en");
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-4 || size >= 1e6)) return value.toExponential(2);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return String(Number(value.toPrecision(digits)));
  }
  const fixed = (value) => (value === null || value === undefined ? "–" : Math.abs(value) >= 100 ? number(value) : value.toFixed(3));
  const signed = (value) => (value > 0 ? "+" : "") + fixed(value);
  const between = (low, high) => (low === null || low === undefined || high === null ? "–" : `${fixed(low)} to ${fixed(high)}`);
  const percent = (value) => (value === null ? "–" : `${Number((100 * value).toPrecision(3))} %`);

  function quantile(values, share) {
    const there = values.filter((v) => v !== null && v !== undefined).sort((a, b) => a - b);
    if (!there.length) return null;
    const at = share * (there.length - 1), low = Math.floor(at);
    return there[low] + (at - low) * ((there[low + 1] ?? there[low]) - there[low]);
  }

  // ---------------------------------------------------------------------------------------------------- tables

  // A table that can be searched by its first column and sorted by each. Columns: {label, value(row) to sort by,
  // show(row) or cell(row) to show, text: true where it is not a number, narrow: true where it stays on a narrow screen}.
  class Table {
    constructor(place, caption, columns, count, sortBy, ascending) {
      this.columns = columns;
      this.rows = [...Array(count).keys()];
      this.sortBy = sortBy;
      this.ascending = ascending;
      this.shown = ROWS;
      this.caption = caption;
      const id = `${place.id}-search`;
      this.search = node("input", { type: "search", id, autocomplete: "off", spellcheck: "false" });
      this.search.addEventListener("input", () => { this.shown = ROWS; this.fill(); });
      this.status = node("p", { role: "status" });
      this.body = node("tbody");
      this.heads = columns.map((column, i) => {
        const button = node("button", { type: "button" }, column.label);
        button.addEventListener("click", () => this.sort(i));
        return node("th", { scope: "col", class: this.classes(column), ...(column.about ? { title: column.about } : {}) }, button);
      });
      const table = node("table", {}, node("caption", { class: "hidden" }, caption), node("thead", {}, node("tr", {}, ...this.heads)), this.body);
      this.more = node("button", { type: "button", class: "more" });
      this.more.addEventListener("click", () => { this.shown = Infinity; this.fill(); });
      const tools = node("div", { class: "tools" }, node("label", { for: id }, "Search tasks"), this.search, this.status);
      const region = node("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": caption }, table);
      place.replaceChildren(tools, region, this.more);
      this.fill();
    }

    classes(column) {
      return [column.text ? "text" : "", column.narrow ? "" : "wide-only"].join(" ").trim();
    }

    sort(i) {
      this.ascending = this.sortBy === i ? !this.ascending : !!this.columns[i].text;
      this.sortBy = i;
      this.fill();
    }

    fill() {
      const wanted = this.search.value.trim().toLowerCase();
      const { value, label } = this.columns[this.sortBy];
      const keys = this.rows.map((row) => value(row));
      const names = this.columns[0].value;
      const direction = this.ascending ? 1 : -1;
      const found = this.rows.filter((row) => !wanted || String(names(row)).toLowerCase().includes(wanted));
      found.sort((a, b) => {
        const x = keys[a] ?? null, y = keys[b] ?? null;
        if (x === null || y === null) return (x === null) - (y === null) || a - b; // what has no value comes last
        const order = typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : x - y;
        return direction * order || a - b;
      });
      this.heads.forEach((head, i) => {
        if (i === this.sortBy) head.setAttribute("aria-sort", this.ascending ? "ascending" : "descending");
        else head.removeAttribute("aria-sort");
      });
      const rows = found.slice(0, this.shown).map((row) => node("tr", {}, ...this.columns.map((column, i) => {
        const cell = node(i ? "td" : "th", { ...(i ? {} : { scope: "row" }), class: this.classes(column) });
        cell.append(column.cell ? column.cell(row) : column.show(row));
        return cell;
      })));
      this.body.replaceChildren(...rows);
      this.more.hidden = rows.length === found.length;
      this.more.textContent = `Show all ${found.length.toLocaleString("en")} tasks`;
      const how = `sorted by ${label.toLowerCase()}, ${this.ascending ? "lowest" : "highest"} first`;
      const count = found.length === this.rows.length ? `${found.length.toLocaleString("en")} tasks` : `${found.length.toLocaleString("en")} of ${this.rows.length.toLocaleString("en")} tasks`;
      this.status.textContent = `${count}${rows.length < found.length ? `, ${rows.length} shown` : ""}, ${this.columns[this.sortBy].text ? how.replace("lowest first", "A to Z").replace("highest first", "Z to A") : how}`;
    }
  }

  const SVG = "http://www.w3.org/2000/svg";

  function spark(course) {
    const points = course.map((value, i) => [i, value]).filter(([, value]) => value !== null);
    if (points.length < 2) return "–";
    const width = 90, height = 22, low = -20, high = 100; // hundredths of skill
    const x = (i) => 2 + (i * (width - 6)) / (course.length - 1);
    const y = (v) => 2 + ((high - Math.max(low, v)) * (height - 4)) / (high - low);
    const first = points[0][1] / 100, last = points.at(-1)[1] / 100;
    const drawing = document.createElementNS(SVG, "svg");
    const draw = (tag, attributes) => {
      const made = document.createElementNS(SVG, tag);
      for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
      drawing.append(made);
    };
    const title = `skill ${fixed(first)} to ${fixed(last)} over ${points.length} evaluations`;
    for (const [name, value] of Object.entries({ class: "spark", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title })) drawing.setAttribute(name, value);
    draw("line", { x1: 2, x2: width - 4, y1: y(0), y2: y(0) });
    draw("path", { d: "M" + points.map(([i, v]) => `${x(i).toFixed(1)} ${y(v).toFixed(1)}`).join("L") });
    draw("circle", { cx: x(points.at(-1)[0]), cy: y(points.at(-1)[1]), r: 1.8 });
    return drawing;
  }

  function taskTable(run) {
    const t = run.tasks;
    const all = [
      { label: "Task", text: true, narrow: true, value: (r) => t.task[r], show: (r) => t.task[r] },
      { label: "Kind", text: true, value: (r) => t.kind[r], show: (r) => t.kind[r] },
      { label: "Training labels", value: (r) => t.train[r], show: (r) => number(t.train[r]) },
      { label: `${run.part === "test" ? "Test" : "Valid"} labels`, value: (r) => t.scored[r], show: (r) => number(t.scored[r]) },
      { label: "Expected share", value: (r) => t.share[r], show: (r) => percent(t.share[r]), about: "of the objective: sampling x share x weight" },
    ];
    for (const m of run.metrics) {
      all.push({ label: m === "skill" ? "Skill" : m, narrow: true, value: (r) => t[m][r], cell: (r) => {
        const text = fixed(t[m][r]);
        return m === "skill" && t[m][r] < 0 ? node("span", { class: "worse" }, text) : text;
      } });
      if (t[`${m}_low`]) all.push({ label: m === "skill" ? "Skill, 95 % interval" : `${m}, 95 % interval`, narrow: m === "skill", value: (r) => t[`${m}_low`][r], show: (r) => between(t[`${m}_low`][r], t[`${m}_high`][r]) });
    }
    const usual = [...new Set(Object.values(run.usual))];
    if (t.usual) all.push({ label: usual.length === 1 ? usual[0] : "Usual metric", narrow: true, value: (r) => t.usual[r], show: (r) => (t.usual[r] === null ? "–" : `${usual.length === 1 ? "" : `${run.usual[t.kind[r]]} `}${fixed(t.usual[r])}`), about: "of its kind" });
    if (t.mae) all.push({ label: "MAE", value: (r) => t.mae[r], show: (r) => number(t.mae[r], 3), about: "mean absolute error, in the labels' units" });
    all.push(
      { label: "Weight", value: (r) => t.weight[r], show: (r) => number(t.weight[r], 3), about: "of the balancer, at the end" },
      { label: "Best step", value: (r) => t.best[r], show: (r) => number(t.best[r]), about: "of the evaluations while training" },
      { label: "Course of skill", value: (r) => { const c = t.course[r]; return c.length ? (c.at(-1) ?? -999) - (c[0] ?? -999) : null; }, cell: (r) => spark(t.course[r]), about: "on the valid part, from -0.2 to 1; sorted by how far it rose" },
    );
    const same = all.filter((column) => column.show && !column.narrow && t.task.every((_, r) => column.show(r) === column.show(0)));
    const told = same.filter((column) => column.show(0) !== "–").map((column) => `${column.label.toLowerCase()} ${column.show(0)}`);
    $("tasks-same").textContent = told.length ? `The same for all tasks: ${told.join(", ")}.` : "";
    const columns = all.filter((column) => !same.includes(column));
    const by = columns.findIndex((column) => column.label.toLowerCase() === run.metric.toLowerCase());
    new Table($("tasks-table"), `Tasks of run ${run.name}`, columns, t.task.length, by, run.higher[run.metric]);
  }

  function compareTable(found, run, first) {
    const t = found.tasks;
    const better = (r) => (t.difference[r] === null || t.difference[r] === 0 ? null : (t.difference[r] > 0) === found.higher);
    const columns = [
      { label: "Task", text: true, narrow: true, value: (r) => t.task[r], show: (r) => t.task[r] },
      { label: first.name, value: (r) => t.first[r], show: (r) => fixed(t.first[r]) },
      { label: run.name, value: (r) => t.second[r], show: (r) => fixed(t.second[r]) },
      { label: "Difference", narrow: true, value: (r) => t.difference[r], show: (r) => signed(t.difference[r]) },
      { label: "95 % interval", narrow: true, value: (r) => t.low[r], show: (r) => between(t.low[r], t.high[r]) },
      { label: "False discovery rate", value: (r) => t.q[r], show: (r) => (t.q[r] === null ? "too few rows" : t.q[r] < 0.001 ? "< 0.001" : fixed(t.q[r])) },
      { label: "Verdict", text: true, narrow: true, value: (r) => (found.clear[r] ? (better(r) ? "clearly better" : "clearly worse") : better(r) === null ? "same" : better(r) ? "better" : "worse"), cell: (r) => {
        const word = better(r) === null ? "same" : better(r) ? "better" : "worse";
        return found.clear[r] ? node("span", { class: word }, `clearly ${word}`) : word;
      } },
    ];
    new Table($("compare-table"), `${found.metric} of run ${run.name} against ${first.name}`, columns, t.task.length, 3, !found.higher);
  }

  function runsTable() {
    const labels = [...new Set(data.runs.flatMap((run) => run.headline.map((item) => item.label)))];
    const head = node("tr", {}, node("th", { scope: "col", class: "text" }, "Run"), ...labels.map((label) => node("th", { scope: "col" }, label)));
    const body = data.runs.map((run) => node("tr", {}, node("th", { scope: "row", class: "text" }, run.name), ...labels.map((label) => {
      const item = run.headline.find((each) => each.label === label);
      return node("td", {}, item ? item.value : "–");
    })));
    $("runs").replaceChildren(node("caption", { class: "hidden" }, "Headline of each run"), node("thead", {}, head), node("tbody", {}, ...body));
  }

  // --------------------------------------------------------------------------------------------------- figures

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const escaped = (name) => name.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;"); // plotly reads tags
  const figures = new Map(); // by id

  // A figure with a title and what it says in words; `make` gives plotly its traces and layout when there is time to draw.
  function figure(id, title, words, make, square = false) {
    const place = $(id);
    if (!make) {
      place.replaceChildren(node("figure", {}, node("h3", {}, title), node("figcaption", {}, words)));
      figures.delete(id);
      return;
    }
    const plot = node("div", { class: "plot", role: "img", "aria-label": `${title}: ${words}` });
    place.replaceChildren(node("figure", square ? { class: "square" } : {}, node("h3", {}, title), plot, node("figcaption", {}, words)));
    figures.set(id, { plot, make, drawn: false });
  }

  function draw(one) {
    one.drawn = true;
    const { traces, layout = {} } = one.make();
    const axis = { gridcolor: color("grid"), zerolinecolor: color("line"), linecolor: color("line"), automargin: true };
    const base = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: color("ink"), family: "system-ui, sans-serif", size: 12 },
      margin: { l: 50, r: 12, t: 12, b: 42 }, showlegend: false, hovermode: "closest", dragmode: false,
      hoverlabel: { bgcolor: color("panel"), bordercolor: color("line"), font: { color: color("ink") } },
    };
    const all = { ...base, ...layout, xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis } };
    for (const name of ["xaxis", "yaxis"]) if (typeof all[name].title === "string") all[name].title = { text: all[name].title };
    Plotly.newPlot(one.plot, traces, all, { displayModeBar: false, responsive: true });
  }

  function loadPlotly() {
    if (!window.Plotly) document.body.append(node("script", {}, $("plotly").textContent));
  }

  // One at a time, so that the page stays quick.
  const idle = window.requestIdleCallback ?? ((then) => setTimeout(then, 50));
  function drawWhenIdle() {
    idle(() => {
      const next = window.Plotly && [...figures.values()].find((one) => !one.drawn);
      if (!next) return;
      draw(next);
      drawWhenIdle();
    });
  }
  dark.addEventListener("change", () => { for (const one of figures.values()) if (one.drawn) draw(one); });
  for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) addEventListener(event, () => {
    document.documentElement.classList.toggle("print", printing); // of a page's width, dark on light
    loadPlotly();
    for (const one of figures.values()) draw(one);
  });

  // Two bands and a line: how a number spreads over tasks at each step.
  function fan(spread, step, label, range) {
    const band = (low, high, fill) => [
      { x: step, y: spread[low], mode: "lines", line: { width: 0 }, hoverinfo: "skip" },
      { x: step, y: spread[high], mode: "lines", line: { width: 0 }, fill: "tonexty", fillcolor: fill, hoverinfo: "skip" },
    ];
    return {
      traces: [
        ...band("p10", "p90", color("accent-soft")), ...band("p25", "p75", color("accent-mid")),
        { x: step, y: spread.p50, mode: step.length > 1 ? "lines" : "markers", line: { color: color("accent"), width: 2 }, marker: { color: color("accent") },
          customdata: step.map((_, i) => [spread.p10[i], spread.p90[i]]), hovertemplate: `step %{x}<br>median %{y:.4g}<br>middle 80 %: %{customdata[0]:.4g} to %{customdata[1]:.4g}<extra></extra>` },
      ],
      layout: { xaxis: { title: "step" }, yaxis: { title: label, ...range }, hovermode: "x" },
    };
  }

  function line(x, y, label, extra = {}) {
    return {
      traces: [{ x, y, mode: x.length > 1 ? "lines" : "markers", line: { color: color("accent"), width: 2 }, marker: { color: color("accent") }, hovertemplate: "step %{x}<br>%{y:.4g}<extra></extra>" }],
      layout: { xaxis: { title: "step" }, yaxis: { title: label, ...extra }, hovermode: "x" },
    };
  }

  // A logarithmic axis with round numbers, where values differ much.
  function logarithmic(values) {
    const low = Math.min(...values), high = Math.max(...values);
    if (high < 3 * low) return {};
    const steps = high > 500 * low ? [1] : [1, 2, 5], tickvals = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) for (const step of steps) tickvals.push(step * 10 ** power);
    return { type: "log", tickvals, ticktext: tickvals.map((value) => number(value)) };
  }

  function skillNow(run) {
    const all = run.tasks.skill.filter((v) => v !== null), floor = -1;
    const below = all.filter((v) => v < floor).length, useless = all.filter((v) => v <= 0).length;
    if (!all.length) return figure("skill-now", "Skill of the tasks", "No task could be scored.", null);
    const words = `Skill of ${all.length.toLocaleString("en")} tasks on the ${run.part} part: median ${fixed(quantile(all, 0.5))}, a quarter below ${fixed(quantile(all, 0.25))}, a quarter above ${fixed(quantile(all, 0.75))}; ${useless} no better than a constant (0 or less)${below ? `, ${below} below -1, shown at -1` : ""}.`;
    figure("skill-now", "Skill of the tasks", words, () => ({
      traces: [{ type: "histogram", x: all.map((v) => Math.max(floor, v)), nbinsx: Math.min(40, Math.ceil(Math.sqrt(all.length))), marker: { color: color("accent"), line: { color: color("panel"), width: 1 } }, hovertemplate: "skill %{x}<br>%{y} tasks<extra></extra>" }],
      layout: { xaxis: { title: "skill" }, yaxis: { title: "tasks" }, bargap: 0.02, shapes: [{ type: "line", x0: quantile(all, 0.5), x1: quantile(all, 0.5), yref: "paper", y0: 0, y1: 1, line: { color: color("ink"), width: 1.5, dash: "dot" } }] },
    }));
  }

  function skillCourse(run) {
    const h = run.history, title = "Skill while training";
    if (!h?.skill) return figure("skill-course", title, "Nothing was evaluated while training.", null);
    const last = h.step.length - 1;
    const words = `On the valid part, over tasks: the median went from ${fixed(h.skill.p50[0])} at step ${number(h.step[0])} to ${fixed(h.skill.p50[last])} at step ${number(h.step[last])}, the lowest tenth from ${fixed(h.skill.p10[0])} to ${fixed(h.skill.p10[last])}. Bands hold the middle half and the middle 80 % of the tasks.`;
    const low = Math.max(-1, Math.min(0, ...h.skill.p10.filter((v) => v !== null)));
    figure("skill-course", title, words, () => fan(h.skill, h.step, "skill", { range: [low - 0.03, Math.min(1.03, Math.max(...h.skill.p90) + 0.08)] }));
  }

  function skillSize(run) {
    const t = run.tasks, kinds = [...new Set(t.kind)], title = "Skill against size";
    const at = t.task.map((_, i) => i).filter((i) => t.skill[i] !== null && t.train[i] > 0);
    if (!at.length) return figure("skill-size", title, "No task could be scored.", null);
    const sizes = at.map((i) => t.train[i]), middle = quantile(sizes, 0.5);
    const medianOf = (keep) => quantile(at.filter(keep).map((i) => t.skill[i]), 0.5);
    const larger = medianOf((i) => t.train[i] > middle), smaller = medianOf((i) => t.train[i] <= middle);
    const words = `Each dot is a task.${larger === null ? "" : ` Median skill of tasks with up to ${number(Math.round(middle))} training labels: ${fixed(smaller)}; of larger ones: ${fixed(larger)}.`}`;
    const names = ["accent", "kind-2", "kind-3", "kind-4", "kind-5"], symbols = ["circle", "diamond", "square", "triangle-up", "cross"];
    figure("skill-size", title, words, () => ({
      traces: kinds.map((kind, k) => {
        const own = at.filter((i) => t.kind[i] === kind);
        return { type: "scatter", mode: "markers", name: kind, x: own.map((i) => t.train[i]), y: own.map((i) => Math.max(-1, t.skill[i])), text: own.map((i) => escaped(t.task[i])),
          marker: { color: color(names[k % names.length]), symbol: symbols[k % symbols.length], size: 6, opacity: 0.65 }, hovertemplate: "%{text}<br>%{x} training labels<br>skill %{y:.3f}<extra></extra>" };
      }),
      layout: { xaxis: { title: "training labels", ...logarithmic(sizes) }, yaxis: { title: "skill" }, showlegend: kinds.length > 1, legend: { orientation: "h", y: 1.12, yanchor: "bottom" }, margin: { l: 50, r: 12, t: 12, b: 42 } },
    }));
  }

  function weights(run) {
    const h = run.history, title = "Balancing weights";
    $("weights").hidden = !h?.weight_varies;
    if (!h?.weight_varies) return figures.delete("weights");
    const last = h.step.length - 1;
    const words = `Over tasks at each evaluation: the middle 80 % lay between ${number(h.weight.p10[0], 3)} and ${number(h.weight.p90[0], 3)} at step ${number(h.step[0])}, between ${number(h.weight.p10[last], 3)} and ${number(h.weight.p90[last], 3)} at step ${number(h.step[last])}. Bands hold the middle half and the middle 80 % of the tasks.`;
    figure("weights", title, words, () => fan(h.weight, h.step, "weight", Math.min(...h.weight.p10) > 0 && Math.max(...h.weight.p90) > 20 * Math.min(...h.weight.p10) ? logarithmic([...h.weight.p10, ...h.weight.p90]) : { rangemode: "tozero" }));
  }

  function courses(run) {
    const c = run.curve, last = c.step.length - 1;
    if (last < 0) {
      figure("loss", "Training loss", "Nothing was recorded.", null);
      return figure("speed", "Speed", "Nothing was recorded.", null);
    }
    figure("loss", "Training loss", `The objective went from ${number(c.loss[0])} at step ${number(c.step[0])} to ${number(c.loss[last])} at step ${number(c.step[last])}.${c.refit ? ` From step ${number(c.refit)} on (dotted line) the model was trained again, also on the valid part.` : ""}`, () => {
      const { traces, layout } = line(c.step, c.loss, "objective");
      const shapes = c.refit ? [{ type: "line", x0: c.refit, x1: c.refit, yref: "paper", y0: 0, y1: 1, line: { color: color("muted"), width: 1.5, dash: "dot" } }] : [];
      return { traces, layout: { ...layout, shapes } };
    });
    const rows = quantile(c.rows_per_second, 0.5), wait = quantile(c.data_wait, 0.5);
    figure("speed", "Speed", `Rows a second while training: half of the time above ${number(Math.round(rows))}; waiting for data took ${percent(wait)} of a typical step.`, () => line(c.step, c.rows_per_second, "rows a second", { rangemode: "tozero" }));
  }

  function affinity(run) {
    const a = run.affinity;
    $("affinity").hidden = !a;
    if (!a) return figures.delete("affinity");
    const bytes = Uint8Array.from(atob(a.cells), (letter) => letter.charCodeAt(0)), levels = new Int8Array(bytes.buffer);
    const sizes = new Map();
    for (const group of a.group) sizes.set(group, (sizes.get(group) ?? 0) + 1);
    const largest = [...sizes.values()].sort((x, y) => y - x).slice(0, 5).join(", ");
    const words = `Mean cosine of the gradients of two tasks: above 0 a step for one helps the other. ${a.tasks.length.toLocaleString("en")} tasks in the order of ${sizes.size} groups (largest: ${largest} tasks); ${percent(a.negative)} of the pairs are below 0.${a.each > 1 ? ` Each cell is the mean over ${a.each} x ${a.each} tasks.` : ""}`;
    const starts = a.group.map((group, i) => (i && group !== a.group[i - 1] ? i / a.each - 0.5 : null)).filter((at) => at !== null);
    const label = (i) => { const own = a.tasks.slice(i * a.each, (i + 1) * a.each); return escaped(own.length > 1 ? `${own[0]} to ${own.at(-1)}` : own[0]); };
    figure("affinity", "Affinity of tasks", words, () => {
      const labels = Array.from({ length: a.side }, (_, i) => label(i));
      const z = Array.from({ length: a.side }, (_, i) => Array.from(levels.subarray(i * a.side, (i + 1) * a.side), (level) => (level === -128 ? null : level / 127)));
      const far = Math.max(0.1, quantile(z.flatMap((row, i) => row.filter((v, j) => i !== j && v !== null).map(Math.abs)), 0.98) ?? 1);
      const boundary = (at) => [{ x0: at, x1: at, y0: -0.5, y1: a.side - 0.5 }, { x0: -0.5, x1: a.side - 0.5, y0: at, y1: at }];
      const lines = starts.flatMap(boundary).map((ends) => ({ type: "line", ...ends, line: { color: color("muted"), width: 0.7 } }));
      const names = a.side <= 60 ? { tickvals: labels.map((_, i) => i), ticktext: labels.map((text) => (text.length > 16 ? `${text.slice(0, 15)}…` : text)), tickfont: { size: 9 } } : { showticklabels: false };
      const text = (i, j) => `${labels[i]}<br>${labels[j]}`;
      return {
        traces: [{ type: "heatmap", z, zmin: -far, zmax: far, colorscale: [[0, color("hot")], [0.5, color("middle")], [1, color("cold")]], colorbar: { thickness: 12, outlinewidth: 0, title: { text: "cosine" } },
          text: a.side <= 150 ? z.map((row, i) => row.map((_, j) => text(i, j))) : undefined, hovertemplate: `${a.side <= 150 ? "%{text}" : "%{x}, %{y}"}<br>%{z:.3f}<extra></extra>` }],
        layout: { xaxis: { ...names, showgrid: false, zeroline: false, constrain: "domain" }, yaxis: { ...names, autorange: "reversed", showgrid: false, zeroline: false, scaleanchor: "x", constrain: "domain" }, shapes: lines },
      };
    }, true);
  }

  function differences(found, run, first) {
    const t = found.tasks;
    const order = t.task.map((_, i) => i).filter((i) => t.difference[i] !== null).sort((a, b) => t.difference[a] - t.difference[b]);
    const title = `Difference in ${found.metric} of each task`;
    if (!order.length) return figure("differences", title, "No task was scored in both runs.", null);
    const bounds = order.flatMap((i) => [t.low[i], t.high[i]]), shown = order.map((i) => t.difference[i]);
    const low = Math.min(quantile(bounds, 0.03) ?? 0, quantile(shown, 0.01)), high = Math.max(quantile(bounds, 0.97) ?? 0, quantile(shown, 0.99)), room = 0.06 * (high - low);
    const outside = shown.filter((v) => v < low - room || v > high + room).length;
    const words = `Tasks from the lowest to the highest difference, ${run.name} less ${first.name}, with intervals; ${found.higher ? "above" : "below"} 0 ${run.name} is better.${outside ? ` ${outside} tasks with larger differences lie outside.` : ""}`;
    figure("differences", title, words, () => {
      const marks = (clear, name, symbol, size) => {
        const at = order.map((i, rank) => [i, rank]).filter(([i]) => found.clear[i] === clear);
        return { type: "scatter", mode: "markers", name: clear ? "clear" : "not clear", x: at.map(([, rank]) => rank + 1), y: at.map(([i]) => t.difference[i]), text: at.map(([i]) => escaped(t.task[i])), marker: { color: color(name), symbol, size },
          customdata: at.map(([i]) => between(t.low[i], t.high[i])), hovertemplate: "%{text}<br>%{y:.4f} (%{customdata})<extra></extra>" };
      };
      const x = order.map((_, rank) => rank + 1);
      const bound = (name) => order.map((i) => t[name][i]);
      return {
        traces: [
          { x, y: bound("low"), mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false },
          { x, y: bound("high"), mode: "lines", line: { width: 0 }, fill: "tonexty", fillcolor: color("accent-soft"), hoverinfo: "skip", showlegend: false },
          marks(false, "accent", "circle", 4), marks(true, "kind-2", "diamond", 8),
        ],
        layout: { xaxis: { title: "tasks by difference" }, yaxis: { title: "difference", zerolinecolor: color("ink"), ...(high > low ? { range: [low - room, high + room] } : {}) }, showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom" } },
      };
    });
  }

  // ------------------------------------------------------------------------------------------------------- page

  function pairs(place, items) {
    place.replaceChildren(...items.map(([label, value, note]) => {
      const shown = [node("dd", { class: "value" }, value)];
      if (note) shown.push(node("dd", { class: "note" }, note));
      return node("div", {}, node("dt", {}, label), ...shown);
    }));
  }

  function showRun(index) {
    const run = data.runs[index];
    $("about").textContent = `Run ${run.name} (${run.path})${run.splits > 1 ? `, means over ${run.splits} splits` : ""}. Scores are of the ${run.part} part; ranges hold 95 % of what they become when its rows are drawn anew.`;
    pairs($("cards"), run.headline.map((item) => [item.label, item.value, item.note]));
    for (const [id, notes] of [["notes", [...run.warnings, ...run.notes]], ["data-notes", run.data_notes]]) $(id).replaceChildren(...notes.map((text) => node("li", {}, text)));
    $("tasks-about").textContent = `Skill is 1 - deviance / deviance of the best constant: 0 is as good as a constant, 1 is perfect.${run.splits > 1 ? ` Means over ${run.splits} splits.` : ""}`;
    $("facts").replaceChildren(...run.facts.map(([label, value]) => node("div", {}, node("dt", {}, label), node("dd", {}, value))));
    taskTable(run);
    for (const show of [skillNow, skillCourse, skillSize, weights, courses, affinity]) show(run);
    drawWhenIdle();
  }

  function showComparison(index) {
    const found = data.comparisons[index], run = data.runs[found.second], first = data.runs[0];
    $("sentence").textContent = `${run.name} against ${first.name}: ${found.sentence}.`;
    compareTable(found, run, first);
    differences(found, run, first);
    drawWhenIdle();
  }

  function choice(id, labels, show) {
    $(id).replaceChildren(...labels.map((label, i) => node("option", { value: i }, label)));
    $(id).addEventListener("change", () => show(Number($(id).value)));
    show(0);
  }

  $("footer").textContent = `Written by mtrain ${data.version}.`;
  choice("run", data.runs.map((run) => run.name), showRun);
  if (data.runs.length > 1) {
    for (const id of ["run-choice", "compare", "to-compare"]) $(id).hidden = false;
    runsTable();
    choice("second", data.comparisons.map((found) => `${data.runs[found.second].name} against ${data.runs[0].name}`), showComparison);
    $("second-choice").hidden = data.comparisons.length < 2;
  }
  addEventListener("load", () => setTimeout(() => { // plotly takes a second to read: tables come first
    loadPlotly();
    drawWhenIdle();
  }, 50));
})();
