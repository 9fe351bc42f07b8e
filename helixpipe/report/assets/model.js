// The data of the page: schedules as typed arrays, and what can be asked of them.

// Kinds of messages, by their numbers in the page's data.
const MESSAGES = ["RECV_F", "RECV_B", "RECV_P", "RECV_G", "RECV_K", "RECV_KB", "RECV_D"];

const page = JSON.parse(document.getElementById("data").textContent);

class Schedule {
  constructor(data) {
    this.makespan = data.makespan;
    this.segments = data.segments;
    this.colours = data.colours;
    this.rows = data.spans.map((numbers) => decodeSpans(numbers, data.tick));
    this.waits = data.waits.map((numbers) => decodeWaits(numbers, data.tick));
    this.memory = data.memory.map((numbers) => decodeMemory(numbers, data.tick, data.quantum));
    this.places = null;
  }

  get ranks() {
    return this.rows.length;
  }

  name(rank, index) {
    const row = this.rows[rank];
    return `${row.segment[index]}${page.roles[row.role[index]].kind}${row.microBatch[index]}`;
  }

  // Where an operation runs, as [rank, index], or undefined. The map is made when it is first asked for.
  place(name) {
    if (!this.places) {
      this.places = new Map();
      this.rows.forEach((row, rank) => {
        for (let i = 0; i < row.length; i++) this.places.set(this.name(rank, i), [rank, i]);
      });
    }
    return this.places.get(name);
  }

  // The operation `step` further down the chain of data, -1 for the one that feeds this one.
  neighbour(rank, index, step) {
    const row = this.rows[rank];
    const kind = page.roles[row.role[index]].kind;
    if (kind === "W") return undefined;
    const segment = row.segment[index] + (kind === "F" ? step : -step);
    return this.place(`${segment}${kind}${row.microBatch[index]}`);
  }

  // The wait that an operation ended, as an index into its rank's waits, or -1.
  waitOf(rank, index) {
    const waits = this.waits[rank];
    const row = this.rows[rank];
    const kind = page.roles[row.role[index]].kind;
    if (!waits || kind === "W") return -1;
    const edge = row.segment[index] - (kind === "F" ? 1 : 0);
    // Keys and values, and their gradients, name the slice that made them, not the one that reads them.
    const contexts = (kind === "F" ? ["RECV_K"] : ["RECV_KB", "RECV_D"]).map((name) => MESSAGES.indexOf(name));
    for (let i = lastUpTo(waits.start, row.start[index]); i >= 0; i--) {
      const same = waits.edge[i] === edge && waits.microBatch[i] === row.microBatch[index];
      if (same && waits.kind[i] === MESSAGES.indexOf(`RECV_${kind}`)) return i;
      if (index > 0 && waits.end[i] < row.start[index - 1]) break;
      if (contexts.includes(waits.kind[i]) && (index === 0 || waits.end[i] > row.end[index - 1])) return i;
    }
    return -1;
  }

  // The operation that runs at a time; -1 if the rank is idle.
  at(rank, time) {
    const row = this.rows[rank];
    const index = lastUpTo(row.start, time);
    return index >= 0 && time < row.end[index] ? index : -1;
  }

  // The operation that runs at a time or lies nearest to it; -1 if the rank has none.
  nearest(rank, time) {
    const row = this.rows[rank];
    const before = lastUpTo(row.start, time);
    if (before < 0) return row.length ? 0 : -1;
    const after = before + 1;
    if (after < row.length && row.start[after] - time < time - row.end[before]) return after;
    return before;
  }

  held(rank, time) {
    const curve = this.memory[rank];
    return curve.bytes[Math.max(lastUpTo(curve.time, time), 0)];
  }
}

function decodeSpans(numbers, tick) {
  const length = numbers.length / 5;
  const row = {
    length,
    role: new Uint8Array(length),
    segment: new Int32Array(length),
    microBatch: new Int32Array(length),
    start: new Float64Array(length),
    end: new Float64Array(length),
  };
  let time = 0;
  for (let i = 0, at = 0; i < length; i++, at += 5) {
    row.role[i] = numbers[at];
    row.segment[i] = numbers[at + 1];
    row.microBatch[i] = numbers[at + 2];
    row.start[i] = (time += numbers[at + 3]) * tick;
    row.end[i] = (time += numbers[at + 4]) * tick;
  }
  return row;
}

function decodeWaits(numbers, tick) {
  const length = numbers.length / 6;
  const row = { length, edge: [], kind: [], microBatch: [], peer: [], start: new Float64Array(length), end: new Float64Array(length) };
  let time = 0;
  for (let i = 0, at = 0; i < length; i++, at += 6) {
    row.edge.push(numbers[at]);
    row.kind.push(numbers[at + 1]);
    row.microBatch.push(numbers[at + 2]);
    row.peer.push(numbers[at + 3]);
    row.start[i] = (time += numbers[at + 4]) * tick;
    row.end[i] = (time += numbers[at + 5]) * tick;
  }
  return row;
}

function decodeMemory(numbers, tick, quantum) {
  const length = numbers.length / 2;
  const curve = { length, time: new Float64Array(length), bytes: new Float64Array(length) };
  let time = 0;
  let held = 0;
  for (let i = 0; i < length; i++) {
    curve.time[i] = (time += numbers[2 * i]) * tick;
    curve.bytes[i] = (held += numbers[2 * i + 1]) * quantum;
  }
  return curve;
}

// Index of the last value that is not above `limit` in a rising array; -1 if all are.
function lastUpTo(values, limit) {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] <= limit) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

function milliseconds(value) {
  return `${Math.abs(value) >= 1e5 ? value.toFixed(0) : Number(value.toPrecision(5))} ms`;
}

function bytes(value) {
  return `${Number((value / page.unit.size).toPrecision(4))} ${page.unit.name}`;
}

// What there is to say about an operation: its name, its role, and rows of [what, value].
function describe(schedule, rank, index) {
  const row = schedule.rows[rank];
  const segment = row.segment[index];
  const name = schedule.segments[segment];
  const rows = [
    ["segment", name === undefined ? `${segment}` : `${segment} (${name})`],
    ["micro batch", `${row.microBatch[index]}`],
    ["rank", `${rank}`],
    ["start", milliseconds(row.start[index])],
    ["end", milliseconds(row.end[index])],
    ["duration", milliseconds(row.end[index] - row.start[index])],
  ];
  const wait = schedule.waitOf(rank, index);
  if (wait >= 0) rows.push(["waited", waitText(schedule.waits[rank], wait)]);
  return { name: schedule.name(rank, index), role: page.roles[row.role[index]], rows };
}

function describeIdle(schedule, rank, time) {
  const row = schedule.rows[rank];
  const before = lastUpTo(row.start, time);
  const from = before < 0 ? 0 : row.end[before];
  const to = before + 1 < row.length ? row.start[before + 1] : schedule.makespan;
  const rows = [["rank", `${rank}`], ["from", milliseconds(from)], ["to", milliseconds(to)]];
  const waits = schedule.waits[rank];
  const wait = waits ? lastUpTo(waits.start, time) : -1;
  if (wait >= 0 && time < waits.end[wait]) rows.push(["waits", waitText(waits, wait)]);
  return { name: "idle", role: null, rows };
}

function waitText(waits, i) {
  const kind = MESSAGES[waits.kind[i]];
  const from = waits.peer[i] < 0 ? "" : `@${waits.peer[i]}`;
  return `${milliseconds(waits.end[i] - waits.start[i])} for ${waits.edge[i]}${kind}${waits.microBatch[i]}${from}`;
}
