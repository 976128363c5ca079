"use strict";
/* Bokeh figures: filled in when they come near, painted in the page's colours, zoomed together over steps. */
const lcaFigures = (() => {
  const TYPES = { f: Float32Array, d: Float64Array, b: Int8Array };
  const made = new Map(); // figure -> its document, figure model and x range
  let page, state, observer, busy = Promise.resolve();

  const tones = () => page.colours[document.documentElement.dataset.theme === "dark" ? "dark" : "light"];
  const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const colour = (text) => (typeof text === "string" && text.startsWith("@") ? ink(text.slice(1)) : text);
  // Bokeh reads these marks as mathematics, for which it would fetch another script; a name means none.
  const verbatim = (text) => String(text).replace(/\$\$/g, "$\u200b$").replace(/\\([[(])/g, "\\\u200b$1");

  function bytes(text) {
    const raw = atob(text), found = new Uint8Array(raw.length);
    for (let at = 0; at < raw.length; at++) found[at] = raw.charCodeAt(at);
    return found.buffer;
  }

  function decode(column) {
    if (Array.isArray(column) || column === null || typeof column !== "object") return column;
    if ("same" in column) {
      const value = decode(column.v);
      return Array.from({ length: column.same }, () => colour(value));
    }
    if ("of" in column) return column.at.map((at) => colour(column.of[at]));
    if ("join" in column) return column.join.flatMap(decode);
    if ("n" in column) {
      const values = decode(column.v);
      let at = 0;
      return column.n.map((length) => values.subarray(at, (at += length)));
    }
    for (const kind in TYPES) if (kind in column) return new TYPES[kind](bytes(column[kind]));
    return [];
  }

  const matrix = (column) => Float32Array.from(new Int8Array(bytes(column.b)), (level) => Math.sign(level) * (level / 127) ** 2 * column.peak);

  /* The colours from helping to hurting, as [r, g, b], between the given ones. */
  function ramp(size = 255) {
    const stops = tones().diverging.map((text) => text.slice(1).match(/../g).map((each) => parseInt(each, 16)));
    return Array.from({ length: size }, (_, at) => {
      const place = (at / (size - 1)) * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2);
      return stops[low].map((value, channel) => Math.round(value + (stops[low + 1][channel] - value) * (place - low)));
    });
  }

  const hex = (rgb) => `#${rgb.map((each) => each.toString(16).padStart(2, "0")).join("")}`;

  function paint(document_) {
    const text = ink("muted"), line = ink("line"), tags = { ink: ink("ink"), muted: ink("muted"), accent: ink("accent"), helping: ink("helping"), hurting: ink("hurting") };
    for (const model of document_._all_models.values()) {
      const type = model.type;
      if (type.endsWith("Axis")) model.setv({ axis_label_text_color: text, major_label_text_color: text, axis_line_color: line, major_tick_line_color: line });
      else if (type === "Grid") { if (model.grid_line_color !== null) model.setv({ grid_line_color: ink("grid") }); }
      else if (type === "LinearColorMapper") model.setv({ palette: ramp().map(hex) });
      for (const tag of model.tags ?? []) {
        if (!(tag in tags)) continue;
        if ("line_color" in model.properties && type !== "Quad") model.line_color = type === "Span" ? tags[tag] : { value: tags[tag] };
        if (type === "Quad") model.fill_color = { value: tags[tag] };
      }
    }
  }

  /* Labels of ticks, all to the same number of digits and without trailing zeros. */
  const labels = (share) => (found, opts) => {
    if (!found.length || (opts?.axis?.type ?? "").startsWith("Log")) return found.map(String);
    const largest = Math.max(...found.map(Math.abs)) || 1, gap = found.length > 1 ? Math.abs(found[1] - found[0]) : largest;
    const digits = Math.max(0, Math.ceil(Math.log10(largest / gap) + 0.3)), scale = share ? 100 : 1;
    const text = (value) => {
      if (value === 0 || Math.abs(value) < gap * 1e-6) return share ? "0 %" : "0";
      if (!share && (largest < 1e-3 || largest >= 1e7)) return value.toExponential(digits).replace(/\.?0*e\+?/, "e");
      return Number((value * scale).toPrecision(digits + 2)).toLocaleString("en", { maximumFractionDigits: 12 }) + (share ? " %" : "");
    };
    return found.map((value) => text(value).replace(/^-/, "−"));
  };

  function view(name) {
    // A string names the panel whose section is shown, see `_views`.
    const of = page.views[name] ?? {}, own = typeof of[state.panel] === "string" ? of[state.panel] : of[state.panel] ? state.panel : "*";
    const here = of[own];
    if (!here) return null;
    const element = document.querySelector(`figure[data-figure="${name}"]`);
    const choice = state.choices[`${element.dataset.section}|${own}`] ?? "0";
    for (const key of [`${state.group}|${choice}`, `|${choice}`, `${state.group}|`, "|"]) if (here[key]) return here[key];
    return null;
  }

  function fill(name) {
    const figure = made.get(name), data = view(name);
    if (!figure || !data) return;
    for (const source in data) {
      if (source.startsWith("@")) continue;
      const model = figure.document.get_model_by_name(source), columns = {};
      for (const column in data[source]) columns[column] = column === "image" ? [image(model, data[source].image)] : data[source][column] === "@palette" ? "@palette" : decode(data[source][column]);
      if (columns.colour === "@palette") paletted(name, columns);
      model.data = columns;
      if (columns.image) range(figure.document.get_model_by_name(`${source} colours`), data[source].image.scale);
    }
    for (const [axis, [start, end]] of Object.entries(data["@range"] ?? {})) figure.model[`${axis}_range`].setv({ start, end, reset_start: start, reset_end: end });
    for (const [level, at] of Object.entries(data["@level"] ?? {})) figure.document.get_model_by_name(level).location = at;
    if (data["@legend"]) legend(name, data["@legend"].map(([tone, text]) => [ink(tone), text]));
    if (data["@ticks"]) ticks(figure, data["@ticks"].y);
  }

  function image(model, column) {
    const [sample] = model.data.image;
    return new sample.constructor(matrix(column), column.shape);
  }

  const range = (mapper, peak) => mapper.setv({ low: -peak, high: peak });

  /* Of many lines only the ticked ones are drawn; each ticked one gets a colour, and its row shows it. */
  function paletted(name, columns) {
    const table = document.querySelector(`table[data-live="${name}"][data-panel="${state.panel}"]`);
    const boxes = table ? [...table.querySelectorAll("input[data-row]")] : [];
    const shown = columns.name.map((_, at) => at).filter((at) => !boxes.length || boxes[at]?.checked);
    const tints = tones().layers;
    // Lines of one kind, such as repeats, share a colour; so many that colours come again are told apart by pointing at them.
    columns.colour = shown.map((at, place) => tints[(columns.kind ? columns.kind[at] : place) % tints.length]);
    boxes.forEach((box, at) => {
      const swatch = box.nextElementSibling, place = shown.indexOf(at);
      swatch.hidden = place < 0;
      if (place >= 0) swatch.style.background = tints[place % tints.length];
    });
    for (const column of ["xs", "ys", "name"]) columns[column] = shown.map((at) => columns[column][at]);
    named(name, columns);
    for (const column of ["kind", "@kinds"]) delete columns[column];
  }

  /* A legend of the lines that are drawn. */
  function named(name, columns) {
    const kinds = columns["@kinds"], tints = tones().layers;
    legend(name, (kinds ?? columns.name).map((text, at) => [kinds ? tints[at % tints.length] : columns.colour[at], text]));
  }

  function legend(name, rows) {
    const entries = rows.map(([tint, text]) => {
      const entry = document.createElement("li"), sign = document.createElement("i");
      sign.style.background = tint;
      entry.append(sign, text);
      return entry;
    });
    document.getElementById(`n-${name}`).replaceChildren(...entries);
  }

  function ticks(figure, names) {
    const axis = figure.model.left?.[0] ?? figure.model.yaxis?.[0];
    axis.ticker.ticks = names.map((_, at) => at);
    axis.major_label_overrides = new Map(names.map((name, at) => [at, verbatim(name)]));
    figure.model.height = Math.max(180, 90 + 16 * names.length);
    figure.model.y_range.setv({ start: names.length - 0.5, end: -0.5 });
  }

  async function embed(name) {
    const element = document.getElementById(`f-${name}`);
    if (made.has(name) || !element || !element.offsetParent || !view(name)) return;
    made.set(name, null);
    await Bokeh.embed.embed_item(page.figures[name], `f-${name}`);
    const document_ = Bokeh.documents[Bokeh.documents.length - 1], model = document_.roots()[0];
    const figure = { document: document_, model, steps: model.tags.includes("steps") };
    made.set(name, figure);
    if (matchMedia("(pointer: fine)").matches) {
      const zoom = model.toolbar.tools.find((tool) => tool.type === "BoxZoomTool");
      if (zoom) zoom.setv({ active: true, dimensions: figure.steps ? "width" : "both" });
    }
    for (const axis of [...model.below, ...model.left]) axis.formatter.doFormat = labels(model.tags.includes("percent") && model.left.includes(axis));
    paint(document_);
    if (figure.steps) {
      follow(figure);
      figure.model.x_range.change.connect(() => { if (!state.moving) state.moved(figure.model.x_range.start, figure.model.x_range.end); });
    }
    fill(name);
  }

  function follow(figure) {
    const [low, high] = page.panels[state.panel].steps, edge = (high - low) * 0.01;
    const start = state.from === null ? low - edge : state.from, end = state.to === null ? high + edge : state.to;
    state.moving = true;
    figure.model.x_range.setv({ start, end, reset_start: low - edge, reset_end: high + edge });
    state.moving = false;
  }

  const each = (what) => { for (const [name, figure] of made) if (figure) what(name, figure); };

  function show() { // which figures this panel has
    for (const element of document.querySelectorAll("figure[data-figure]")) element.hidden = !view(element.dataset.figure);
    each((name) => fill(name));
  }

  const queue = (name) => (busy = busy.then(() => embed(name)).catch((error) => console.error(name, error)));

  /* Near ones first, then the others at once, so that printing and photographs find them there. */
  async function begin() {
    show();
    observer = new IntersectionObserver((entries) => {
      for (const entry of entries) if (entry.isIntersecting) queue(entry.target.dataset.figure);
    }, { rootMargin: "300px" });
    document.querySelectorAll("figure[data-figure]").forEach((element) => observer.observe(element));
    await rest();
  }

  async function rest() {
    for (const name in page.figures) {
      await new Promise((go) => setTimeout(go)); // clicks and keys come between
      await queue(name);
    }
  }

  return {
    open: (page_, state_) => { page = page_; state = state_; },
    begin, show, rest, fill, ramp, bytes, ink,
    paint: () => each((name, figure) => { paint(figure.document); fill(name); }),
    follow: () => each((_, figure) => figure.steps && follow(figure)),
    one: (name) => made.get(name),
  };
})();
