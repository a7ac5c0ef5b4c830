// The page holds one code: the point. The server decodes it; map, sliders, samples and inputs only choose it.

const MOVES_PER_WIDTH = 100, SHIFT_MOVES = 10;
const DRAWN = 24, FRAMES = 9;
const RANGE_STDS = 4, SHOWN_COLUMNS = 200, SHOWN_UNITS = 16;

const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}, children = []) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const format = (value, digits = 4) => Number(value.toPrecision(digits)).toString().replace("-", "\u2212");

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const signed = (value) => value.toFixed(2).replace("-", "\u2212");

const about = await ask("about").then((response) => response.json());
const { shape, latent_dim, plane } = about;
// Pictures are images and slices of volumes; signals are lines; tables are rows of numbers.
const isPicture = shape.length >= 3, isSignal = shape.length === 2, isTable = shape.length === 1;
const channels = isTable ? 1 : shape[0], depth = shape.length === 4 ? shape[1] : 1;
const [height, width] = isPicture ? shape.slice(-2) : [1, shape.at(-1)];
const dimensions = channels * depth * height * width, isColour = channels === 3;

// ---- server

async function ask(path, body) {
  const response = await fetch(path, body === undefined ? {} : { method: "POST", body }).catch(() => {
    throw new Error("The explorer does not answer: start it again with 'equipoise explore'.");
  });
  if (!response.ok) throw new Error(await response.text());
  report("");
  return response;
}

function report(message) {
  $("problem").textContent = message;
  $("problem").hidden = !message;
}

addEventListener("unhandledrejection", (event) => {
  report(event.reason.message);
  event.preventDefault();
});

async function decoded(path, request) {
  const numbers = new Float32Array(await (await ask(path, JSON.stringify(request))).arrayBuffer());
  const stride = latent_dim + 2 * dimensions;
  return Array.from({ length: numbers.length / stride }, (_, n) => {
    const item = numbers.subarray(n * stride, (n + 1) * stride);
    return {
      code: item.subarray(0, latent_dim),
      mean: item.subarray(latent_dim, latent_dim + dimensions),
      std: item.subarray(latent_dim + dimensions),
    };
  });
}

// ---- pictures

const unit = (value, i) => (value - about.offset[i % about.offset.length]) / about.scale[i % about.scale.length];

// What is shown of a picture: one of its bands, or all three as colours, and a slice of a volume.
const shown = { band: 0, slice: Math.floor(depth / 2) };
const at = (band, pixel) => (band * depth + shown.slice) * height * width + pixel;
const bandsShown = () => (isColour ? [0, 1, 2] : [shown.band]);

function paintImage(canvas, values) {
  const picture = new ImageData(width, height), bands = bandsShown();
  for (let p = 0; p < height * width; p++) {
    for (let c = 0; c < 3; c++) {
      picture.data[4 * p + c] = 255 * unit(values[at(bands[c % bands.length], p)], 0);
    }
    picture.data[4 * p + 3] = 255;
  }
  put(canvas, picture);
}

function paintMap(canvas, values, top) {
  const picture = new ImageData(width, height), bands = bandsShown();
  for (let p = 0; p < height * width; p++) {
    let sum = 0;
    for (const band of bands) sum += values[at(band, p)] ** 2;
    const level = Math.min(255, Math.round((255 * Math.sqrt(sum / bands.length)) / top));
    picture.data.set([...about.std_colours.slice(3 * level, 3 * level + 3), 255], 4 * p);
  }
  put(canvas, picture);
}

function paintRow(canvas, values, height = unit) {
  const side = 96, middle = side / 2;
  Object.assign(canvas, { width: side, height: side });
  const context = canvas.getContext("2d");
  context.fillStyle = colour("--accent");
  values.forEach((value, i) => {
    const reach = (middle * height(value, i)) / RANGE_STDS;
    context.fillRect((i * side) / values.length, middle, Math.max(1, side / values.length - 1), -reach);
  });
}

