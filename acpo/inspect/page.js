"use strict";
// Everything from a rollout goes through textContent and visible(): nothing here parses HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const state = { group: 0, shade: "credit", order: data.order, figures: false };
const measures = new Map(data.measures.map(([name, label, short, signed, help, unit]) => [name, { name, label, short, signed, help, unit }]));
const ORDERS = { surprise: "surprise", outcome: "outcome, wrong first", length: "length, longest first", sampled: "as sampled" };
const THEMES = ["auto", "light", "dark"];

/** Characters that would hide or reorder what stands in a rollout, as signs: controls, bidirectional overrides, invisible ones. As shown.visible. */
function visible(text) {
  return text.replace(
    /[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]/gu,
    (c) => "\u27e8U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "\u27e9");
}

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function number(value, signed) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const digits = size.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : 2);
  const sign = Number(digits) === 0 ? "" : value < 0 ? "−" : signed ? "+" : "";
  return sign + digits;
}

const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const group = () => data.groups[state.group];
const value = (rollout, k, name = state.shade) => rollout.steps[name] ? rollout.steps[name][k] : null;

/** Share of the full shade, 0 to 1. */
function much(x, name = state.shade) {
  return x === null || !data.scale[name] ? 0 : Math.min(1, Math.abs(x) / data.scale[name]);
}

const tone = (x, name = state.shade) => (!measures.get(name).signed ? "size" : x < 0 ? "against" : "for");

// --- order ----------------------------------------------------------------------------------------------------------------------

function sorted(items, keys) {
  const key = keys[state.order];
  return [...items].sort((a, b) => key(a) - key(b) || a.number - b.number);
}

const most = (rollouts, key) => rollouts.reduce((m, r) => Math.max(m, r[key]), 0);
const ifNone = (x) => (x === null ? Infinity : x);
// The first of equal keys is the one sampled first; Infinity - Infinity is NaN, which || takes for equal.
const rolloutKeys = { surprise: (r) => -r.surprise, outcome: (r) => ifNone(r.outcome), length: (r) => -r.tokens, sampled: (r) => r.number };
const groupKeys = {
  surprise: (g) => -most(g.rollouts, "surprise"), outcome: (g) => ifNone(g.rate), length: (g) => -most(g.rollouts, "tokens"), sampled: (g) => g.number,
};

function sort() {
  const current = group();
  data.groups = sorted(data.groups, groupKeys);
  for (const g of data.groups) g.rollouts = sorted(g.rollouts, rolloutKeys);
  state.group = Math.max(0, data.groups.indexOf(current));
}

// --- pieces ---------------------------------------------------------------------------------------------------------------------

function mark(rollout) {
  const side = rollout.outcome === null ? "" : rollout.outcome > 0.5 ? "right" : rollout.outcome < 0.5 ? "wrong" : "";
  return make("span", { class: side }, { right: "✓", wrong: "✗" }[side] || "○");
}

