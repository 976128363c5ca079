"use strict";
/* The microscope: frames of cells, one per parameter or block of parameters, laid out by layer. */
const lcaMicroscope = (() => {
  const GAP = 8, TITLE = 18, SPACE = 14, FONT = "12px system-ui, sans-serif", LEAST = 44, MOST = 100;
  const find = (id) => document.getElementById(id);
  let film = null, codes, table, colours, boxes = [], frame = 0, playing = 0, cursor = null, fresh = true, layers;

  /* --- numbers ------------------------------------------------------------------------------------------------------- */

  function halves(unit) {
    const found = new Float32Array(65536);
    for (let code = 0; code < 65536; code++) {
      const sign = code & 0x8000 ? -1 : 1, exponent = (code >> 10) & 31, fraction = code & 1023;
      found[code] = unit * sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
    }
    return found;
  }

  const levels = (peak) => Float32Array.from({ length: 256 }, (_, code) => Math.sign(code - 128) * ((code - 128) / 127) ** 2 * peak);
  const value = (tensor, row, column) => table[codes[frame * film.cells + tensor.offset + row * tensor.columns + column]];

  function number(found) {
    if (found === 0) return "0";
    const size = Math.abs(found);
    const text = size >= 1e-3 && size < 1e4 ? found.toPrecision(4) : found.toExponential(3).replace("e+", "e");
    return (found > 0 ? "+" : "") + text.replace(/^-/, "−");
  }

  /* Which indices a cell stands for: rows and columns each run over some axes of the tensor, the last one fastest. */
  function indices(tensor, row, column) {
    const found = new Array(tensor.shape.length).fill("0");
    [row, column].forEach((at, side) => {
      const axes = tensor.axes[side], extent = axes.reduce((all, axis) => all * tensor.shape[axis], 1);
      const first = at * tensor.pool[side], last = Math.min(extent, first + tensor.pool[side]) - 1;
      const [low, high] = [first, last].map((flat) => unravel(flat, axes, tensor.shape));
      let open = false; // behind the first axis that differs, a block covers more than a range says
      axes.forEach((axis, place) => {
        found[axis] = open ? `${0}–${tensor.shape[axis] - 1}` : low[place] === high[place] ? `${low[place]}` : `${low[place]}–${high[place]}`;
        open = open || low[place] !== high[place];
      });
    });
    return `${tensor.name}[${found.join(", ")}]`;
  }

  function unravel(flat, axes, shape) {
    const found = [];
    for (let place = axes.length - 1; place >= 0; place--) {
      found[place] = flat % shape[axes[place]];
      flat = Math.floor(flat / shape[axes[place]]);
    }
    return found;
  }

  /* --- picture ------------------------------------------------------------------------------------------------------- */

  /* Cells as large as fit: layers beside each other, then below; a tensor too wide for the page is drawn smaller. */
  function place(width, cell, only) {
    const found = [];
    let x = 0, y = 0, deep = 0;
    const unnamed = (at) => layers[at] && layers[at][1].every((tensor) => tensor.columns === 1) && asked(layers[at]) > LEAST;
    for (const [which, [layer, tensors]] of layers.entries()) {
      if (only !== "" && layers[Number(only)][0] !== layer) continue;
      const columns = tensors.filter((tensor) => tensor.columns === 1).length; /* biases stay beside their kernel, in its rows */
      const room = width - 2 - columns * GAP;
      const fitting = tensors.map((tensor) => Math.min(cell, room / (tensor.columns + columns)));
      const sizes = tensors.map((tensor, at) => {
        const beside = tensors.findIndex((other) => other.columns > 1 && other.rows === tensor.rows);
        return tensor.columns === 1 && beside >= 0 ? Math.min(fitting[at], fitting[beside]) : fitting[at];
      });
      let wide = 0, high = 0, line = 0, start = 0;
      const inside = tensors.map((tensor, at) => {
        const w = tensor.columns * sizes[at], h = tensor.rows * sizes[at];
        if (start && start + w > width) { line += high + GAP; start = 0; high = 0; }
        const box = { tensor, x: start, y: line, w, h, size: sizes[at] };
        start += w + GAP;
        wide = Math.max(wide, start - GAP);
        high = Math.max(high, h);
        return box;
      });
      const vectors = columns === tensors.length, spare = unnamed(which + 1) ? LEAST / 2 + SPACE : 0;
      const name = unnamed(which) ? LEAST / 2 : asked(layers[which]) - spare;
      const label = Math.min(width, Math.max(wide, name));
      if (x && x + label > width) { x = 0; y += deep + SPACE; deep = 0; }
      inside.forEach((box) => found.push({ ...box, x: box.x + x + 1, y: box.y + y + TITLE, layer, top: y, left: x, label, vectors }));
      x += label + SPACE;
      deep = Math.max(deep, TITLE + line + high);
    }
    return { found, height: Math.ceil(y + deep + 2) };
  }

  /* The room a layer's name asks for: all of it, or where it is long, that of the short one. */
  function asked([layer, tensors]) {
    const context = find("picture").getContext("2d");
    context.font = FONT;
    const width = (text) => Math.ceil(context.measureText(text).width);
    return width(layer) <= MOST ? width(layer) : Math.min(MOST, width(tensors[0].short));
  }

  function lay() {
    const canvas = find("picture"), width = canvas.parentElement.clientWidth, only = find("layer").value;
    if (!width) return;
    const names = place(width, 0.25, only).height; /* the cells of many layers need room beside that of the names */
    const most = Math.max(260, Math.min(640, innerHeight * 0.62), 1.6 * names);
    let done = null;
    for (const cell of [24, 20, 16, 14, 12, 10, 9, 8, 7, 6, 5, 4, 3, 2.5, 2, 1.5, 1, 0.75, 0.5, 0.25]) {
      done = place(width, cell, only);
      if (done.height <= most) break;
    }
    boxes = done.found;
    const sharp = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * sharp);
    canvas.height = Math.round(done.height * sharp);
    canvas.style.height = `${done.height}px`;
    for (const box of boxes) {
      box.sheet = new OffscreenCanvas(box.tensor.columns, box.tensor.rows);
      box.image = new ImageData(box.tensor.columns, box.tensor.rows);
      box.words = new Uint32Array(box.image.data.buffer);
    }
    name(canvas.getContext("2d"), width);
    draw();
  }

  /* What stands above the layers, each unlike the others. Vectors behind a kernel, such as a normalisation's, are named where the whole
     name fits; else the name of the kernel has their room. */
  function name(context, width) {
    context.font = FONT;
    const fits = (text, room) => context.measureText(text).width <= room;
    const first = boxes.filter((box, at) => !at || box.layer !== boxes[at - 1].layer);
    const named = first.filter((box, at) => !box.vectors || !at || first[at - 1].top !== box.top || fits(box.layer, box.label));
    const seen = new Set();
    named.forEach((box, at) => {
      const next = named[at + 1], room = (next && next.top === box.top ? next.left - 4 : width) - box.left;
      const text = [box.layer, box.tensor.short].find((each) => fits(each, room)) ?? cut(box.tensor.short, (each) => fits(each, room));
      box.title = seen.has(text) ? "" : text;
      seen.add(text);
    });
  }

  function cut(text, fits) {
    for (let kept = text.length - 1; kept > 1; kept--) {
      const said = `${text.slice(0, Math.ceil(kept / 2))}…${text.slice(text.length - Math.floor(kept / 2))}`;
      if (fits(said)) return said;
    }
    return "";
  }

  function draw() {
    if (!film) return;
    const canvas = find("picture"), context = canvas.getContext("2d"), sharp = window.devicePixelRatio || 1;
    context.setTransform(sharp, 0, 0, sharp, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.font = FONT;
    context.textBaseline = "top";
    for (const box of boxes) {
      const start = frame * film.cells + box.tensor.offset;
      for (let at = 0; at < box.words.length; at++) box.words[at] = shade(table[codes[start + at]]);
      box.sheet.getContext("2d").putImageData(box.image, 0, 0);
      context.imageSmoothingEnabled = box.size < 1;
      context.drawImage(box.sheet, box.x, box.y, box.w, box.h);
      context.strokeStyle = lcaFigures.ink("line");
      context.strokeRect(box.x - 0.5, box.y - 0.5, box.w + 1, box.h + 1);
      if (box.title) {
        context.fillStyle = lcaFigures.ink("muted");
        context.fillText(box.title, box.left, box.top);
      }
    }
    if (cursor) outline(context);
    words();
  }

  function outline(context) {
    const { box, row, column } = cursor, size = Math.max(box.size, 3);
    context.strokeStyle = lcaFigures.ink("ink");
    context.lineWidth = 1.5;
    context.strokeRect(box.x + (column + 0.5) * box.size - size / 2, box.y + (row + 0.5) * box.size - size / 2, size, size);
    context.lineWidth = 1;
  }

  function shade(found) {
    const part = Math.min(1, Math.abs(found) / film.scale), root = Math.sqrt(part) * 127;
    return colours[127 + Math.round(found < 0 ? -root : root)];
  }

  function paint() {
    if (!film) return;
    const list = lcaFigures.ramp();
    colours = Uint32Array.from(list, ([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0);
    const context = find("ramp").getContext("2d");
    list.forEach((rgb, at) => { context.fillStyle = `rgb(${rgb})`; context.fillRect((at * 256) / 255, 0, 2, 8); });
    find("low").textContent = `≤ ${number(-film.scale)} helped`;
    find("high").textContent = `hurt ≥ ${number(film.scale)}`;
    draw();
  }

  /* --- words --------------------------------------------------------------------------------------------------------- */

  const level = (loss) => number(loss).replace(/^\+/, "");

  function words() {
    const from = film.step[frame], to = film.step_end[frame], slider = find("frame");
    const losses = [film.loss_start[frame], film.loss_end[frame]];
    const change = losses.includes(null) ? "" : `, loss ${level(losses[0])} → ${level(losses[1])} (${number(losses[1] - losses[0])})`;
    const text = `Step ${from.toLocaleString("en")} to ${to.toLocaleString("en")}${change}`;
    find("now").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    slider.value = frame;
    const x = across(frame);
    for (const end of ["x1", "x2"]) document.querySelector("#track .mark").setAttribute(end, x);
    if (cursor) find("cell").textContent = said();
  }

  function said() {
    const { box, row, column } = cursor, found = value(box.tensor, row, column);
    const many = box.tensor.pool[0] * box.tensor.pool[1] > 1 ? ", their sum" : "";
    return `${indices(box.tensor, row, column)}: ${number(found)}${many}${found < 0 ? ", helped" : found > 0 ? ", hurt" : ", nothing"}`;
  }

  const across = (at) => { const low = film.step[0], high = film.step_end[film.frames - 1]; return (((film.step[at] + film.step_end[at]) / 2 - low) / (high - low || 1)) * 1000; };

  function curve() {
    const known = [...film.loss_start, ...film.loss_end].filter((each) => each !== null);
    const low = Math.min(...known), high = Math.max(...known), first = film.step[0], last = film.step_end[film.frames - 1];
    // Where segments are missing the line begins again.
    const points = film.loss_end.flatMap((loss, at) => {
      const goes = at > 0 && film.step[at] === film.step_end[at - 1];
      return goes ? [["L", film.step_end[at], loss]] : [["M", film.step[at], film.loss_start[at]], ["L", film.step_end[at], loss]];
    });
    const put = ([sign, step, loss]) => sign + `${(((step - first) / (last - first || 1)) * 1000).toFixed(1)},${(56 - ((loss - low) / (high - low || 1)) * 52).toFixed(1)}`;
    document.querySelector("#track .line").setAttribute("d", points.filter((each) => each[2] !== null).map(put).join("").replace(/^L/, "M"));
  }

  /* The frame to begin with: the one that took most out of the loss. */
  function steepest() {
    let best = 0;
    const drop = (at) => (film.loss_start[at] ?? 0) - (film.loss_end[at] ?? 0);
    for (let at = 1; at < film.frames; at++) if (drop(at) > drop(best)) best = at;
    return best;
  }

  /* --- hands --------------------------------------------------------------------------------------------------------- */

  function show(at) {
    fresh = fresh && at === frame;
    frame = Math.max(0, Math.min(film.frames - 1, at));
    draw();
  }

  function play(on) {
    clearInterval(playing);
    playing = 0;
    find("play").setAttribute("aria-pressed", String(on));
    const [sign, label] = find("play").children;
    sign.textContent = on ? "❚❚" : "▶";
    label.textContent = on ? "Pause" : "Play";
    if (!on) return;
    if (fresh || frame === film.frames - 1) show(0);
    fresh = false;
    playing = setInterval(() => (frame === film.frames - 1 ? play(false) : show(frame + 1)), 100);
  }

  function point(event) {
    const edge = find("picture").getBoundingClientRect(), x = event.clientX - edge.left, y = event.clientY - edge.top;
    const slack = 1.5, box = boxes.find((each) => x >= each.x - slack && x < each.x + each.w + slack && y >= each.y - slack && y < each.y + each.h + slack);
    if (!box) return leave();
    const inside = (at, count) => Math.max(0, Math.min(count - 1, Math.floor(at / box.size)));
    cursor = { box, row: inside(y - box.y, box.tensor.rows), column: inside(x - box.x, box.tensor.columns) };
    draw();
    return hint(x, y, edge.width);
  }

  function hint(x, y, width) {
    const tip = find("tip");
    tip.textContent = said();
    tip.hidden = false;
    tip.style.left = `${Math.max(0, Math.min(x + 14, width - tip.offsetWidth))}px`;
    tip.style.top = `${y + 18}px`;
  }

  function leave() { cursor = null; find("tip").hidden = true; find("cell").textContent = ""; draw(); }

  function key(event) {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move || !boxes.length) return;
    event.preventDefault();
    if (!cursor) cursor = { box: boxes[0], row: 0, column: 0 };
    else {
      const row = cursor.row + move[0], column = cursor.column + move[1], { tensor } = cursor.box;
      if (row >= 0 && row < tensor.rows && column >= 0 && column < tensor.columns) cursor = { ...cursor, row, column };
      else {
        const next = boxes[boxes.indexOf(cursor.box) + (move[0] + move[1])];
        if (next) cursor = { box: next, row: Math.min(cursor.row, next.tensor.rows - 1), column: move[1] < 0 ? next.tensor.columns - 1 : 0 };
      }
    }
    draw();
  }

  function scrub(event) {
    if (event.type === "pointermove" && !event.buttons) return;
    const edge = find("track").getBoundingClientRect(), part = (event.clientX - edge.left) / edge.width;
    const step = film.step[0] + part * (film.step_end[film.frames - 1] - film.step[0]);
    const at = film.step_end.findIndex((end) => end > step);
    show(at < 0 ? film.frames - 1 : at);
  }

  function begin(found) {
    if (!found) return;
    film = found;
    film.cells = film.tensors.reduce((all, tensor) => all + tensor.rows * tensor.columns, 0);
    const raw = lcaFigures.bytes(film.data);
    codes = film.code === "half" ? new Uint16Array(raw) : new Uint8Array(raw);
    table = film.code === "half" ? halves(film.unit) : levels(film.unit);
    film.data = null;
    const by = new Map();
    for (const tensor of film.tensors) by.set(tensor.layer, [...(by.get(tensor.layer) ?? []), tensor]);
    layers = [...by];
    curve();
    frame = steepest();
    find("play").addEventListener("click", () => play(!playing));
    find("frame").addEventListener("input", (event) => { play(false); show(Number(event.target.value)); });
    find("layer").addEventListener("change", () => { cursor = null; lay(); });
    const picture = find("picture");
    for (const name of ["pointermove", "pointerdown"]) picture.addEventListener(name, point);
    picture.addEventListener("pointerleave", leave);
    picture.addEventListener("keydown", key);
    picture.addEventListener("blur", leave);
    for (const name of ["pointerdown", "pointermove"]) find("track").addEventListener(name, scrub);
    paint();
    new ResizeObserver(lay).observe(picture.parentElement);
    lay();
  }

  /* Where a cell is on the screen, for the tests. */
  function locate(name, row, column) {
    const box = boxes.find((each) => each.tensor.name === name), edge = find("picture").getBoundingClientRect();
    return [edge.left + box.x + (column + 0.5) * box.size, edge.top + box.y + (row + 0.5) * box.size];
  }

  /* What stands above the layers, for the tests. */
  const titles = () => boxes.map((box) => box.title).filter(Boolean);

  return { begin, paint, locate, titles };
})();
