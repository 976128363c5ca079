"use strict";
/* What is picked: loss, group, steps, light or dark, and the rows of the layers. */
(() => {
  const page = JSON.parse(document.getElementById("data").textContent), root = document.documentElement;
  const PAPER = 640; // pixels that fit between the margins of a sheet
  const find = (id) => document.getElementById(id);
  const state = { panel: "0", group: "", from: null, to: null, choices: {}, moving: false, moved: null };

  /* Light or dark: the reader's system decides until the button does; paper is light. */
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  function theme(paper) {
    const dark = !paper && (chosen ?? (system.matches ? "dark" : "light")) === "dark";
    root.dataset.theme = dark ? "dark" : "light";
    find("theme").setAttribute("aria-pressed", String(dark));
    if (!paper) lcaFigures.paint();
    lcaMicroscope.paint();
  }
  find("theme").addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    theme(false);
  });
  system.addEventListener("change", () => root.dataset.paper || theme(false));
  addEventListener("beforeprint", () => {
    // What bokeh draws comes later than the sheet; by night its figures are turned into those of the day instead.
    root.dataset.paper = root.dataset.theme;
    theme(true);
    // Figures keep the size they were drawn in; on paper they are shrunk to its width.
    for (const element of document.querySelectorAll(".chart, .stage")) element.style.setProperty("--zoom", Math.min(1, PAPER / (element.clientWidth || PAPER)));
  });
  addEventListener("afterprint", () => { delete root.dataset.paper; theme(false); });

  function panel(key) {
    state.panel = key;
    find("panel").value = key;
    const groups = page.panels[key].groups, pick = find("group");
    if (!groups.some(([group]) => group === state.group)) state.group = "";
    pick.replaceChildren(...groups.map(([group, label]) => new Option(label, group, false, group === state.group)));
    pick.parentElement.hidden = !groups.length;
    const hides = (panels) => !panels.split(" ").some((one) => one === key || one === "*");
    for (const element of document.querySelectorAll(".of[data-panel]")) element.hidden = hides(element.dataset.panel);
    for (const element of document.querySelectorAll("[data-panels]")) element.hidden = hides(element.dataset.panels);
    const [low, high] = page.panels[key].steps;
    for (const id of ["from", "to"]) Object.assign(find(id), { min: low, max: high });
    steps();
    refresh();
  }

  function refresh() {
    live();
    lcaFigures.show();
    lcaFigures.rest();
  }

  /* The table of layers says what the chosen group's are. */
  const minus = (text) => text.replace(/^-/, "−");
  function number(value) {
    if (value === null || Number.isNaN(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value), decimals = Math.max(0, 3 - Math.floor(Math.log10(size)));
    const text = size >= 1e-3 && size < 1e4 ? value.toFixed(decimals) : value.toExponential(3).replace("e+", "e");
    return (value > 0 ? "+" : "") + minus(text);
  }
  function shown(value, kind) {
    if (typeof value === "string") return value;
    if (kind === "share" && value !== null) return `${(100 * value).toFixed(1)} %`;
    return kind === "plain" ? number(value).replace("+", "") : number(value);
  }
  function live() {
    for (const table of document.querySelectorAll(`table[data-live][data-panel="${state.panel}"]`)) {
      const columns = page.views[`@${table.dataset.live}`]?.[state.panel]?.[`${state.group}|`];
      if (!columns) continue;
      const extent = (keys) => Math.max(...keys.flatMap((key) => columns[key].map(Math.abs))) || 1;
      const barred = Object.keys(columns).filter((key) => table.querySelector(`td[data-column="${key}"] i`));
      for (const key in columns) {
        const widest = extent("shared" in table.dataset ? barred : [key]);
        table.querySelectorAll(`td[data-column="${key}"]`).forEach((cell, at) => {
          const value = columns[key][at], bar = cell.querySelector("i");
          if (bar) {
            cell.querySelector(".number").textContent = number(value);
            bar.className = value > 0 ? "hurting" : "helping";
            bar.style.setProperty("--w", `${(100 * Math.abs(value)) / widest}%`);
          } else cell.textContent = shown(value, cell.className);
        });
      }
    }
  }

  function steps() {
    const [low, high] = page.panels[state.panel].steps;
    find("from").value = Math.round(Math.max(low, state.from ?? low));
    find("to").value = Math.round(Math.min(high, state.to ?? high));
    lcaFigures.follow();
  }
  function typed() {
    const [low, high] = page.panels[state.panel].steps;
    const from = Number(find("from").value), to = Number(find("to").value);
    if (!(to > from)) return steps();
    [state.from, state.to] = from <= low && to >= high ? [null, null] : [from, to];
    return steps();
  }
  let frame = 0;
  state.moved = (start, end) => {
    [state.from, state.to] = [start, end];
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(steps);
  };

  find("panel").addEventListener("change", (event) => panel(event.target.value));
  find("group").addEventListener("change", (event) => { state.group = event.target.value; refresh(); });
  for (const id of ["from", "to"]) find(id).addEventListener("change", typed);
  find("all").addEventListener("click", () => { state.from = state.to = null; steps(); });
  find("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const button of document.querySelectorAll("[data-show]")) button.addEventListener("click", () => panel(button.dataset.show));
  for (const pick of document.querySelectorAll("select[data-section]")) pick.addEventListener("change", () => {
    state.choices[`${pick.dataset.section}|${pick.dataset.panel.split(" ")[0]}`] = pick.value;
    lcaFigures.show();
  });
  for (const table of document.querySelectorAll("table[data-live]")) table.addEventListener("change", () => lcaFigures.fill(table.dataset.live));

  /* The contents say where the reader is. */
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const spy = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) {
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-15% 0px -75% 0px" });
  document.querySelectorAll("main > section").forEach((section) => spy.observe(section));
  if (matchMedia("(max-width: 70rem)").matches) document.querySelector("nav details").open = false;

  lcaFigures.open(page, state);
  lcaMicroscope.begin(JSON.parse(document.getElementById("frames").textContent));
  theme(false);
  const drawn = untilDrawn(), begun = lcaFigures.begin();
  panel("0");
  root.dataset.shown = String(Math.round(performance.now()));
  begun.then(() => { root.dataset.ready = String(Math.round(performance.now())); }).finally(drawn);

  /* Who prints or photographs a page waits until it is loaded. An open document inside keeps it loading until the figures are drawn. */
  function untilDrawn() {
    const inside = document.createElement("iframe");
    inside.hidden = true;
    document.body.append(inside);
    inside.contentDocument.open();
    return () => requestAnimationFrame(() => setTimeout(() => { inside.contentDocument.close(); inside.remove(); }));
  }
})();
