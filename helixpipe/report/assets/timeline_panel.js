// One timeline on the page: its canvases, what is chosen in it, and how it answers to mouse and keyboard.

const CLICK = 4; // pixels that the mouse may move in a click
const READABLE = 46; // pixels that a chosen operation should at least take

class TimelinePanel {
  constructor(section, schedule, index, host) {
    this.schedule = schedule;
    this.index = index;
    this.host = host; // the page: zooms others along, shows the tooltip, keeps the address
    this.section = section;
    this.bars = section.querySelector("canvas.bars");
    this.memory = section.querySelector("canvas.memory");
    this.overlay = section.querySelector("canvas.overlay");
    this.details = section.querySelector(".details");
    this.view = { from: 0, to: host.end };
    this.chosen = null; // [rank, index]
    this.stale = true;
    this.bars.style.height = `${TOP + schedule.ranks * rowHeight(schedule.ranks) + AXIS}px`;
    this.listen();
  }

  draw() {
    this.frame = drawBars(this.bars, this.schedule, this.view);
    if (this.memory) drawMemory(this.memory, this.schedule, this.view, this.host.top);
    this.bars.dataset.drawn = `${this.view.from}..${this.view.to}`;
    this.stale = false;
  }

  // What changes with every move of the mouse lies on a canvas of its own: the bars are not drawn again.
  drawOverlay() {
    const { context, height } = prepare(this.overlay);
    const { frame, host } = this;
    context.save();
    context.beginPath();
    context.rect(frame.left - 1, 0, frame.plot + 2, height);
    context.clip();
    if (host.range && host.range.panel === this) this.drawRange(context, height);
    if (host.cursor !== null && (host.together || host.active === this)) {
      const x = frame.x(host.cursor);
      context.fillStyle = theme.faint;
      context.globalAlpha = 0.55;
      context.fillRect(Math.round(x), 0, 1, frame.bottom);
      if (this.memory) context.fillRect(Math.round(x), this.memory.offsetTop, 1, this.memory.offsetHeight);
      context.globalAlpha = 1;
    }
    if (this.chosen) {
      for (const step of [-1, 1]) this.drawArrow(context, step);
      this.outline(context, this.chosen, 2.5);
    }
    if (this.pointed) this.outline(context, this.pointed, 1.5);
    context.restore();
  }

  drawRange(context, height) {
    const { from, to } = this.host.range;
    const [left, right] = [this.frame.x(Math.min(from, to)), this.frame.x(Math.max(from, to))];
    context.fillStyle = theme.accent;
    context.globalAlpha = 0.18;
    context.fillRect(left, 0, right - left, height);
    context.globalAlpha = 1;
  }

  outline(context, [rank, index], width) {
    const { frame } = this;
    const row = this.schedule.rows[rank];
    const [left, right] = [frame.x(row.start[index]), frame.x(row.end[index])];
    context.strokeStyle = theme.ink;
    context.lineWidth = width;
    context.strokeRect(left - 0.5, frame.y(rank) - 0.5, Math.max(right - left, 2) + 1, frame.barHeight + 1);
  }

