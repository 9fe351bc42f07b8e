// Drawing: timelines as rows of pixels, memory as curves, and what lies over both.

const TOP = 3;
const AXIS = 24;
const RIGHT = 14;
const BAR = 0.84; // share of a row's height

const SCRATCH = document.createElement("canvas");
const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";

// Colours that depend on light or dark mode; read anew when the mode changes.
let theme = {};

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  theme = {};
  for (const name of ["card", "ink", "faint", "rule", "idle", "wait", "accent", "limit"]) {
    theme[name] = style.getPropertyValue(`--${name}`).trim();
  }
}

function channels(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

// Sizes a canvas for the screen's pixels; its context then takes CSS pixels.
function prepare(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height, ratio };
}

// The place of times and ranks on a canvas.
class Frame {
  constructor(view, width, ranks, rowHeight) {
    this.left = width < 600 ? 34 : 62;
    this.from = view.from;
    this.to = view.to;
    this.plot = Math.max(width - this.left - RIGHT, 10);
    this.scale = this.plot / (view.to - view.from);
    this.ranks = ranks;
    this.rowHeight = rowHeight;
    this.bottom = TOP + ranks * rowHeight;
  }

  x(time) {
    return this.left + (time - this.from) * this.scale;
  }

  time(x) {
    return this.from + (x - this.left) / this.scale;
  }

  y(rank) {
    return TOP + (rank + (1 - BAR) / 2) * this.rowHeight;
  }

  get barHeight() {
    return Math.max(BAR * this.rowHeight, 1);
  }

  rank(y) {
    return Math.min(Math.max(Math.floor((y - TOP) / this.rowHeight), 0), this.ranks - 1);
  }
}

function rowHeight(ranks) {
  return Math.max(4, Math.min(26, 520 / ranks));
}

// Round steps of the time axis, at least `room` pixels apart.
function steps(frame, room) {
  const rough = room / frame.scale;
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
}

function drawAxis(context, frame, bottom, labelled) {
  const step = steps(frame, 84);
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  context.font = `11px ${FONT}`;
  context.textAlign = "center";
  context.textBaseline = "top";
  context.fillStyle = theme.faint;
  context.strokeStyle = theme.rule;
  context.lineWidth = 1;
  context.beginPath();
  for (let k = Math.ceil(frame.from / step - 1e-9); k * step <= frame.to * (1 + 1e-12); k++) {
    const x = Math.round(frame.x(k * step)) + 0.5;
    context.moveTo(x, TOP);
    context.lineTo(x, bottom + (labelled ? 4 : 0));
    if (labelled && x < frame.left + frame.plot - 22) context.fillText((k * step).toFixed(decimals), x, bottom + 7);
  }
  context.stroke();
  if (!labelled) return;
  context.textAlign = "right";
  context.fillText("ms", frame.left + frame.plot + RIGHT - 2, bottom + 7);
}

function drawRankNames(context, frame) {
  const short = frame.left < 50;
  const every = Math.ceil(13 / frame.rowHeight);
  context.font = `${Math.min(12, Math.max(9.5, frame.rowHeight * 0.62))}px ${FONT}`;
  context.fillStyle = theme.ink;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (let rank = 0; rank < frame.ranks; rank += every) {
    context.fillText(short ? `${rank}` : `rank ${rank}`, frame.left - 8, frame.y(rank) + frame.barHeight / 2);
  }
}

// How much of each pixel the intervals cover, with the sum of their colours: [red, green, blue, share] per
// pixel. Intervals narrower than a pixel are thus averaged instead of hidden by one another.
function cover(sums, row, frame, pixels, colourOf) {
  sums.fill(0);
  const scale = pixels / (frame.to - frame.from);
  for (let i = Math.max(lastUpTo(row.start, frame.from), 0); i < row.length && row.start[i] < frame.to; i++) {
    const left = Math.max((row.start[i] - frame.from) * scale, 0);
    const right = Math.min((row.end[i] - frame.from) * scale, pixels);
    const [red, green, blue] = colourOf(i);
    for (let pixel = Math.floor(left); pixel < right; pixel++) {
      const share = Math.min(right, pixel + 1) - Math.max(left, pixel);
      const at = 4 * pixel;
      sums[at] += share * red;
      sums[at + 1] += share * green;
      sums[at + 2] += share * blue;
      sums[at + 3] += share;
    }
  }
}

// One row of an image from such sums, over a background of its own or over nothing.
function paint(image, rank, pixels, sums, background, visible) {
  for (let pixel = 0; pixel < pixels; pixel++) {
    const at = 4 * pixel;
    const to = 4 * (rank * pixels + pixel);
    const share = Math.min(sums[at + 3], 1);
    const rest = background && pixel < visible ? 1 - share : 0;
    const whole = share + rest;
    if (whole === 0) continue;
    const scale = sums[at + 3] > 1 ? 1 / sums[at + 3] : 1;
    for (let c = 0; c < 3; c++) {
      image.data[to + c] = (sums[at + c] * scale + rest * (background ? background[c] : 0)) / whole;
    }
    image.data[to + 3] = 255 * Math.min(whole, 1);
  }
}

// Rows of intervals: drawn as an image one pixel high per rank and stretched to the bars' height.
function drawRows(context, frame, ratio, rows, colourOf, background, makespan, height) {
  const pixels = Math.max(Math.round(frame.plot * ratio), 1);
  SCRATCH.width = pixels;
  SCRATCH.height = rows.length;
  const scratch = SCRATCH.getContext("2d");
  const image = scratch.createImageData(pixels, rows.length);
  const sums = new Float32Array(4 * pixels);
  const visible = ((makespan - frame.from) / (frame.to - frame.from)) * pixels;
  rows.forEach((row, rank) => {
    cover(sums, row, frame, pixels, (i) => colourOf(row, i));
    paint(image, rank, pixels, sums, background, visible);
  });
  scratch.putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  for (let rank = 0; rank < rows.length; rank++) {
    const y = frame.y(rank) + (frame.barHeight - height) / 2;
    context.drawImage(SCRATCH, 0, rank, pixels, 1, frame.left, y, frame.plot, height);
  }
}

