"use strict";
// The list of images of dataset_report.html. State lives in the address: #bucket=1024x768&reason=long&text=cat&page=2&image=17
const D = JSON.parse(document.getElementById("data").textContent), PAGE = 60, KEYS = ["text", "reason", "bucket", "set"];
const $ = id => document.getElementById(id), number = n => n.toLocaleString("en");
const COUNT = D.name.length, KINDS = Object.keys(D.kinds);
const has = (i, kind) => D.found[i] >> KINDS.indexOf(kind) & 1;
const bucket = i => D.bucket[i] < 0 ? null : D.buckets[D.bucket[i]];
const side = pair => pair ? pair[0] + " × " + pair[1] : "";
const spelt = pair => pair ? pair[0] + "x" + pair[1] : "";
const growth = i => Math.max(D.resized[i][0] / D.size[i][0], D.resized[i][1] / D.size[i][1]);
const lost = i => 1 - bucket(i)[0] * bucket(i)[1] / (D.resized[i][0] * D.resized[i][1]);
const RANK = { enlarged: i => -growth(i), cropped: i => -lost(i), duplicate: i => D.twin[i], near: i => D.near[i] };
const hay = new Array(COUNT);
const words = i => hay[i] ??= [D.name[i], D.prompt[i], ...(D.captions[i] || []), D.reason[i]].join("\n").toLowerCase();
let state = {}, shown = [];

function make(tag, attributes = {}, ...inside) {
  const svg = ["svg", "image", "path", "rect"].includes(tag);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...inside);
  return element;
}

// The resized image in its own pixels, mirrored as the first visit mirrors it, and the cuts.
function picture(i) {
  const [width, height] = D.resized[i] || D.size[i] || [4, 3], cuts = D.cuts[i];
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": D.name[i] });
  const flip = cuts.length && cuts[0][2];
  if (D.thumb[i]) svg.append(make("image", { href: "data:image/webp;base64," + D.thumb[i], width, height, preserveAspectRatio: "none",
    ...(flip ? { transform: `translate(${width} 0) scale(-1 1)` } : {}) }));
  else if (D.size[i]) svg.append(make("rect", { class: "blank", width, height }));
  if (!cuts.length) return svg;
  const [w, h] = bucket(i), box = ([x, y, f]) => ({ x: f === flip ? x : width - x - w, y, width: w, height: h });
  const first = box(cuts[0]);
  if (w < width || h < height) svg.append(make("path", { class: "away", "fill-rule": "evenodd",
    d: `M0 0H${width}V${height}H0ZM${first.x} ${first.y}h${w}v${h}h${-w}Z` }));
  for (const cut of cuts.slice(1)) svg.append(make("rect", { class: "other", ...box(cut) }));
  svg.append(make("rect", { class: "halo", ...first }), make("rect", { class: "cut", ...first }));
  return svg;
}

function tags(i) {
  const bad = ["dropped", "long", "empty", "uncaptioned"];
  return make("span", { class: "tags" }, ...KINDS.filter(kind => has(i, kind)).map(kind =>
    make("span", { class: bad.includes(kind) ? "tag bad" : "tag" }, D.kinds[kind][0])));
}

function caption(i, name) {
  if (has(i, "dropped")) return make("span", { class: name + " none" }, D.reason[i]);
  return D.prompt[i] ? make("span", { class: name, dir: "auto" }, D.prompt[i]) : make("span", { class: name + " none" }, "the empty prompt");
}

function card(i) {
  const sizes = bucket(i) ? `${side(D.size[i])} → ${side(bucket(i))}` : side(D.size[i]);
  const button = make("button", { class: "card item", "data-row": i }, picture(i), make("span", { class: "words" },
    make("span", { class: "name", dir: "auto", title: D.name[i] }, D.name[i]), make("span", { class: "small" }, sizes),
    caption(i, "caption"), tags(i)));
  button.onclick = () => go({ image: i });
  return button;
}

function twins(i, column) {
  const same = D[column].flatMap((first, j) => first === D[column][i] && j !== i ? [j] : []);
  if (!same.length) return "an image that is not listed here";
  return make("ul", {}, ...same.slice(0, 20).map(j => {
    const button = make("button", { class: "plain" }, D.name[j]);
    button.onclick = () => go({ image: j });
    return make("li", {}, button);
  }), ...(same.length > 20 ? [make("li", {}, `and ${number(same.length - 20)} more`)] : []));
}

function facts(i) {
  const rows = [], add = (name, ...value) => rows.push(make("dt", {}, name), make("dd", { dir: "auto" }, ...value));
  if (D.sets.length > 1) add("Data set", D.sets[D.set[i]]);
  if (D.size[i]) add("Size", side(D.size[i]));
  if (bucket(i)) {
    add("Resized to", `${side(D.resized[i])}${has(i, "enlarged") ? `, enlarged ${growth(i).toFixed(2)} times` : ""}`);
    add("Bucket", `${side(bucket(i))}; ${(100 * lost(i)).toFixed(1)}% of the resized image is cut off`);
    add("Cut", D.cuts[i].map(([x, y, f]) => `left ${x}, top ${y}${f ? ", mirrored" : ""}`).join("\n"));
  }
  if (has(i, "dropped")) add("Left out", D.reason[i]);
  else add("Prompt", caption(i, "full"));
  if (D.captions[i]) add(D.captions[i].length === 1 ? "Caption as written" : "Captions as written", D.captions[i].join("\n") || "none");
  if (D.long[i]) add("Too long", `${D.long[i][0]} tokens; the text encoders do not read what is struck through:\n`, D.long[i][1], make("del", {}, D.long[i][2]));
  if (has(i, "duplicate")) add("Same file as", twins(i, "twin"));
  if (has(i, "near")) add("Looks like", twins(i, "near"));
  return rows;
}