  // From the chosen operation's producer to it, or from it to its consumer.
  drawArrow(context, step) {
    const other = this.schedule.neighbour(...this.chosen, step);
    if (!other) return;
    const [source, target] = step < 0 ? [other, this.chosen] : [this.chosen, other];
    const { frame, schedule } = this;
    const x0 = frame.x(schedule.rows[source[0]].end[source[1]]);
    const x1 = frame.x(schedule.rows[target[0]].start[target[1]]);
    const [y0, y1] = [source, target].map(([rank]) => frame.y(rank) + frame.barHeight / 2);
    const bend = Math.max(14, Math.abs(x1 - x0) / 2);
    context.beginPath();
    context.moveTo(x0, y0);
    context.bezierCurveTo(x0 + bend, y0, x1 - bend, y1, x1, y1);
    // Twice: the second, thinner line stands out against bars of any colour.
    for (const [colour, width] of [[theme.card, 4.5], [theme.ink, 1.8]]) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.stroke();
    }
    context.beginPath();
    context.arc(x1, y1, 3.2, 0, 2 * Math.PI);
    context.fillStyle = theme.ink;
    context.fill();
  }

  listen() {
    const { bars } = this;
    bars.addEventListener("pointerdown", (event) => this.press(event));
    bars.addEventListener("pointermove", (event) => this.move(event));
    bars.addEventListener("pointerup", (event) => this.release(event));
    bars.addEventListener("pointercancel", () => this.letGo());
    bars.addEventListener("dblclick", () => this.host.fit(this));
    bars.addEventListener("keydown", (event) => this.key(event));
    for (const canvas of [bars, this.memory].filter(Boolean)) {
      canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
      canvas.addEventListener("pointerleave", () => this.leave());
    }
    if (this.memory) this.memory.addEventListener("pointermove", (event) => this.moveOverMemory(event));
  }

  press(event) {
    if (event.button !== 0) return;
    this.host.active = this;
    this.bars.setPointerCapture(event.pointerId);
    const time = this.frame.time(event.offsetX);
    this.drag = { x: event.offsetX, view: { ...this.view }, moved: false, range: event.offsetY > this.frame.bottom, time };
    this.bars.classList.toggle("ranging", this.drag.range);
  }

  move(event) {
    const { drag, frame } = this;
    const time = frame.time(event.offsetX);
    if (!drag) {
      this.point(event, time);
      return;
    }
    drag.moved ||= Math.abs(event.offsetX - drag.x) > CLICK;
    if (!drag.moved) return;
    this.host.hideTip();
    if (drag.range) {
      this.host.range = { panel: this, from: drag.time, to: time };
      this.host.refresh();
    } else {
      this.bars.classList.add("dragging");
      const shift = (drag.x - event.offsetX) / frame.scale;
      this.host.show(this, drag.view.from + shift, drag.view.to + shift);
    }
  }

  release(event) {
    const { drag } = this;
    this.letGo();
    if (!drag) return;
    const time = this.frame.time(event.offsetX);
    if (drag.range && drag.moved) {
      this.host.show(this, Math.min(drag.time, time), Math.max(drag.time, time));
    } else if (!drag.moved && !drag.range) {
      const rank = this.frame.rank(event.offsetY);
      const index = this.schedule.at(rank, time);
      this.choose(index < 0 ? null : [rank, index]);
    }
  }

  letGo() {
    this.drag = null;
    this.host.range = null;
    this.bars.classList.remove("dragging", "ranging");
    this.host.refresh();
  }

  point(event, time) {
    const { host, frame, schedule } = this;
    const over = event.offsetY < frame.bottom && event.offsetX >= frame.left && time <= schedule.makespan;
    this.bars.style.cursor = event.offsetY >= frame.bottom ? "col-resize" : "";
    host.active = this;
    host.cursor = over ? time : null;
    this.pointed = null;
    if (over) {
      const rank = frame.rank(event.offsetY);
      const index = schedule.at(rank, time);
      if (index >= 0) this.pointed = [rank, index];
      host.showTip(index >= 0 ? describe(schedule, rank, index) : describeIdle(schedule, rank, time), event);
    } else host.hideTip();
    host.refresh();
  }

  moveOverMemory(event) {
    const { host, frame, schedule } = this;
    const time = frame.time(event.offsetX);
    host.active = this;
    if (time < Math.max(frame.from, 0) || time > Math.min(frame.to, schedule.makespan)) return this.leave();
    host.cursor = time;
    const held = schedule.memory.map((_, rank) => [rank, schedule.held(rank, time)]);
    held.sort((a, b) => b[1] - a[1] || a[0] - b[0]);
    const rows = held.slice(0, 8).map(([rank, value]) => [`rank ${rank}`, bytes(value)]);
    if (held.length > 9) rows.push(["least: rank " + held.at(-1)[0], bytes(held.at(-1)[1])]);
    host.showTip({ name: `held at ${milliseconds(time)}`, role: null, rows }, event);
    host.refresh();
    return undefined;
  }

  leave() {
    this.pointed = null;
    this.host.cursor = null;
    this.host.hideTip();
    this.host.refresh();
  }

  // A wheel over a page scrolls it; it zooms where Ctrl is held or the timeline was clicked before.
  wheel(event) {
    const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY);
    const focused = document.activeElement === this.bars;
    if (!sideways && !event.ctrlKey && !event.metaKey && !focused) return;
    event.preventDefault();
    this.host.active = this;
    if (sideways) this.pan(event.deltaX / this.frame.scale);
    else this.zoom(Math.exp(Math.max(-60, Math.min(60, event.deltaY)) * 0.006), this.frame.time(event.offsetX));
  }

  zoom(factor, around = (this.view.from + this.view.to) / 2) {
    const { from, to } = this.view;
    this.host.show(this, around - (around - from) * factor, around + (to - around) * factor);
  }

  pan(by) {
    this.host.show(this, this.view.from + by, this.view.to + by);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const length = this.view.to - this.view.from;
    const sideways = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const actions = {
      "+": () => this.zoom(1 / 1.5, this.middle()),
      "=": () => this.zoom(1 / 1.5, this.middle()),
      "-": () => this.zoom(1.5, this.middle()),
      0: () => this.host.fit(this),
      ArrowLeft: () => (event.shiftKey ? this.pan(-0.2 * length) : this.step(sideways)),
      ArrowRight: () => (event.shiftKey ? this.pan(0.2 * length) : this.step(sideways)),
      ArrowUp: () => this.climb(-1),
      ArrowDown: () => this.climb(1),
      p: () => this.follow(-1),
      n: () => this.follow(1),
      Escape: () => this.choose(null),
    };
    const action = actions[event.key] || actions[event.key.toLowerCase()];
    if (!action) return;
    event.preventDefault();
    this.host.active = this;
    action();
  }

  // Zooming by key keeps the chosen operation in place.
  middle() {
    if (!this.chosen) return undefined;
    const row = this.schedule.rows[this.chosen[0]];
    return (row.start[this.chosen[1]] + row.end[this.chosen[1]]) / 2;
  }

  step(by) {
    if (!this.chosen) return this.climb(0);
    const [rank, index] = this.chosen;
    const next = Math.max(0, Math.min(index + by, this.schedule.rows[rank].length - 1));
    return this.choose([rank, next], true);
  }

  climb(by) {
    const { schedule } = this;
    const time = this.chosen ? this.middle() : this.view.from;
    let rank = this.chosen ? this.chosen[0] + by : 0;
    for (; rank >= 0 && rank < schedule.ranks; rank += by || 1) {
      const index = schedule.nearest(rank, time);
      if (index >= 0) return this.choose([rank, index], true);
    }
    return undefined;
  }

  follow(step) {
    const other = this.chosen && this.schedule.neighbour(...this.chosen, step);
    if (other) this.choose(other, true);
  }

  // Chooses an operation, or none; `reveal` moves it into view.
  choose(place, reveal = false) {
    this.chosen = place;
    if (place && reveal) this.reveal(place);
    this.tell();
    this.host.chose(this);
    this.host.refresh();
  }

  reveal([rank, index]) {
    const row = this.schedule.rows[rank];
    const { from, to } = this.view;
    const [start, end] = [row.start[index], row.end[index]];
    if (start >= from && end <= to) return;
    const length = Math.max(to - from, (end - start) * 1.2);
    this.host.show(this, (start + end - length) / 2, (start + end + length) / 2);
  }

  // Zooms in until an operation can be read.
  focus([rank, index]) {
    const row = this.schedule.rows[rank];
    const [start, end] = [row.start[index], row.end[index]];
    const width = this.bars.clientWidth - 80;
    const length = Math.min(this.view.to - this.view.from, ((end - start || this.host.end / 1e4) * width) / READABLE);
    this.host.show(this, (start + end - length) / 2, (start + end + length) / 2);
  }

  tell() {
    this.details.replaceChildren();
    if (!this.chosen) return;
    const { name, role, rows } = describe(this.schedule, ...this.chosen);
    const add = (text, tag = "span") => {
      const part = document.createElement("span");
      part.append(tag === "b" ? Object.assign(document.createElement("b"), { textContent: text }) : text);
      this.details.append(part);
    };
    add(name, "b");
    add(role.name);
    for (const [what, value] of rows) add(`${what} ${value}`);
  }
}