const ROLE_CHANNELS = page.roles.map((role) => channels(role.fill));

function drawBars(canvas, schedule, view) {
  const { context, width, ratio } = prepare(canvas);
  const frame = new Frame(view, width, schedule.ranks, rowHeight(schedule.ranks));
  drawAxis(context, frame, frame.bottom, true);
  drawRankNames(context, frame);
  const role = (row, i) => ROLE_CHANNELS[row.role[i]];
  drawRows(context, frame, ratio, schedule.rows, role, channels(theme.idle), schedule.makespan, frame.barHeight);
  if (schedule.waits.length) {
    const wait = channels(theme.wait);
    drawRows(context, frame, ratio, schedule.waits, () => wait, null, 0, Math.max(1, frame.barHeight * 0.16));
  }
  drawWideBars(context, frame, schedule);
  return frame;
}

// Gaps between bars and words in them, where these are wide enough to have any.
function drawWideBars(context, frame, schedule) {
  const size = Math.min(11.5, frame.barHeight * 0.66);
  context.font = `${size}px ${FONT}`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.save();
  context.beginPath();
  context.rect(frame.left, 0, frame.plot, frame.bottom);
  context.clip();
  schedule.rows.forEach((row, rank) => {
    const [y, height] = [frame.y(rank), frame.barHeight];
    for (let i = Math.max(lastUpTo(row.start, frame.from), 0); i < row.length && row.start[i] < frame.to; i++) {
      const [left, right] = [frame.x(row.start[i]), frame.x(row.end[i])];
      if (right - left < 4) continue;
      context.fillStyle = theme.card;
      context.fillRect(left - 0.4, y, 0.8, height);
      if (size < 7.5) continue;
      const room = right - left - 5;
      const number = `${row.microBatch[i]}`;
      if (room < number.length * size * 0.58) continue;
      const name = schedule.name(rank, i);
      context.fillStyle = page.roles[row.role[i]].text;
      const text = room > name.length * size * 0.62 + 8 ? name : number;
      context.fillText(text, (left + right) / 2, y + height / 2 + 0.5);
    }
  });
  context.restore();
}

function drawMemory(canvas, schedule, view, top) {
  const { context, width, height, ratio } = prepare(canvas);
  const frame = new Frame(view, width, 1, height - TOP - 2);
  const bottom = height - 2;
  const y = (held) => bottom - (held / top) * (bottom - TOP - 6);
  drawAxis(context, frame, bottom, false);
  drawByteAxis(context, frame, y, top);
  context.save();
  context.beginPath();
  context.rect(frame.left, 0, frame.plot, height);
  context.clip();
  context.lineWidth = schedule.ranks > 16 ? 0.9 : 1.4;
  schedule.memory.forEach((curve, rank) => {
    context.strokeStyle = schedule.colours[rank];
    drawCurve(context, frame, curve, y, schedule.makespan, ratio);
  });
  if (page.limit) {
    context.strokeStyle = theme.limit;
    context.lineWidth = 1.5;
    context.setLineDash([6, 4]);
    context.beginPath();
    context.moveTo(frame.left, y(page.limit));
    context.lineTo(frame.left + frame.plot, y(page.limit));
    context.stroke();
    context.setLineDash([]);
    context.fillStyle = theme.limit;
    context.font = `11px ${FONT}`;
    context.textAlign = "right";
    context.textBaseline = "top";
    context.fillText(`limit ${bytes(page.limit)}`, frame.left + frame.plot - 4, y(page.limit) + 3);
  }
  context.restore();
}

function drawByteAxis(context, frame, y, top) {
  const unit = page.unit;
  const rough = top / unit.size / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  context.fillStyle = theme.faint;
  context.strokeStyle = theme.rule;
  context.font = `11px ${FONT}`;
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.lineWidth = 1;
  context.beginPath();
  for (let k = 0; k * step * unit.size <= top; k++) {
    const at = Math.round(y(k * step * unit.size)) + 0.5;
    context.moveTo(frame.left, at);
    context.lineTo(frame.left + frame.plot, at);
    context.fillText(`${Number((k * step).toPrecision(6))}`, frame.left - 6, Math.min(at, y(0) - 5));
  }
  context.stroke();
}

// A step curve; within a pixel only its first, lowest, highest and last level are drawn.
function drawCurve(context, frame, curve, y, end, ratio) {
  let i = Math.max(lastUpTo(curve.time, frame.from), 0);
  let held = curve.bytes[i];
  context.beginPath();
  context.moveTo(frame.x(Math.max(frame.from, 0)), y(held));
  for (i++; i < curve.length && curve.time[i] < frame.to; ) {
    const x = frame.x(curve.time[i]);
    const next = x + 1 / ratio;
    let [low, high] = [held, held];
    context.lineTo(x, y(held));
    for (; i < curve.length && frame.x(curve.time[i]) < next; i++) {
      held = curve.bytes[i];
      low = Math.min(low, held);
      high = Math.max(high, held);
    }
    context.lineTo(x, y(high));
    if (low < held) context.lineTo(x, y(low));
    context.lineTo(x, y(held));
  }
  context.lineTo(frame.x(Math.min(frame.to, end)), y(held));
  context.stroke();
}
