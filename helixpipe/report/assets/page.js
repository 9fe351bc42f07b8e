// The page: keeps its timelines on one time axis, shows the tooltip, and reads and writes the address.

class Page {
  constructor() {
    const schedules = page.timelines.map((data) => new Schedule(data));
    this.end = Math.max(...schedules.map((schedule) => schedule.makespan));
    let peak = page.limit || 0;
    for (const schedule of schedules) {
      for (const curve of schedule.memory) for (const held of curve.bytes) peak = Math.max(peak, held);
    }
    this.top = (peak || 1) * 1.06;
    this.together = true;
    this.cursor = null;
    this.range = null;
    this.tip = document.getElementById("tip");
    this.panels = schedules.map(
      (schedule, i) => new TimelinePanel(document.getElementById(`timeline-${i + 1}`), schedule, i, this),
    );
    this.active = this.panels[0];
    this.listen();
    readTheme();
    this.readAddress();
    this.refresh();
  }

  listen() {
    document.querySelector(".tools").addEventListener("submit", (event) => event.preventDefault());
    document.querySelector(".buttons").addEventListener("click", (event) => {
      const act = event.target.dataset.act;
      if (act === "fit") this.fit(this.active);
      else if (act) this.active.zoom(act === "in" ? 1 / 1.6 : 1.6, this.active.middle());
    });
    const together = document.getElementById("together");
    this.together = together.checked; // browsers keep it when a page is loaded again
    together.addEventListener("change", () => {
      this.together = together.checked;
      if (this.together) this.show(this.active, this.active.view.from, this.active.view.to);
    });
    const find = document.getElementById("find");
    find.addEventListener("change", () => this.find(find));
    find.addEventListener("input", () => find.removeAttribute("aria-invalid"));
    window.addEventListener("hashchange", () => this.readAddress());
    window.addEventListener("resize", () => this.redraw());
    window.addEventListener("scroll", () => this.refresh(), { passive: true });
    window.addEventListener("beforeprint", () => this.panels.forEach((panel) => panel.draw()));
    const dark = window.matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", () => {
      readTheme();
      this.redraw();
    });
  }

  // Shows a range of times; in all timelines if they zoom together.
  show(panel, from, to) {
    const least = this.end * 1e-7;
    const length = Math.min(Math.max(to - from, least), this.end);
    const middle = (from + to) / 2;
    const start = Math.max(0, Math.min(middle - length / 2, this.end - length));
    for (const each of this.together ? this.panels : [panel]) {
      each.view = { from: start, to: start + length };
      each.stale = true;
    }
    this.refresh();
  }

  fit(panel) {
    this.show(panel, 0, this.end);
  }

  redraw() {
    for (const panel of this.panels) panel.stale = true;
    this.refresh();
  }

  // Draws what is stale and in sight, once per frame of the screen.
  refresh() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      for (const panel of this.panels) {
        const { top, bottom } = panel.section.getBoundingClientRect();
        if (bottom < -200 || top > window.innerHeight + 200) continue;
        if (panel.stale) panel.draw();
        panel.drawOverlay();
      }
    });
  }

  find(input) {
    const name = input.value.trim().toUpperCase();
    if (!name) return;
    const candidates = [this.active, ...this.panels];
    const found = candidates.find((panel) => panel.schedule.place(name));
    if (found) this.go(found, name);
    else this.tellMissing(input.value);
  }

  tellMissing(name) {
    const input = document.getElementById("find");
    input.value = name;
    input.setAttribute("aria-invalid", "true");
  }

  go(panel, name) {
    const place = panel.schedule.place(name);
    this.active = panel;
    panel.focus(place);
    panel.choose(place);
    panel.section.scrollIntoView({ block: "nearest" });
  }

  // #op=3F2&in=2: operation 3F2 of the second timeline.
  readAddress() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const name = wanted.get("op");
    const panel = this.panels[Number(wanted.get("in") || 1) - 1];
    if (!name) return;
    if (panel && panel.schedule.place(name)) this.go(panel, name);
    else this.tellMissing(name);
  }

  chose(panel) {
    const { chosen, schedule, index } = panel;
    const hash = chosen ? `#op=${schedule.name(...chosen)}&in=${index + 1}` : " ";
    try {
      history.replaceState(null, "", hash);
    } catch {
      // Pages in frames without an origin may not touch the address; everything else works there.
    }
  }

  showTip({ name, role, rows }, event) {
    const { tip } = this;
    const heading = document.createElement("b");
    if (role) {
      const swatch = document.createElement("i");
      swatch.className = "swatch";
      swatch.style.background = role.fill;
      heading.append(swatch);
    }
    heading.append(name);
    if (role) heading.append(Object.assign(document.createElement("em"), { textContent: role.name }));
    const list = document.createElement("dl");
    for (const [what, value] of rows) {
      list.append(Object.assign(document.createElement("dt"), { textContent: what }));
      list.append(Object.assign(document.createElement("dd"), { textContent: value }));
    }
    tip.replaceChildren(heading, list);
    tip.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = tip;
    const right = event.clientX + 16 + width > window.innerWidth - 8;
    const x = right ? event.clientX - width - 14 : event.clientX + 16;
    const below = event.clientY + 18 + height <= window.innerHeight - 8;
    const y = below ? event.clientY + 18 : event.clientY - height - 12;
    tip.style.transform = `translate(${Math.max(8, x)}px, ${Math.max(8, y)}px)`;
  }

  hideTip() {
    this.tip.hidden = true;
  }
}

new Page();
