// The list of problems and their rationales. Everything a model wrote is set with textContent, never parsed as HTML.
"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const byId = (id) => document.getElementById(id);

  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined && text !== null) element.textContent = String(text);
    return element;
  }

  function append(parent, ...children) {
    children.forEach((child) => child && parent.appendChild(child));
    return parent;
  }

  const percent = (share) => (share === null ? "–" : `${Math.round(100 * share)} %`);
  const fixed = (value, digits) => (value === null ? "–" : value.toFixed(digits).replace("-", "−"));

  function meter(share, className) {
    const bar = make("span", `meter ${className || ""}`);
    const fill = make("i");
    fill.style.width = `${100 * (share || 0)}%`;
    bar.setAttribute("aria-hidden", "true");
    return append(bar, fill);
  }

  // ------------------------------------------------------------------------------------------ downloads

  function download(id) {
    const url = URL.createObjectURL(new Blob([byId(id).textContent], { type: "application/json" }));
    const link = make("a");
    link.href = url;
    link.download = `${id}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  }
  document.querySelectorAll("button[data-download]").forEach((button) => {
    button.addEventListener("click", () => download(button.dataset.download));
  });

  // ----------------------------------------------------------------------------------------------- items

  if (!byId("items-data")) return;
  const { items, systems, tasks, has } = read("items-data");
  const list = byId("items");
  const KINDS = {
    right: ["✓ right", "right"],
    not_chosen: ["✗ not chosen", "wrong"],
    never_sampled: ["∅ never sampled", "never"],
  };

  function pair(label, text) {
    const box = make("span", "pair clip");
    return append(box, make("span", "", label), document.createTextNode(text === null ? "–" : text));
  }

  function summaryOf(item) {
    const [label, kind] = KINDS[item.kind];
    const sure = append(make("span", "sure small"), meter(item.confidence, kind), document.createTextNode(percent(item.confidence)));
    const ask = append(make("span", "ask clip"), document.createTextNode(item.question.replace(/\s+/g, " ")));
    return append(
      make("summary"), make("span", `badge ${kind}`, label), ask, pair("chosen", item.chosen), pair("reference", item.reference), sure,
    );
  }

  function words(rationale) {
    const box = make("div", "words");
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `text of rationale ${rationale.rank}`);
    box.dir = "auto";
    rationale.parts.forEach(([text, level, answer, p]) => {
      if (!level && !answer) return void box.appendChild(document.createTextNode(text));
      const piece = make(answer ? "mark" : "span", level ? `p${level}` : "", text);
      if (level) piece.title = `probability ${p.toPrecision(2)}`;
      box.appendChild(piece);
    });
    if (rationale.cut) append(box, make("span", "soft", ` … ${rationale.cut} more characters are in the JSONL file`));
    return box;
  }

  const COLUMNS = [
    ["#", "rank", 0, ""], ["posterior", "posterior", 3, ""], ["answer", "answer", null, ""], ["verdict", "correct", null, ""],
    ["log p(z)", "logp_trace", 1, "optional"], ["log p(y|z)", "logp_answer", 2, "optional"], ["tokens", "tokens", 0, ""],
    ["reward", "reward", 2, ""], ["member", "member", 0, ""],
  ].filter(([, key]) => has[key] !== false);

  function cell(rationale, [, key, digits, extra]) {
    const value = rationale[key];
    if (key === "answer") return append(make("td", "answer"), document.createTextNode(value === null ? "(unreadable)" : value));
    if (key === "correct") {
      return make("td", `badge ${value ? "right" : "wrong"}`, value ? "✓ right" : rationale.finish === "length" ? "✗ cut off" : "✗ wrong");
    }
    const box = make("td", `num ${extra}`);
    if (key === "posterior") append(box, meter(value, ""));
    return append(box, document.createTextNode(fixed(value, digits)));
  }

  function rationaleTable(item) {
    const table = make("table", "rationales");
    const head = make("tr");
    const bodies = item.rationales.map((rationale) => {
      const line = make("tr");
      COLUMNS.forEach((column) => line.appendChild(cell(rationale, column)));
      line.appendChild(make("td", "fill"));
      const text = append(make("td"), words(rationale));
      text.colSpan = COLUMNS.length + 1;
      return { rationale, body: append(make("tbody"), line, append(make("tr"), text)) };
    });
    COLUMNS.forEach(([label, key, digits, extra]) => {
      const th = make("th", `${digits === null ? "" : "num"} ${extra}`);
      th.scope = "col";
      const button = make("button", "", label);
      button.addEventListener("click", () => {
        const up = th.getAttribute("aria-sort") === "descending" || (key === "rank" && th.getAttribute("aria-sort") !== "ascending");
        head.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
        th.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rank = (v) => (v === null ? -Infinity : typeof v === "boolean" ? Number(v) : v);
        const order = (a, b) => {
          const [x, y] = [rank(a.rationale[key]), rank(b.rationale[key])];
          const c = typeof x === "string" || typeof y === "string" ? String(x).localeCompare(String(y)) : x < y ? -1 : x > y ? 1 : 0;
          return up ? c : -c;
        };
        [...bodies].sort(order).forEach(({ body }) => table.appendChild(body));
      });
      head.appendChild(append(th, button));
    });
    head.appendChild(make("td", "fill"));
    append(table, append(make("thead"), head), ...bodies.map(({ body }) => body));
    return append(make("div", "scroll"), table);
  }

  function heatMap(item) {
    if (!item.members) return null;
    const table = make("table", "heat");
    append(table, append(make("caption", "small soft", "share of each member's samples that gave each answer")));
    const head = append(make("tr"), make("th", "", "member"), ...item.members.answers.map((a) => make("th", "", a)));
    append(table, append(make("thead"), head));
    const body = make("tbody");
    item.members.rows.forEach(([member, shares]) => {
      const row = append(make("tr"), make("th", "", member));
      shares.forEach((share) => {
        const box = make("td", "", share ? percent(share) : "");
        box.style.setProperty("--share", `${60 * share}%`);
        row.appendChild(box);
      });
      body.appendChild(row);
    });
    return append(make("div", "scroll"), append(table, body));
  }

  function bodyOf(item) {
    const box = make("div", "body");
    const facts = [item.id];
    if (systems.length > 1) facts.push(systems[item.system]);
    if (item.cut) facts.push(`${item.cut} of its rationales are only in the JSONL file`);
    append(box, make("p", "small soft", facts.join(" · ")));
    const question = make("p", "question", item.question);
    question.dir = "auto";
    append(box, question, heatMap(item), rationaleTable(item));
    return box;
  }

  const entries = items.map((item, index) => {
    const details = append(make("details", "item"), summaryOf(item));
    details.dataset.kind = item.kind;
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) details.appendChild(bodyOf(item));
    });
    const answers = item.rationales.map((r) => r.parts.map((p) => p[0]).join("") + " " + (r.answer || "")).join(" ");
    const haystack = `${item.id} ${item.question} ${item.reference} ${answers}`.toLowerCase();
    return { item, index, details, haystack };
  });

  // --------------------------------------------------------------------------------- filters and sorting

  const state = { filter: "all", text: "", sort: "listed", sure: 0.5, system: "", task: "" };
  const confidentlyWrong = (item) => item.kind !== "right" && item.confidence !== null && item.confidence >= state.sure;
  const FILTERS = {
    all: () => true,
    wrong_confident: confidentlyWrong,
    not_chosen: (item) => item.kind === "not_chosen",
    never_sampled: (item) => item.kind === "never_sampled",
  };
  const SORTS = {
    listed: (a, b) => a.index - b.index,
    sure_down: (a, b) => (b.item.confidence ?? -1) - (a.item.confidence ?? -1) || a.index - b.index,
    sure_up: (a, b) => (a.item.confidence ?? -1) - (b.item.confidence ?? -1) || a.index - b.index,
    name: (a, b) => a.item.id.localeCompare(b.item.id, undefined, { numeric: true }) || a.index - b.index,
  };

  function inScope({ item, haystack }) {
    return (state.system === "" || item.system === Number(state.system)) && (state.task === "" || item.task === Number(state.task))
      && (!state.text || haystack.includes(state.text));
  }

  function update() {
    const scope = entries.filter(inScope);
    document.querySelectorAll("button[data-filter]").forEach((button) => {
      const count = scope.filter(({ item }) => FILTERS[button.dataset.filter](item)).length;
      button.setAttribute("aria-pressed", String(button.dataset.filter === state.filter));
      button.querySelector("span").textContent = count;
    });
    const shown = scope.filter(({ item }) => FILTERS[state.filter](item)).sort(SORTS[state.sort]);
    list.replaceChildren(...shown.map(({ details }) => details));
    byId("shown").textContent = shown.length
      ? `${shown.length} of ${entries.length} problems shown` : "No problem fits: choose another filter or clear the search.";
  }

  document.querySelectorAll("button[data-filter]").forEach((button) => {
    button.addEventListener("click", () => { state.filter = button.dataset.filter; update(); });
  });
  const bind = (id, key, event, convert) => {
    const control = byId(id);
    if (control) control.addEventListener(event, () => { state[key] = convert(control.value); update(); });
  };
  const same = (value) => value;
  bind("search", "text", "input", (value) => value.trim().toLowerCase());
  bind("sort", "sort", "change", same);
  bind("sure", "sure", "input", (value) => (value === "" ? 0 : Number(value) / 100));
  bind("pick-system", "system", "change", same);
  bind("pick-task", "task", "change", same);
  byId("open-all").addEventListener("click", (event) => {
    const open = event.currentTarget.getAttribute("aria-pressed") !== "true";
    event.currentTarget.setAttribute("aria-pressed", String(open));
    list.querySelectorAll("details.item").forEach((details) => { details.open = open; });
  });
  update();
  document.documentElement.dataset.ready = "true";
})();