/** A rollout's steps as bars: width tokens, height the shade's measure, up for and down against. */
function strip(rollout) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const total = Math.max(1, rollout.tokens);
  const signed = measures.get(state.shade).signed;
  svg.setAttribute("class", "strip");
  svg.setAttribute("viewBox", `0 ${signed ? -1 : -1.02} ${total} ${signed ? 2 : 1.04}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const paths = { for: "", against: "", size: "" };
  let at = 0;
  rollout.counts.forEach((count, k) => {
    const x = value(rollout, k);
    const height = much(x) * (x < 0 && signed ? 1 : -1);
    const gap = Math.min(0.15 * count, 0.004 * total);
    if (height) paths[tone(x)] += `M${at} 0H${at + count - gap}V${height.toFixed(3)}H${at}z`;
    at += count;
  });
  const axis = document.createElementNS(space, "line");
  for (const [name, number] of [["x1", 0], ["x2", total], ["y1", 0], ["y2", 0]]) axis.setAttribute(name, number);
  svg.append(axis);
  for (const [name, d] of Object.entries(paths)) {
    if (!d) continue;
    const path = document.createElementNS(space, "path");
    path.setAttribute("d", d);
    path.setAttribute("class", name);
    svg.append(path);
  }
  return svg;
}

/** The shade's value of a step as a bar from a middle line: to the right for, to the left against. */
function gauge(x) {
  const signed = measures.get(state.shade).signed;
  const length = much(x) * (signed ? 50 : 100);
  const bar = make("i", { class: signed ? "gauge signed" : "gauge" });
  bar.style.setProperty("--from", `${signed ? (x < 0 ? 50 - length : 50) : 0}%`);
  bar.style.setProperty("--to", `${signed ? (x < 0 ? 50 : 50 + length) : length}%`);
  return bar;
}

function figures(rollout, k, long) {
  const list = make("dl");
  if (long && rollout.advantage !== null) list.append(make("div", { title: "of the rollout within its group" }, make("dt", {}, "advantage"), make("dd", {}, number(rollout.advantage, true))));
  for (const m of measures.values()) {
    if (!rollout.steps[m.name] || (!long && m.name === state.shade)) continue;
    const shown = make("dd", {}, number(value(rollout, k, m.name), m.signed));
    if (long && m.unit) shown.append(make("small", {}, ` ${m.unit}`));
    list.append(make("div", { title: m.help }, make("dt", {}, long ? m.label : m.short), shown));
  }
  return list;
}

function stepText(rollout, k) {
  return visible(rollout.text.slice(k ? rollout.ends[k - 1] : 0, rollout.ends[k]).replace(/\n+$/, ""));
}

function stepLabel(rollout, k) {
  const m = measures.get(state.shade);
  const last = k === rollout.counts.length - 1;
  const kind = rollout.answered && last ? "answer" : `step ${k + 1} of ${rollout.counts.length}`;
  return `${kind}, ${m.label} ${number(value(rollout, k), m.signed)}, ends with ${data.rules[rollout.rules[k]][1]}`;
}

function step(rollout, k) {
  const x = value(rollout, k);
  const [sign, why] = data.rules[rollout.rules[k]];
  const last = k === rollout.counts.length - 1;
  const text = make("div", { class: "text", dir: "auto" }, stepText(rollout, k));
  const gutter = make("div", { class: "gutter", "aria-hidden": "true" }, make("small", { title: `ends with ${why}` }, `${k + 1} ${sign}`),
    make("b", {}, number(x, measures.get(state.shade).signed)), gauge(x));
  const item = make("li", { class: tone(x), tabindex: "-1", "aria-describedby": "detail", "data-k": k, "aria-label": stepLabel(rollout, k) + ": " + text.textContent }, gutter, text);
  item.style.setProperty("--much", much(x).toFixed(3));
  if (rollout.answered && last) item.classList.add("answer");
  if (state.figures) item.append(figures(rollout, k, false));
  return item;
}

// --- columns: a rollout's steps are drawn when its column comes near, a few a frame -------------------------------------------------

const BUDGET = 6; // milliseconds of a frame
const SHORT = 10; // steps of a rollout, and forty times so many characters
let waiting = [];
const near = new IntersectionObserver((entries) => {
  const come = entries.filter((e) => e.isIntersecting).map((e) => e.target);
  if (!come.length) return;
  if (!waiting.length) requestAnimationFrame(fillSome);
  waiting.push(...come);
  for (const section of come) near.unobserve(section);
}, { root: $("columns"), rootMargin: "0px 1200px 0px 1200px" });

function fillSome() {
  const until = performance.now() + BUDGET;
  while (waiting.length && performance.now() < until) if (!fillOne(waiting[0])) waiting.shift();
  if (waiting.length) requestAnimationFrame(fillSome);
}

/** Draws the next step of a column; false where there is none. */
function fillOne(section) {
  const list = section.querySelector("ol");
  const k = list.childElementCount;
  if (k === section.rollout.counts.length) return false;
  const item = step(section.rollout, k);
  if (k === 0 && !section.previousElementSibling && !$("columns").querySelector("li[tabindex='0']")) item.tabIndex = 0; // where Tab comes in
  list.append(item);
  return true;
}

function fill(section) {
  while (fillOne(section));
}

/** The source of its attribution and how far that is trusted; nothing where none spoke. */
function told(rollout) {
  if (!rollout.source) return "";
  return rollout.reliability === null ? rollout.source : `${rollout.source} ${number(rollout.reliability)}`;
}

function column(rollout) {
  const judged = [];
  if (rollout.advantage !== null) judged.push(`A ${number(rollout.advantage, true)}`);
  judged.push(`surprise ${number(rollout.surprise)}`);
  const facts = [plural(rollout.tokens, "token"), plural(rollout.counts.length, "step")];
  if (told(rollout)) facts.push(told(rollout));
  if (!rollout.finished) facts.push("cut off");
  const given = rollout.given === null ? "" : `read ${visible(rollout.given)}`;
  const sign = mark(rollout);
  sign.append(` ${rollout.verdict}`);
  const head = make("header", {}, make("h2", {}, rollout.twin ? make("span", { title: `the same text as #${rollout.twin}` }, `#${rollout.number} = #${rollout.twin}`) : `#${rollout.number}`, sign, make("span", { class: "given", title: given }, given)),
    make("p", {}, judged.join(" · ")), make("p", {}, facts.join(" · ")), strip(rollout));
  const section = make("section", { class: "rollout", "data-number": rollout.number, "aria-label": `rollout ${rollout.number}, ${rollout.verdict}, ${[...judged, ...facts].join(", ")}` }, head);
  section.append(rollout.counts.length ? make("ol") : make("p", { class: "empty" }, "an empty response"));
  section.rollout = rollout;
  if (rollout.counts.length) {
    section.style.setProperty("--tall", `${100 + 24 * rollout.counts.length + rollout.text.length / 2}px`);
  }
  return section;
}