// A line for each channel, and one std around it where there is one.
function paintSignal(canvas, values, std = null, height = (value) => 2 * unit(value, 0) - 1) {
  const [wide, tall] = [320, 160];
  Object.assign(canvas, { width: wide, height: tall });
  const context = canvas.getContext("2d");
  const x = (i) => ((i + 0.5) * wide) / width, y = (value) => (tall * (1 - 0.9 * height(value))) / 2;
  for (let c = 0; c < channels; c++) {
    const index = Array.from({ length: width }, (_, i) => i);
    const line = (value) => index.map((i) => [x(i), y(value(c * width + i))]);
    context.fillStyle = context.strokeStyle = c ? `hsl(${(200 + (c * 360) / channels) % 360} 70% 50%)` : colour("--accent");
    if (std) {
      const edges = [...line((i) => values[i] - std[i]), ...line((i) => values[i] + std[i]).reverse()];
      context.globalAlpha = 0.3;
      context.fill(pathThrough(edges));
      context.globalAlpha = 1;
    }
    context.lineWidth = 2;
    context.stroke(pathThrough(line((i) => values[i])));
  }
}

function pathThrough(points) {
  const path = new Path2D();
  points.forEach(([x, y]) => path.lineTo(x, y));
  return path;
}

const paint = isPicture ? paintImage : isSignal ? paintSignal : paintRow;

