"use strict";
// Asks the board every two seconds what has changed and shows it. Whatever comes is text: nothing here makes markup of it.
const EVERY = 2000, MOST_ANSWERS = 50;
const of = id => document.getElementById(id);
const shown = { id: null, seen: "", logSeen: "", report: null };
let timer = 0, asking = false, again = false;

function token() {
  const found = location.hash.slice(1);
  if (/^[0-9a-f]{64}$/.test(found)) {
    sessionStorage.setItem("sft-token", found);
    history.replaceState(null, "", location.pathname); // it stays out of bookmarks and of what is copied
  }
  return sessionStorage.getItem("sft-token") || "";
}

async function ask(path, method = "GET") {
  const answer = await fetch(path, { method, headers: { Authorization: "Bearer " + token() }, cache: "no-store" });
  const value = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(value.error), { status: answer.status });
  return value;
}

function make(tag, text, ...children) {
  const element = document.createElement(tag);
  if (text !== null && text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// --- words ------------------------------------------------------------------------------------------------

const number = value => value.toLocaleString("en", { maximumFractionDigits: 0 });
const gib = bytes => (bytes / 2 ** 30).toFixed(1) + " GiB";

function duration(seconds) {
  const whole = Math.floor(seconds), two = value => String(value).padStart(2, "0");
  return Math.floor(whole / 3600) + ":" + two(Math.floor(whole % 3600 / 60)) + ":" + two(whole % 60);
}

function steps(run) {
  if (run.step === undefined) return "";
  const total = run.total_steps === null ? "" : " of " + number(run.total_steps);
  return "step " + number(run.step) + total;
}

const WORDS = { unread: "not read yet", unreadable: "cannot be read" };

const WHY = {
  died: "run.json says that it is running, and no process writes to its folder: it was killed, or its machine went down. " +
    "The same command with --resume_from_checkpoint auto goes on with it.",
  interrupted: "A signal ended it. The same command with --resume_from_checkpoint auto goes on with it.",
};

// --- the list ---------------------------------------------------------------------------------------------

const links = new Map();

function showRuns(said) {
  say(of("place"), said.folder);
  const { used, total } = said.machine;
  of("memory").value = total ? used / total : 0;
  say(of("memory-said"), gib(used) + " of " + gib(total) + " used");
  of("no-runs").hidden = said.runs.length > 0;
  of("no-run").textContent = said.runs.length > 0 ? "Choose a run." : "";
  if (shown.id === null && said.runs.length) choose(said.runs[0].id);
  const list = of("runs"), present = new Set(said.runs.map(run => run.id));
  for (const [id, link] of links) {
    if (!present.has(id)) { link.parentElement.remove(); links.delete(id); }
  }
  said.runs.forEach((run, place) => {
    let link = links.get(run.id);
    if (link === undefined) {
      link = make("a", null, make("span"), make("span"), make("span"));
      link.href = "#run=" + encodeURIComponent(run.id);
      link.children[1].className = "more";
      link.children[2].className = "more";
      links.set(run.id, link);
      list.append(make("li", null, link));
    }
    if (list.children[place] !== link.parentElement) list.insertBefore(link.parentElement, list.children[place]);
    const loss = run.loss === null || run.loss === undefined ? "" : "loss " + run.loss.toFixed(4);
    const left = run.left === null || run.left === undefined ? "" : duration(run.left) + " left";
    say(link.children[0], run.id === "." ? run.name || run.id : run.id);
    say(link.children[1], WORDS[run.status] || run.status);
    link.children[1].classList.remove(...[...link.children[1].classList].filter(one => one !== "more"));
    link.children[1].classList.add("status", run.status);
    say(link.children[2], [steps(run), loss, left].filter(text => text).join(" · "));
    if (run.id === shown.id) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  });
}

// --- one run ----------------------------------------------------------------------------------------------

function choose(id) {
  if (shown.id === id) return;
  Object.assign(shown, { id, seen: "", logSeen: "", report: null });
  say(of("said"), "");
  of("charts").replaceChildren();
  of("log").textContent = "";
}

function showRun(run) {
  of("no-run").hidden = true;
  of("run").hidden = false;
  shown.seen = run.seen;
  shown.logSeen = run.log_seen || "";
  if (run.report) shown.report = run.report;
  const report = shown.report;
  say(of("name"), run.id === "." && report ? report.name : run.id);
  const status = run.status;
  const state = of("state");
  say(state, WORDS[status] || status);
  state.className = "status " + status;
  const why = run.fault || (report && status === "failed" && report.error) || early(report) || WHY[status] || "";
  say(of("why"), why);
  of("why").hidden = !why;
  showOrders(run, status);
  of("known").hidden = !report; // what stands there is another run's
  if (!report) return;
  const whole = report.total_steps || report.step || 1;
  of("progress").max = whole;
  of("progress").value = Math.min(whole, report.step);
  say(of("steps"), steps(report));
  showFacts(run, report, status);
  if (run.report) {
    showCurves(run.id, report);
    showAnswers(report.answers);
    showSettings(report);
  }
  if (run.log) showLog(run.log);
}

const ofAll = total => total === null ? "" : " of " + number(total);

function early(report) {
  const ended = report && report.result.stopped_early;
  return ended ? "It ended early, after step " + ended.step + ": " + ended.reason : "";
}

function showFacts(run, report, status) {
  const last = (chart, name) => {
    const curve = report.curves.find(one => one.chart === chart && one.name === name);
    return curve ? curve.values[curve.values.length - 1] : null;
  };
  const dev = last("loss", "dev"), speed = last("tokens_per_second", "train");
  const best = last("memory_mib", "train");
  const facts = [
    ["Time left", run.left === null || run.left === undefined ? "" : duration(run.left)],
    ["Time so far", report.seconds ? duration(report.seconds) : ""],
    ["Loss", run.loss === null || run.loss === undefined ? "" : run.loss.toFixed(4)],
    ["Dev loss", dev === null ? "" : dev.toFixed(4)],
    ["Speed", speed === null ? "" : number(speed) + " tokens/s"],
    ["Memory of the run now", run.memory === null || run.memory === undefined ? "" : gib(run.memory)],
    ["Memory at most", best === null ? "" : gib(best * 2 ** 20)],
    ["Trained", report.trained === null ? "" : number(report.trained) + ofAll(report.total) + " parameters"],
    ["Checkpoints", report.checkpoints.length ? report.checkpoints.join(", ") : ""],
    ["Steps that changed nothing", report.skipped_steps ? number(report.skipped_steps) : ""],
    ["Began", (report.started || "").slice(0, 19).replace("T", " ")],
    ["Written by", run.holder || ""],
  ].filter(fact => fact[1]);
  refill(of("facts"), facts, ([what, value]) => make("div", null, make("dt", what), make("dd", value)));
}

// Anew only where something has changed, so that what is selected stays.
const filled = new WeakMap();

function refill(element, rows, draw) {
  const key = JSON.stringify(rows);
  if (filled.get(element) === key) return;
  filled.set(element, key);
  element.replaceChildren(...rows.map(draw));
}

// Each run has charts of its own, which keep their zoom and what is switched off in them.
const charts = new Map();

function showCurves(id, report) {
  if (!charts.has(id)) {
    const place = make("div");
    charts.set(id, { place, drawn: sftCharts(place) });
  }
  const { place, drawn } = charts.get(id);
  if (place.parentElement === null) of("charts").replaceChildren(place);
  drawn.show([{ name: report.name, moments: report.moments, curves: report.curves }]);
}

function showAnswers(answers) {
  of("answers-part").hidden = answers.length === 0;
  const more = answers.length - MOST_ANSWERS;
  say(of("more-answers"), "and " + number(more) + " more, which sft report shows");
  of("more-answers").hidden = more <= 0;
  refill(of("answers"), answers.slice(0, MOST_ANSWERS), one => {
    const rows = [["Asked", one.prompt], ...one.given.map(given => [when(given), given.text]), ["Reference", one.reference]];
    const list = make("dl", null, ...rows.map(([what, text]) => make("div", null, make("dt", what), make("dd", text))));
    const article = make("div", null, list);
    article.className = "answer";
    return article;
  });
}

function when(given) {
  if (given.when === "before") return "Before training";
  if (given.when === "after") return "After training";
  return "After step " + given.step;
}

function showSettings(report) {
  const row = ([name, ...values]) => make("tr", null, head(name), ...values.map(value => make("td", written(value))));
  const changed = Object.entries(report.changed).map(([name, usual]) => [name, report.settings[name], "default " + written(usual)]);
  refill(of("settings"), changed, row);
  const machine = Object.entries(report.machine);
  refill(of("versions"), [...Object.entries(report.plugins), ...Object.entries(report.packages), ...machine], row);
}

function head(text) {
  const cell = make("th", text);
  cell.scope = "row";
  return cell;
}

const written = value => typeof value === "string" ? value : JSON.stringify(value);

function showLog(lines) {
  const log = of("log"), atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 20;
  log.textContent = lines.join("\n");
  if (atEnd) log.scrollTop = log.scrollHeight;
}

// --- what a run is asked ----------------------------------------------------------------------------------

const ASKED = {
  stop: "It is asked to stop: it ends after the step that is under way, with its result.",
  save: "It is asked to save: a checkpoint is written after the step that is under way.",
  evaluate: "It is asked to evaluate: the dev data is measured after the step that is under way.",
};

function showOrders(run, status) {
  const goes = status === "running", asked = run.asked || [];
  of("orders").hidden = !goes;
  for (const button of document.querySelectorAll("[data-what]")) button.disabled = asked.includes(button.dataset.what);
  const text = asked.map(what => ASKED[what]).join(" ");
  if (text || of("said").dataset.asked) say(of("said"), text);
  of("said").dataset.asked = text;
}

async function order(what) {
  try {
    await ask("api/ask?run=" + encodeURIComponent(shown.id) + "&what=" + what, "POST");
    look();
  } catch (error) {
    of("said").dataset.asked = "";
    say(of("said"), error.message);
  }
}

for (const button of document.querySelectorAll("[data-what]")) {
  button.addEventListener("click", () => {
    if (button.dataset.what !== "stop") { order(button.dataset.what); return; }
    say(of("sure-asks"), "Stop " + of("name").textContent + "? It ends after the step that is under way, writes and " +
      "measures its result, and does not go on by itself.");
    of("sure").showModal();
  });
}
of("sure-yes").addEventListener("click", () => { of("sure").close(); order("stop"); });
of("sure-no").addEventListener("click", () => of("sure").close());

// --- following --------------------------------------------------------------------------------------------

let lastAnswer = null;

function trouble(error) {
  const since = lastAnswer ? " What you see is of " + lastAnswer.toLocaleTimeString() + "." : "";
  const text = error.status ? error.message : "The board does not answer." + since;
  say(of("trouble"), text);
  of("trouble").hidden = false;
}

async function look() {
  if (asking) { again = true; return; }
  asking = true;
  clearTimeout(timer);
  try {
    do {
      again = false;
      showRuns(await ask("api/runs"));
      if (shown.id !== null) {
        const id = shown.id, { seen, logSeen } = shown;
        const run = await ask("api/run?run=" + encodeURIComponent(id) + "&seen=" + seen + "&log_seen=" + logSeen);
        if (id === shown.id) showRun(run);
        else again = true;
      }
    } while (again);
    lastAnswer = new Date();
    of("trouble").hidden = true;
  } catch (error) {
    trouble(error);
  }
  asking = false;
  if (!document.hidden) timer = setTimeout(look, EVERY);
}

function chosen() {
  token();
  const found = location.hash.match(/^#run=(.*)$/);
  if (found) choose(decodeURIComponent(found[1]));
  look();
}

addEventListener("hashchange", chosen);
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
chosen();