function drawColumns() {
  near.disconnect();
  waiting = [];
  let longest = 0; // short lines need no wide columns: more rollouts stand side by side
  for (const r of group().rollouts) for (const line of r.text.split("\n")) longest = Math.max(longest, line.length);
  $("columns").style.setProperty("--wide", `${Math.min(380, Math.max(232, 130 + 7.5 * longest))}px`);
  // Short rollouts stand in rows that fit the window, long ones in one row, beside each other from the first step to the last.
  $("columns").classList.toggle("short", group().rollouts.every((r) => r.counts.length <= SHORT && r.text.length <= 40 * SHORT));
  const sections = group().rollouts.map(column); // new ones: to move what was drawn would lay all of it out again
  $("columns").replaceChildren(...sections);
  for (const section of sections) if (section.rollout.counts.length) near.observe(section);
  $("columns").scrollTo(0, 0);
}

function drawQuestion() {
  const g = group();
  const rate = g.rate === null ? "–" : `${Math.round(100 * g.rate)} % of ${g.rollouts.filter((r) => r.outcome !== null).length}`;
  const facts = make("dl", {}, make("dt", {}, "answer"), make("dd", {}, visible(g.answer) || "–"), make("dt", {}, "right"), make("dd", {}, rate));
  $("question").replaceChildren(make("pre", { tabindex: "0", dir: "auto" }, visible(g.prompt)), facts);
}

function drawLegend() {
  const m = measures.get(state.shade);
  const most = data.scale[m.name];
  const ramp = make("span", { class: m.signed ? "ramp" : "ramp size" }, m.signed ? number(-most, true) : "0", make("i"), `${number(most, m.signed)} ${m.unit}`.trim());
  const sense = m.signed ? ", ← against · for →" : "";
  $("legend").replaceChildren(ramp, make("span", {}, `${m.label}: ${m.help}${sense}`), make("span", { class: "more", title: data.surprise }, "surprise: credit per token that pulls against the verdict"),
    ...data.notes.map((n) => make("span", {}, visible(n))));
}