function put(canvas, picture) {
  if (canvas.width !== picture.width || canvas.height !== picture.height) {
    Object.assign(canvas, { width: picture.width, height: picture.height });
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function thumbnail(item, label) {
  const canvas = make("canvas");
  canvas.repaint = () => paint(canvas, item.mean);
  canvas.repaint();
  const button = make("button", { type: "button", ariaLabel: label, title: label }, [canvas]);
  button.addEventListener("click", () => show({ codes: [[...item.code]] }));
  return button;
}

// ---- the point

let point, wanted = null;

// One request at a time, and of those that wait only the last: the point never lags behind the hand.
async function show(request) {
  const busy = wanted !== null;
  wanted = request;
  if (busy) return;
  try {
    for (let asked = null; asked !== wanted; ) {
      asked = wanted;
      display((await decoded("decode", asked))[0]);
      if (about.n_draws) showDraws(await decoded("draws", { codes: [[...point.code]] }));
    }
  } finally {
    wanted = null;
  }
}

function display(item) {
  point = item;
  paintPoint();
  for (const { range, output, u } of sliders) {
    range.value = item.code[u];
    output.value = signed(item.code[u]);
  }
  drawPlane();
}

function paintPoint() {
  if (isTable) return showColumns(point);
  paint($("mean"), point.mean, point.std);
  if (isPicture) paintMap($("std"), point.std, about.highest_std);
}

function showDraws(items) {
  items.forEach((item, n) => paintImage($("draws").querySelectorAll("canvas")[n], item.mean));
}

function repaint() {
  paintPoint();
  for (const canvas of document.querySelectorAll("canvas")) canvas.repaint?.();
}

// Bands of images that are neither grey nor RGB, and slices of volumes.
function startPlanes() {
  const choices = {
    band: isPicture && !isColour ? channels : 1,
    slice: depth,
  };
  for (const [name, count] of Object.entries(choices)) {
    const input = $(name);
    $(`${name}-label`).hidden = count === 1;
    Object.assign(input, { max: count, value: shown[name] + 1 });
    const say = () => ($(`${name}-at`).value = `${shown[name] + 1} of ${count}`);
    input.addEventListener("input", () => {
      shown[name] = Number(input.value) - 1;
      say();
      repaint();
    });
    say();
  }
}

// Show the first of many elements, say so, and give a way to the others.
function showPart(container, count, noun) {
  const elements = [...container.children], rest = elements.slice(count);
  if (!rest.length) return;
  rest.forEach((element) => (element.hidden = true));
  const text = make("span", { textContent: `Showing ${count} of ${elements.length} ${noun}` });
  const button = make("button", { type: "button", textContent: "Show all" });
  const note = make("p", { className: "controls help" }, [text, button]);
  button.addEventListener("click", () => {
    const isAll = rest[0].hidden;
    rest.forEach((element) => (element.hidden = !isAll));
    text.textContent = `Showing ${isAll ? elements.length : count} of ${elements.length} ${noun}`;
    button.textContent = isAll ? "Show fewer" : "Show all";
  });
  container.before(note);
}

const columns = [];

function showColumns({ mean, std }) {
  columns.forEach(({ spread, middle, output }, i) => {
    const percent = (value) => clamp(50 + (50 * unit(value, i)) / RANGE_STDS, 0, 100);
    const [low, high] = [percent(mean[i] - std[i]), percent(mean[i] + std[i])];
    Object.assign(spread.style, { left: `${low}%`, width: `${high - low}%` });
    middle.style.left = `${percent(mean[i])}%`;
    output.value = `${format(mean[i])} ± ${format(std[i], 2)}`;
  });
}

function makeColumns() {
  for (let i = 0; i < dimensions; i++) {
    const [spread, middle, output] = [make("i"), make("b"), make("output")];
    columns.push({ spread, middle, output });
    $("columns").append(make("li", {}, [`column ${i}`, make("span", { className: "bar" }, [spread, middle]), output]));
  }
  showPart($("columns"), SHOWN_COLUMNS, "columns");
}

// ---- latent units, the widest first

const sliders = about.reach
  .map((reach, u) => ({ reach, u }))
  .sort((a, b) => b.reach - a.reach)
  .map(({ reach, u }) => {
    const [low, high] = [about.centre[u] - reach, about.centre[u] + reach];
    const range = make("input", { type: "range", id: `unit-${u}`, min: low, max: high, step: "any" });
    const output = make("output", { htmlFor: range.id });
    range.addEventListener("input", () => {
      const code = [...point.code];
      code[u] = Number(range.value);
      show({ codes: [code] });
    });
    range.addEventListener("keydown", (event) => {
      const direction = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      if (!direction) return;
      event.preventDefault(); // step="any" alone would jump by whole units
      range.value = Number(range.value) + (direction * 2 * reach) / MOVES_PER_WIDTH;
      range.dispatchEvent(new Event("input"));
    });
    const label = make("label", { htmlFor: range.id, textContent: `unit ${u}` });
    $("units").append(make("div", { className: "unit" }, [label, range, output]));
    return { range, output, u };
  });
showPart($("units"), SHOWN_UNITS, "units, the widest first");

// ---- the map

const map = $("map");
let backdrop = null;

const project = (code) => plane.axes.map((axis) => axis.reduce((sum, a, u) => sum + a * code[u], 0));
const toPixel = ([x, y]) => [
  ((x - plane.x[0]) / (plane.x[1] - plane.x[0])) * map.width,
  ((plane.y[1] - y) / (plane.y[1] - plane.y[0])) * map.height,
];

function moveTo([x, y]) {
  const target = [clamp(x, ...plane.x), clamp(y, ...plane.y)];
  if (!$("keep").checked) return show({ point: target });
  const here = project(point.code);
  const shift = (u) => plane.axes.reduce((sum, axis, i) => sum + axis[u] * (target[i] - here[i]), 0);
  return show({ codes: [[...point.code].map((z, u) => z + shift(u))] });
}

function drawPlane() {
  if (!plane || !point) return;
  backdrop ??= makeBackdrop();
  const context = map.getContext("2d"), radius = 8 * devicePixelRatio;
  const here = project(point.code), [x, y] = toPixel(here);
  context.clearRect(0, 0, map.width, map.height);
  context.drawImage(backdrop, 0, 0);
  for (const [style, lineWidth] of [[colour("--panel"), 5], [colour("--point"), 3]]) {
    Object.assign(context, { strokeStyle: style, lineWidth: lineWidth * devicePixelRatio });
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.moveTo(x - 2 * radius, y), context.lineTo(x + 2 * radius, y);
    context.moveTo(x, y - 2 * radius), context.lineTo(x, y + 2 * radius);
    context.stroke();
  }
  $("place").textContent = here.map((value, i) => `${axisName(i)}: ${signed(value)}`).join(", ");
}

const axisName = (i) => (latent_dim === 2 ? `unit ${i}` : `principal axis ${i + 1}`);

function makeBackdrop() {
  const { width, height } = map, canvas = make("canvas", { width, height }), context = canvas.getContext("2d");
  const n = plane.n_points, density = make("canvas", { width: n, height: n }), levels = new ImageData(n, n);
  const [red, green, blue] = colour("--accent").match(/\w\w/g).map((hex) => parseInt(hex, 16));
  plane.density.forEach((level, i) => {
    const row = n - 1 - Math.floor(i / n);
    levels.data.set([red, green, blue, 190 * level], 4 * (row * n + (i % n)));
  });
  density.getContext("2d").putImageData(levels, 0, 0);
  context.drawImage(density, 0, 0, width, height);
  context.fillStyle = colour("--dot");
  for (const code of plane.codes) {
    const [x, y] = toPixel(code);
    context.fillRect(x - devicePixelRatio, y - devicePixelRatio, 2 * devicePixelRatio, 2 * devicePixelRatio);
  }
  Object.assign(context, { strokeStyle: colour("--text"), fillStyle: colour("--text"), lineWidth: devicePixelRatio });
  Object.assign(context, { font: `${11 * devicePixelRatio}px system-ui`, textAlign: "center", textBaseline: "middle" });
  plane.means.forEach((mean, k) => {
    context.globalAlpha = 0.45;
    ellipse(context, mean, plane.covariances[k]);
    context.globalAlpha = 1;
    context.fillText(k, ...toPixel(mean));
  });
  return canvas;
}

// One std around the mean, through the Cholesky factor of the covariance.
function ellipse(context, mean, [[a, b], [, c]]) {
  const l = Math.sqrt(a), m = b / l, r = Math.sqrt(Math.max(0, c - m * m));
  context.beginPath();
  for (let step = 0; step <= 60; step++) {
    const [u, v] = [Math.cos((step * Math.PI) / 30), Math.sin((step * Math.PI) / 30)];
    context.lineTo(...toPixel([mean[0] + l * u, mean[1] + m * u + r * v]));
  }
  context.stroke();
}

function startMap() {
  const [wide, tall] = [plane.x[1] - plane.x[0], plane.y[1] - plane.y[0]];
  map.style.aspectRatio = clamp(wide / tall, 0.8, 1.6);
  const redraw = () => {
    if (!map.clientWidth) return;
    map.width = map.clientWidth * devicePixelRatio;
    map.height = map.clientHeight * devicePixelRatio;
    backdrop = null;
    drawPlane();
  };
  new ResizeObserver(redraw).observe(map);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  const follow = (event) => moveTo([
    plane.x[0] + (event.offsetX / map.clientWidth) * wide,
    plane.y[1] - (event.offsetY / map.clientHeight) * tall,
  ]);
  map.addEventListener("pointerdown", (event) => {
    map.setPointerCapture(event.pointerId);
    follow(event);
  });
  map.addEventListener("pointermove", (event) => map.hasPointerCapture(event.pointerId) && follow(event));
  map.addEventListener("keydown", (event) => {
    const direction = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!direction) return;
    event.preventDefault();
    const moves = (event.shiftKey ? SHIFT_MOVES : 1) / MOVES_PER_WIDTH, [x, y] = project(point.code);
    moveTo([x + direction[0] * moves * wide, y + direction[1] * moves * tall]);
  });
}

// ---- samples and the path between two points

async function draw() {
  const seed = Math.floor(Math.random() * 2 ** 32);
  const items = await decoded("sample", { source: $("source").value, n: DRAWN, seed });
  $("samples").replaceChildren(...items.map((item, n) => thumbnail(item, `Go to sample ${n + 1}`)));
}

const ends = [];
const between = (t) => ends[0].map((z, u) => z + t * (ends[1][u] - z));

async function showPath() {
  const codes = Array.from({ length: FRAMES }, (_, n) => between(n / (FRAMES - 1)));
  const items = await decoded("decode", { codes });
  $("path").replaceChildren(...items.map((item, n) => thumbnail(item, `Go to step ${n + 1} of ${FRAMES} from A to B`)));
}

function keepEnd(i) {
  ends[i] = [...point.code];
  $("path-at").value = i;
  showPath();
}

// ---- an input

async function inspect(path, body) {
  showFound(await ask(path, body).then((response) => response.json()));
}

async function showFound(found) {
  const [seen] = await decoded("decode", { codes: [found.code] });
  display(seen);
  const error = found.raw.map((value, i) => (value - seen.mean[i]) / seen.std[i]);
  $("input").repaint = () => paint($("input"), found.raw);
  $("error").repaint = () => {
    if (isPicture) paintMap($("error"), error, RANGE_STDS);
    else if (isSignal) paintSignal($("error"), error, null, (value) => value / RANGE_STDS);
    else paintRow($("error"), error, (value) => value);
  };
  $("input").repaint();
  $("error").repaint();
  $("verdict").textContent = found.odder_than === null
    ? "Without the run's data it cannot be ranked."
    : `Odder than ${Math.floor(1000 * found.odder_than) / 10} % of the validation data`;
  const figures = {
    "log p(x), at least": `${format(found.log_likelihood)} nats`,
    ELBO: `${format(found.elbo)} nats`,
    "squared error / variance (about 1)": format(found.standardised_residual),
    "log-density of its code": `${format(found.code_log_prob)} nats`,
  };
  const pairs = Object.entries(figures).flatMap(([name, value]) => [make("dt", {}, [name]), make("dd", {}, [value])]);
  $("figures").replaceChildren(...pairs);
  $("findings").hidden = false;
}

function startInputs() {
  $("file").addEventListener("change", () => {
    if ($("file").files.length) inspect("inspect", $("file").files[0]);
    $("file").value = "";
  });
  $("example").addEventListener("click", () => {
    inspect("example", JSON.stringify({ index: Math.floor(Math.random() * about.n_examples) }));
  });
  $("row-form").addEventListener("submit", (event) => {
    event.preventDefault();
    inspect("inspect", $("row").value);
  });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    if (event.dataTransfer.files.length) inspect("inspect", event.dataTransfer.files[0]);
  });
}