function filter() {
  const { reason, bucket: wanted, set } = state, text = (state.text || "").toLowerCase();
  const found = [];
  for (let i = 0; i < COUNT; i++)
    if ((!reason || has(i, reason)) && (!wanted || spelt(bucket(i)) === wanted) && (!set || D.sets[D.set[i]] === set)
        && (!text || words(i).includes(text))) found.push(i);
  const rank = RANK[reason];
  return rank ? found.sort((a, b) => rank(a) - rank(b) || a - b) : found;
}

function render() {
  state = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  shown = filter();
  const pages = Math.max(1, Math.ceil(shown.length / PAGE)), page = Math.min(pages, Math.max(1, parseInt(state.page) || 1));
  for (const key of KEYS) if ($(key).value !== (state[key] || "")) $(key).value = state[key] || "";
  $("count").textContent = `${number(shown.length)} of ${number(COUNT)} images`;
  $("clear").disabled = !KEYS.some(key => state[key]);
  $("grid").replaceChildren(...shown.slice((page - 1) * PAGE, page * PAGE).map(card));
  $("page").textContent = `Page ${number(page)} of ${number(pages)}`;
  for (const [id, to, dead] of [["before", page - 1, page === 1], ["after", page + 1, page === pages]]) {
    $(id).disabled = dead;
    $(id).onclick = () => { go({ page: to }); $("images").scrollIntoView(); };
  }
  const i = parseInt(state.image), at = shown.indexOf(i);
  if (!(i >= 0 && i < COUNT)) return $("view").close();
  $("view-name").textContent = D.name[i];
  $("view-picture").replaceChildren(picture(i));
  $("view-facts").replaceChildren(...facts(i));
  for (const [id, to] of [["view-before", shown[at - 1]], ["view-after", at < 0 ? undefined : shown[at + 1]]]) {
    $(id).disabled = to === undefined;
    $(id).onclick = () => to === undefined || go({ image: to });
  }
  if (!$("view").open) $("view").showModal();
}

// Change a part of the address. A changed filter goes back to the first page.
function go(changes) {
  const next = { ...state, ...(KEYS.some(key => key in changes) ? { page: "" } : {}), ...changes };
  const query = new URLSearchParams(Object.entries(next).filter(([, value]) => value !== "" && value !== undefined));
  history.replaceState(null, "", "#" + query);
  render();
}

const count = test => { let n = 0; for (let i = 0; i < COUNT; i++) n += test(i) ? 1 : 0; return number(n); };
const option = (value, label) => make("option", { value }, label);
const tally = new Map();
for (let i = 0; i < COUNT; i++) tally.set(spelt(bucket(i)), (tally.get(spelt(bucket(i))) || 0) + 1);
const shapes = [...new Map(D.buckets.map(pair => [spelt(pair), pair])).values()].sort((a, b) => a[0] / a[1] - b[0] / b[1] || a[0] - b[0]);
$("reason").append(option("", "all"), ...KINDS.filter(kind => D.found.some((_, i) => has(i, kind))).map(kind =>
  option(kind, `${D.kinds[kind][0]} (${count(i => has(i, kind))})`)));
$("bucket").append(option("", "all"), ...shapes.filter(pair => tally.get(spelt(pair))).map(pair =>
  option(spelt(pair), `${side(pair)} (${number(tally.get(spelt(pair)))})`)));
$("set").append(option("", "all"), ...D.sets.map((name, s) => option(name, `${name} (${count(i => D.set[i] === s)})`)));
$("of-set").hidden = D.sets.length < 2;
if (D.sets.length < 2) $("of-set").style.display = "none";
let waiting;
$("text").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => go({ text: $("text").value }), 120); });
for (const key of KEYS.slice(1)) $(key).addEventListener("change", () => go({ [key]: $(key).value }));
$("filters").addEventListener("submit", event => event.preventDefault());
$("clear").onclick = () => go({ text: "", reason: "", bucket: "", set: "" });
$("view-close").onclick = () => $("view").close();
$("view").addEventListener("close", () => {
  if (!state.image) return;
  const row = state.image;
  go({ image: "" });
  $("grid").querySelector(`[data-row="${parseInt(row)}"]`)?.focus();
});
document.addEventListener("keydown", event => {
  if ($("view").open) {
    const step = { ArrowLeft: "view-before", ArrowRight: "view-after" }[event.key];
    if (step) $(step).click();
  } else if (event.key === "/" && document.activeElement !== $("text")) {
    event.preventDefault();
    $("text").focus();
  }
});
addEventListener("hashchange", () => { render(); if (!$("view").open) $("images").scrollIntoView(); });
render();