/** A rollout in the list of its problem. */
function line(rollout) {
  const go = () => focusStep(group().rollouts.indexOf(rollout), 0);
  return make("li", {}, make("button", { type: "button", "aria-label": `rollout ${rollout.number}, ${rollout.verdict}`, onclick: go },
    make("span", {}, mark(rollout), ` #${rollout.number}`), strip(rollout)));
}

function drawGroups() {
  const items = data.groups.map((g, i) => {
    const right = g.rollouts.filter((r) => r.outcome > 0.5).length;
    const bar = make("i");
    bar.style.setProperty("width", `${100 * (g.rate || 0)}%`);
    const button = make("button", { type: "button", "aria-current": i === state.group, title: visible(g.problem), onclick: () => show(i) },
      make("span", { class: "name" }, visible(g.problem)), make("span", { class: "side" }, `${right}/${g.rollouts.length}`),
      make("span", { class: "rate" }, bar), make("span", { class: "side" }, `surprise ${number(most(g.rollouts, "surprise"))}`));
    if (i !== state.group) return button;
    return make("div", {}, button, make("ol", {}, ...g.rollouts.map(line)));
  });
  $("groups").replaceChildren(...items);
}

function draw() {
  const inside = $("groups").contains(document.activeElement);
  if (!data.groups.length) {
    $("columns").replaceChildren(make("p", { class: "empty" }, "There is no rollout to show."));
    return;
  }
  drawGroups();
  drawQuestion();
  drawLegend();
  drawColumns();
  detail(null);
  if (inside) $("groups").querySelector("[aria-current=true]").focus();
}

function show(i) {
  state.group = Math.min(Math.max(i, 0), data.groups.length - 1);
  draw();
  const current = $("groups").querySelector("[aria-current=true]");
  current.scrollIntoView({ block: "nearest", inline: "nearest" });
}

// --- the step under the pointer or the keyboard -------------------------------------------------------------------------------------

function detail(item) {
  if (!item) {
    $("detail").replaceChildren(make("p", {}, "Point at a step, or walk with the arrow keys: its figures stand here. ", make("kbd", {}, "?"), " tells all keys and what the figures are."));
    return;
  }
  const rollout = item.closest(".rollout").rollout;
  const k = Number(item.dataset.k);
  const kind = rollout.answered && k === rollout.counts.length - 1 ? "answer" : `step ${k + 1} of ${rollout.counts.length}`;
  $("detail").replaceChildren(make("p", {}, make("b", {}, `#${rollout.number} ${rollout.verdict}, ${kind}`), ` · ${plural(rollout.counts[k], "token")} · ends with ${data.rules[rollout.rules[k]][1]}${told(rollout) && ` · ${told(rollout)}`}`),
    figures(rollout, k, true));
}

function focusStep(j, k) {
  const section = $("columns").children[j];
  if (!section || !section.rollout) return;
  if (section.rollout.counts.length) fill(section);
  const items = section.querySelectorAll("li");
  if (!items.length) {
    section.scrollIntoView({ block: "nearest", inline: "nearest" });
    return;
  }
  const item = items[Math.min(Math.max(k, 0), items.length - 1)];
  for (const old of $("columns").querySelectorAll("li[tabindex='0']")) old.tabIndex = -1;
  item.tabIndex = 0;
  item.focus({ preventScroll: true });
  item.scrollIntoView({ block: "nearest", inline: "nearest" });
}

/** Where the keyboard is: [column, step], or [0, -1]. */
function place() {
  const item = document.activeElement.closest && document.activeElement.closest(".rollout li");
  return item ? [[...$("columns").children].indexOf(item.closest(".rollout")), Number(item.dataset.k)] : [0, -1];
}

const stepOf = (event) => event.target.closest && event.target.closest(".rollout li");
$("columns").addEventListener("mouseover", (event) => stepOf(event) && detail(stepOf(event)));
$("columns").addEventListener("mouseleave", () => detail(place()[1] >= 0 ? document.activeElement.closest("li") : null));
$("columns").addEventListener("focusin", (event) => stepOf(event) && detail(stepOf(event)));
$("columns").addEventListener("click", (event) => {
  const item = stepOf(event);
  if (item) focusStep([...$("columns").children].indexOf(item.closest(".rollout")), Number(item.dataset.k));
});