// ---- start

function describe() {
  document.title = `${about.name} · equipoise explore`;
  $("name").textContent = about.name;
  const images = { 1: "grey images", 3: "colour images" }[channels] ?? `images of ${channels} bands`;
  const kind = [
    `${dimensions} columns`,
    `signals of ${width} values and ${channels} channels`,
    `${width} × ${height} ${images}`,
    `volumes of ${depth} slices, ${width} × ${height} ${images}`,
  ][shape.length - 1];
  $("summary").textContent = `${kind}, ${latent_dim} latent units, mixture of ${about.means.length}`;
  $("legend").textContent = about.n_examples
    ? "Blue: density of the aggregate posterior. Dots: training data. Ellipses: components of the mixture, one std."
    : "Blue: density of the mixture. Dots: samples of it. Ellipses: its components, one std.";
  $("highest-std").textContent = format(about.highest_std);
  const components = about.weights.map((weight, k) => [k, `component ${k} (${(100 * weight).toFixed(1)} %)`]);
  for (const [value, text] of [["mixture", "mixture"], ["prior", "prior N(0, I)"], ...components]) {
    $("source").append(make("option", { value }, [text]));
  }
  $("map-panel").hidden = !plane;
  $("keep-label").hidden = latent_dim === 2;
  $("example").hidden = !about.n_examples;
  $("row-form").hidden = isPicture;
  if (isSignal) $("row-label").textContent = "Values of one signal, channel after channel, separated by commas";
  $("draws").hidden = !about.n_draws;
  for (let n = 0; n < about.n_draws; n++) {
    $("draws").firstElementChild.append(make("canvas", { role: "img", ariaLabel: `Draw ${n + 1}` }));
  }
  for (const id of ["file-label", "file", "drop-help"]) $(id).hidden = shape.length !== 3;
  for (const element of document.querySelectorAll("#readout, #std-figure, #input-panel .scale")) {
    element.hidden = !isPicture;
  }
  document.querySelector("#decoded-panel .pictures").hidden = isTable;
  document.body.classList.toggle("signals", isSignal);
  if (isSignal) $("mean-caption").textContent = "Mean, and one std around it";
  for (const canvas of document.querySelectorAll(".colours")) {
    const ramp = new ImageData(256, 1);
    for (let i = 0; i < 256; i++) ramp.data.set([...about.std_colours.slice(3 * i, 3 * i + 3), 255], 4 * i);
    put(canvas, ramp);
  }
}