// --- controls -------------------------------------------------------------------------------------------------------------------

function setOrder(order) {
  state.order = $("order").value = order;
  sort();
  draw();
}

function setShade(shade) {
  state.shade = $("shade").value = shade;
  redraw();
}

/** The same place with other shades or figures. */
function redraw() {
  const [j, k] = place();
  const { scrollLeft, scrollTop } = $("columns");
  draw();
  $("columns").scrollTo(scrollLeft, scrollTop);
  if (k >= 0) focusStep(j, k);
}

function setFigures(on) {
  state.figures = on;
  $("figures").setAttribute("aria-pressed", on);
  redraw();
}

function nextTheme() {
  const now = document.documentElement.dataset.theme || "auto";
  const then = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
  if (then === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = then;
  $("theme").querySelector("b").textContent = then;
}

const next = (names, now) => names[(names.indexOf(now) + 1) % names.length];
const shades = [...measures.keys()];

const KEYS = [
  ["↓ ↑", "next, previous step (also j, k; Home and End)"], ["→ ←", "the same step of the next, previous rollout (also l, h)"],
  ["] [", "next, previous problem"], ["s", "next order"], ["c", "next shade"], ["f", "figures under every step"], ["t", "theme"], ["?", "this page"],
];

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select, dialog")) return;
  const [j, k] = place();
  const actions = {
    ArrowDown: () => focusStep(j, k + 1), j: () => focusStep(j, k + 1), ArrowUp: () => focusStep(j, k - 1), k: () => focusStep(j, k - 1),
    ArrowRight: () => focusStep(k < 0 ? 0 : j + 1, Math.max(k, 0)), ArrowLeft: () => focusStep(Math.max(j - 1, 0), Math.max(k, 0)),
    Home: () => focusStep(j, 0), End: () => focusStep(j, Infinity),
    "]": () => show(state.group + 1), "[": () => show(state.group - 1), s: () => setOrder(next(Object.keys(ORDERS), state.order)),
    c: () => setShade(next(shades, state.shade)), f: () => setFigures(!state.figures), t: nextTheme, "?": () => $("about").showModal(),
  };
  actions.l = actions.ArrowRight;
  actions.h = actions.ArrowLeft;
  const act = actions[event.key];
  if (!act || !data.groups.length) return;
  event.preventDefault();
  act();
});

function about() {
  const list = (pairs) => make("dl", {}, ...pairs.flatMap(([a, b]) => [make("dt", {}, a), make("dd", {}, b)]));
  const close = make("button", { type: "button", onclick: () => $("about").close() }, "close");
  $("about").replaceChildren(close, make("h2", { id: "about-title" }, "Keys"), list(KEYS.map(([k, what]) => [make("kbd", {}, k), what])),
    make("h2", {}, "Figures of a step"), list([...measures.values()].map((m) => [m.label, m.help])),
    make("h2", {}, "Figures of a rollout"), list(data.rollout),
    make("h2", {}, "Surprise"), make("p", {}, data.surprise), make("h2", {}, "Why a step ends"), list(Object.values(data.rules)));
}

$("title").textContent = visible(data.title);
$("summary").textContent = data.summary;
for (const name of shades) $("shade").append(make("option", { value: name }, measures.get(name).label));
for (const [name, label] of Object.entries(ORDERS)) $("order").append(make("option", { value: name }, label));
$("shade").addEventListener("change", (event) => setShade(event.target.value));
$("order").addEventListener("change", (event) => setOrder(event.target.value));
$("figures").addEventListener("click", () => setFigures(!state.figures));
$("theme").addEventListener("click", nextTheme);
$("help").addEventListener("click", () => $("about").showModal());
about();
if (!shades.includes(state.shade)) state.shade = shades[0];
$("shade").value = state.shade;
setOrder(state.order);