function startReadout() {
  for (const canvas of [$("mean"), $("std")]) {
    canvas.addEventListener("pointermove", (event) => {
      const column = clamp(Math.floor((event.offsetX / canvas.clientWidth) * width), 0, width - 1);
      const row = clamp(Math.floor((event.offsetY / canvas.clientHeight) * height), 0, height - 1);
      const values = Array.from({ length: channels }, (_, c) => at(c, row * width + column))
        .map((i) => `${format(point.mean[i])} ± ${format(point.std[i], 2)}`);
      $("readout").textContent = `Row ${row}, column ${column}: ${values.join(", ")}`;
    });
  }
}

describe();
startPlanes();
if (isPicture) startReadout();
if (isTable) makeColumns();
if (plane) startMap();
startInputs();
$("draw").addEventListener("click", draw);
$("keep-a").addEventListener("click", () => keepEnd(0));
$("keep-b").addEventListener("click", () => keepEnd(1));
$("path-at").addEventListener("input", () => show({ codes: [between(Number($("path-at").value))] }));

const heaviest = about.weights.map((weight, k) => [weight, k]).sort(([a], [b]) => b - a).map(([, k]) => about.means[k]);
ends.push(heaviest[0], heaviest[1] ?? about.centre);
await show({ codes: [heaviest[0]] });
await Promise.all([draw(), showPath()]);
if (about.start) await showFound(about.start);
document.body.dataset.ready = "";
