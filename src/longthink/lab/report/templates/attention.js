"use strict";
(() => {
  const { traces, rules } = JSON.parse(document.getElementById("attention").textContent);
  const KINDS = ["lazy", "sink", "local", "phoenix", "milestone"];
  const $ = (id) => document.getElementById(id);
  const make = (name, text, attributes = {}) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const unpack = (text, Kind) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Kind(bytes.buffer);
  };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const counted = (count, name) => `${count} ${name}${count === 1 ? "" : "s"}`;
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  const [map, over, curve] = ["map", "over", "curve"].map($);

  let trace, replay = null, onlyMap = -1, held = -1, shown = -1, view, colours = {};

  // A trace's uses, sorted by page too, and the strongest class of every page.
  const prepare = (raw) => {
    if (raw.ready) return raw;
    const uses = { step: unpack(raw.uses.step, Uint32Array), page: unpack(raw.uses.page, Uint32Array),
      map: unpack(raw.uses.map, Uint16Array), kind: unpack(raw.uses.kind, Uint8Array), mass: unpack(raw.uses.mass, Uint8Array) };
    const pages = raw.texts.length, begin = new Uint32Array(pages + 1), count = uses.step.length;
    for (let i = 0; i < count; i++) begin[uses.page[i] + 1]++;
    for (let p = 0; p < pages; p++) begin[p + 1] += begin[p];
    const next = begin.slice(), order = new Uint32Array(count), kinds = new Uint8Array(pages);
    for (let i = 0; i < count; i++) {
      const page = uses.page[i];
      order[next[page]++] = i;
      kinds[page] = Math.max(kinds[page], uses.kind[i]);
    }
    for (const one of raw.replays) {
      one.gone = unpack(one.gone, Uint32Array);
      // When the first and the last table let a page go; 0 for never.
      one.first = new Uint32Array(pages);
      one.last = new Uint32Array(pages);
      for (let p = 0; p < pages; p++) {
        let first = Infinity, last = 0, held = false;
        for (let t = 0; t < one.tables; t++) {
          const gone = one.gone[t * pages + p] || 0;
          if (gone) { first = Math.min(first, gone); last = Math.max(last, gone); } else held = true;
        }
        one.first[p] = first === Infinity ? 0 : first;
        one.last[p] = held ? 0 : last;
      }
    }
    return Object.assign(raw, { ready: true, uses, begin, order, kinds, image: new Set(raw.image) });
  };
  const birth = (page) => Math.max(page * trace.size, trace.prompt);
  // Tables follow each other as the maps that read through them do.
  const goneFrom = (page, index) => {
    if (!replay) return 0;
    const table = Math.floor((index * replay.tables) / trace.maps.length);
    return replay.gone[table * trace.texts.length + page] || 0;
  };
  const gone = (page) => (!replay ? [0, 0] : onlyMap < 0 ? [replay.first[page], replay.last[page]] : Array(2).fill(goneFrom(page, onlyMap)));
  const usesOf = function* (page) {
    for (let k = trace.begin[page]; k < trace.begin[page + 1]; k++) {
      const i = trace.order[k];
      if (onlyMap < 0 || trace.uses.map[i] === onlyMap) yield i;
    }
  };

  // Drawing -----------------------------------------------------------------------------------------------------
  const fit = (canvas) => {
    const ratio = window.devicePixelRatio || 1, { clientWidth: width, clientHeight: height } = canvas;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    return { pen, width, height };
  };
  const LEFT = 40, BOTTOM = 22;
  const scales = (width, height) => {
    const wide = (width - LEFT) / (view.x1 - view.x0), high = (height - BOTTOM) / (view.y1 - view.y0);
    return { wide, high, x: (step) => LEFT + (step - view.x0) * wide, y: (page) => (page - view.y0) * high };
  };
  const ticks = (from, to) => {
    const rough = (to - from) / 6, power = 10 ** Math.floor(Math.log10(Math.max(rough, 1)));
    const by = Math.max(1, [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough) || 1), found = [];
    for (let at = Math.ceil(from / by) * by; at <= to; at += by) found.push(at);
    return found;
  };
  const drawAxes = (pen, at, width, height) => {
    pen.fillStyle = colours.card;
    pen.fillRect(0, 0, LEFT, height);
    pen.fillRect(0, height - BOTTOM, width, BOTTOM);
    pen.fillStyle = colours.quiet;
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "right";
    for (const page of ticks(view.y0, view.y1)) {
      if (at.y(page) < height - BOTTOM - 4) pen.fillText(String(page * trace.size), LEFT - 5, Math.max(10, at.y(page) + 4));
    }
    pen.textAlign = "center";
    for (const step of ticks(view.x0, view.x1)) pen.fillText(String(step), Math.min(width - 14, at.x(step)), height - 7);
  };
  const drawMap = () => {
    const { pen, width, height } = fit(map), at = scales(width, height), tall = Math.max(at.high, 1);
    const first = Math.max(0, Math.floor(view.y0)), last = Math.min(trace.texts.length - 1, Math.ceil(view.y1));
    // Two rows for a pixel are enough, where there are more.
    const stride = Math.max(1, Math.floor(0.5 / at.high));
    for (let page = first; page <= last; page += stride) {
      const from = at.x(birth(page));
      pen.fillStyle = page * trace.size < trace.prompt ? colours.prompt : colours.held;
      // Held by some table, then by all.
      for (const [end, alpha] of [[gone(page)[1], 0.45], [gone(page)[0], 1]]) {
        pen.globalAlpha = alpha;
        pen.fillRect(from, at.y(page), at.x(end ? Math.min(end, view.x1) : view.x1) - from, tall);
      }
    }
    pen.globalAlpha = 1;
    // Near uses first, so that what is read from far stands on top.
    const { step, page, kind } = trace.uses, dot = Math.max(1.6, Math.min(5, at.wide, at.high));
    const layers = [[], [], [], [], [], []];
    for (let i = 0; i < step.length; i++) {
      const x = step[i], y = page[i];
      if (x < view.x0 || x > view.x1 || y < view.y0 || y > view.y1 || (onlyMap >= 0 && trace.uses.map[i] !== onlyMap)) continue;
      const end = goneFrom(y, trace.uses.map[i]);
      layers[end && x >= end ? 5 : kind[i]].push(at.x(x), at.y(y));
    }
    for (const [kindIndex, name] of [...KINDS, "lost"].entries()) {
      pen.fillStyle = colours[name];
      const points = layers[kindIndex], wide = kindIndex > 2 ? dot + 0.8 : dot;
      for (let i = 0; i < points.length; i += 2) pen.fillRect(points[i] - wide / 2, points[i + 1] - wide / 2, wide, wide);
    }
    drawAxes(pen, at, width, height);
  };
  const drawCurve = () => {
    const { pen, width, height } = fit(curve), low = 0, foot = 4;
    const up = (share) => foot + (1 - (share - low) / (1 - low)) * (height - 2 * foot);
    pen.font = "11px system-ui, sans-serif";
    pen.textAlign = "right";
    for (const share of [0, 0.5, 1]) {
      pen.fillStyle = colours.grid;
      pen.fillRect(LEFT, up(share), width - LEFT, 1);
      pen.fillStyle = colours.quiet;
      pen.fillText(`${100 * share}%`, LEFT - 5, Math.min(height - 2, up(share) + 8));
    }
    const line = (points, stroke, dash) => {
      pen.strokeStyle = stroke;
      pen.setLineDash(dash);
      pen.lineWidth = 1.6;
      pen.beginPath();
      points.forEach((share, i) => {
        const step = trace.prompt + ((i + 0.5) / points.length) * (trace.end - trace.prompt);
        const x = LEFT + ((step - view.x0) / (view.x1 - view.x0)) * (width - LEFT);
        if (x >= LEFT) pen.lineTo(x, up(share));
      });
      pen.stroke();
      pen.setLineDash([]);
    };
    const best = replay && trace.replays.find((one) => one.label === replay.label.replace(/^.*(, (decode )?budget \d+)$/, "optimum$1"));
    if (best) line(best.curve, colours.quiet, [3, 3]);
    if (replay) line(replay.curve, colours.milestone, []);
    $("curve-note").textContent = replay
      ? `Recall over time${best && best !== replay ? "; dashed: the clairvoyant optimum at the same budget" : ""}.`
      : trace.replays.length ? "Choose a policy to see its recall over time." : "No policy was replayed on this trace: longthink what-if does that.";
  };
  const drawOver = () => {
    const { pen, width, height } = fit(over);
    if (shown < 0) return;
    const at = scales(width, height), y = at.y(shown) + Math.max(at.high, 1) / 2;
    const ends = gone(shown).filter(Boolean);
    pen.strokeStyle = colours.focus;
    pen.lineWidth = 1;
    pen.beginPath();
    pen.moveTo(Math.max(LEFT, at.x(birth(shown))), y);
    pen.lineTo(Math.min(width, at.x(trace.end)), y);
    pen.stroke();
    for (const i of usesOf(shown)) {
      const step = trace.uses.step[i], end = goneFrom(shown, trace.uses.map[i]);
      pen.fillStyle = end && step >= end ? colours.lost : colours[KINDS[trace.uses.kind[i]]];
      pen.beginPath();
      pen.arc(at.x(step), y, 4, 0, 7);
      pen.fill();
      pen.stroke();
    }
    pen.fillStyle = colours.lost;
    for (const end of ends) pen.fillRect(at.x(end) - 1, y - 7, 2, 14);
  };
  const draw = () => { drawMap(); drawCurve(); drawOver(); };

  // Text, detail, grid --------------------------------------------------------------------------------------------
  let spans = [], marked = [];
  const layText = () => {
    const box = $("text"), parts = document.createDocumentFragment(), prompt = Math.ceil(trace.prompt / trace.size);
    parts.append(make("span", "prompt", { class: "end" }));
    spans = trace.texts.map((text, page) => {
      const span = make("span", text, { class: "tok", "data-page": page, "data-kind": KINDS[trace.kinds[page]] });
      if (trace.image.has(page)) span.setAttribute("data-image", "");
      if (page === prompt) parts.append(make("span", "generated", { class: "end" }));
      parts.append(span);
      if (trace.spaced) parts.append(" ");
      return span;
    });
    box.replaceChildren(parts);
    box.scrollTop = 0;
  };
  const headName = (index) => `layer ${Math.floor(index / trace.heads)} head ${index % trace.heads}`;
  const cellOf = (index) => $("grid").querySelector(`[data-map="${index}"]`);
  const show = (page, scroll) => {
    if (page === shown) return;
    shown = page;
    for (const element of marked) element.classList.remove("now", "reader", "reads");
    marked = [];
    const mark = (element, name) => {
      if (element) { element.classList.add(name); marked.push(element); }
    };
    const box = $("detail");
    if (page < 0) {
      box.replaceChildren(make("p", "Move over a token to see when it is read, and by which heads.", { class: "quiet" }));
      drawOver();
      return;
    }
    const { uses } = trace, found = [...usesOf(page)], [first, last] = gone(page);
    const heads = new Set(found.map((i) => uses.map[i]));
    mark(spans[page], "now");
    for (const i of found) {
      const reader = Math.floor(uses.step[i] / trace.size);
      if (reader !== page) mark(spans[reader], "reader");
    }
    heads.forEach((index) => mark(cellOf(index), "reads"));
    if (scroll && spans[page]) {
      const text = $("text");
      text.scrollTop = spans[page].offsetTop - text.clientHeight / 2;
    }
    const title = make("h4");
    title.append(make("code", trace.texts[page]), ` position ${page * trace.size}`);
    const part = trace.image.has(page) ? "image" : page * trace.size < trace.prompt ? "prompt" : "generated";
    const kind = found.length ? KINDS[Math.max(...found.map((i) => uses.kind[i]))] : "lazy";
    const story = [part, kind, `${counted(found.length, "use")} by ${counted(heads.size, "head")}`];
    if (replay) {
      story.push(!first ? "held to the end" : last === first ? `evicted in step ${first}`
        : `evicted by some heads from step ${first}${last ? `, by all in step ${last}` : ""}`);
    }
    const table = make("table"), rows = make("tbody");
    rows.append(rowOf("th", ["step", "after", "written there", "by", "attention"]));
    for (const i of found.slice(0, 60)) {
      const step = uses.step[i], reader = Math.floor(step / trace.size);
      rows.append(rowOf("td", [step, step - birth(page), trace.texts[reader] ?? "", headName(uses.map[i]), percent(uses.mass[i] / 255)]));
    }
    table.append(rows);
    box.replaceChildren(title, make("p", story.join(" · "), { class: "quiet" }), ...(found.length ? [table] : []));
    if (found.length > 60) box.append(make("p", `and ${found.length - 60} more`, { class: "quiet" }));
    drawOver();
  };
  const rowOf = (name, cells) => {
    const row = make("tr");
    row.append(...cells.map((cell) => make(name, String(cell))));
    return row;
  };
  // A cell shows what its head reads, as stripes.
  const stripes = (shares) => {
    let from = 0;
    const parts = ["sink-like", "milestone", "phoenix"].map((name, i) => {
      const part = `var(--${name}) ${from}% ${from + 100 * shares[i]}%`;
      from += 100 * shares[i];
      return part;
    });
    return `linear-gradient(90deg, ${parts.join(", ")}, var(--mixed) ${from}% 100%)`;
  };
  const layGrid = () => {
    const grid = $("grid");
    grid.style.gridTemplateColumns = `auto repeat(${trace.heads}, minmax(14px, 1fr))`;
    grid.replaceChildren(make("span", "layer"), ...Array.from({ length: trace.heads }, (_, head) => make("span", head, { style: "text-align:center" })));
    trace.maps.forEach((one, index) => {
      if (index % trace.heads === 0) grid.append(make("span", index / trace.heads));
      const shares = ["sink-like", "milestone", "phoenix"].map((name, i) => `${name} ${percent(one.shares[i])}`).join(", ");
      grid.append(make("button", undefined, { type: "button", "data-map": index, "aria-pressed": index === onlyMap,
        title: `${headName(index)}: ${one.kind} (${shares})`, "aria-label": `${headName(index)}: ${one.kind}`,
        style: `background: ${stripes(one.shares)}` }));
    });
  };

  // Choices ---------------------------------------------------------------------------------------------------------
  const options = (select, names, chosen) => {
    select.replaceChildren(...names.map(([value, name]) => make("option", name, { value })));
    select.value = chosen;
  };
  const pickMap = (index) => {
    onlyMap = index;
    $("pick-map").value = String(index);
    for (const cell of $("grid").querySelectorAll("button")) cell.setAttribute("aria-pressed", Number(cell.dataset.map) === index);
    const page = shown;
    shown = -2;
    show(page, false);
    draw();
  };
  const pickPolicy = (index) => {
    replay = trace.replays[index] || null;
    $("policy-facts").textContent = replay
      ? [`recall ${percent(replay.recall)}`, ...(replay.lookups === null ? [] : [`look-ups ${percent(replay.lookups)}`]),
        `${replay.evictions} evicted`, `${replay.regrets} of them used later`].join(" · ")
      : "";
    const page = shown;
    shown = -2;
    show(page, false);
    draw();
  };
  const pickTrace = (index) => {
    trace = prepare(traces[index]);
    held = -1; shown = -2; onlyMap = -1;
    view = whole();
    options($("pick-policy"), [[-1, "everything kept"], ...trace.replays.map((one, i) => [i, one.label])], trace.replays.length ? 0 : -1);
    options($("pick-map"), [[-1, "all heads"], ...trace.maps.map((_, i) => [i, headName(i)])], -1);
    layText();
    layGrid();
    show(-1, false);
    pickPolicy(trace.replays.length ? 0 : -1);
  };
  const whole = () => ({ x0: trace.prompt, x1: trace.end, y0: 0, y1: trace.texts.length });
  const refresh = () => {
    colours = Object.fromEntries([...KINDS, "lost", "held", "prompt", "focus", "card", "quiet", "grid"].map((name) => [name, colour(name)]));
    draw();
  };

  // Pointer -----------------------------------------------------------------------------------------------------------
  let dragged = null;
  const place = (event) => {
    const box = map.getBoundingClientRect(), at = scales(box.width, box.height);
    const x = view.x0 + (event.clientX - box.left - LEFT) / at.wide, y = view.y0 + (event.clientY - box.top) / at.high;
    return { x: Math.min(view.x1, Math.max(view.x0, x)), y: Math.min(view.y1, Math.max(view.y0, y)) };
  };
  const pageAt = (event) => Math.min(trace.texts.length - 1, Math.floor(place(event).y));
  map.addEventListener("mousemove", (event) => {
    if (held < 0) show(pageAt(event), true);
    if (dragged) {
      const { pen, width, height } = fit(over), at = scales(width, height), to = place(event);
      pen.strokeStyle = colours.focus;
      pen.strokeRect(at.x(dragged.x), at.y(dragged.y), at.x(to.x) - at.x(dragged.x), at.y(to.y) - at.y(dragged.y));
    }
  });
  map.addEventListener("mousedown", (event) => { dragged = place(event); });
  map.addEventListener("mouseup", (event) => {
    const from = dragged, to = place(event);
    dragged = null;
    if (!from) return;
    const [x0, x1] = [from.x, to.x].sort((a, b) => a - b), [y0, y1] = [from.y, to.y].sort((a, b) => a - b);
    if (x1 - x0 < 0.02 * (view.x1 - view.x0) || y1 - y0 < 0.02 * (view.y1 - view.y0)) {
      held = held < 0 ? pageAt(event) : -1;
      show(pageAt(event), true);
      $("text").focus({ preventScroll: true });
      return;
    }
    view = { x0, x1, y0, y1 };
    draw();
  });
  map.addEventListener("mouseleave", () => { dragged = null; if (held < 0) show(-1, false); });
  map.addEventListener("dblclick", () => { view = whole(); held = -1; draw(); });
  const pageOf = (event) => (event.target.dataset.page === undefined ? -1 : Number(event.target.dataset.page));
  $("text").addEventListener("mouseover", (event) => { if (held < 0 && pageOf(event) >= 0) show(pageOf(event), false); });
  $("text").addEventListener("click", (event) => { held = held < 0 ? pageOf(event) : -1; if (pageOf(event) >= 0) show(pageOf(event), false); });
  $("lives").addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") held = -1;
    if (!by || shown < 0 || event.target.tagName === "SELECT") return;
    event.preventDefault();
    held = Math.min(trace.texts.length - 1, Math.max(0, shown + by));
    show(held, true);
  });
  $("grid").addEventListener("click", (event) => {
    const index = event.target.dataset.map;
    if (index !== undefined) pickMap(Number(index) === onlyMap ? -1 : Number(index));
  });
  $("save-map").addEventListener("click", () => {
    const sheet = make("canvas", undefined, { width: map.width, height: map.height + curve.height }), pen = sheet.getContext("2d");
    pen.fillStyle = colours.card;
    pen.fillRect(0, 0, sheet.width, sheet.height);
    pen.drawImage(map, 0, 0);
    pen.drawImage(curve, 0, map.height);
    make("a", undefined, { href: sheet.toDataURL(), download: "page-lives.png" }).click();
  });
  $("pick-trace").addEventListener("change", (event) => pickTrace(Number(event.target.value)));
  $("pick-policy").addEventListener("change", (event) => pickPolicy(Number(event.target.value)));
  $("pick-map").addEventListener("change", (event) => pickMap(Number(event.target.value)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refresh);
  new ResizeObserver(refresh).observe($("stack"));

  const legend = (id, names) => $(id).append(...names.map(([name, text]) => {
    const item = make("li");
    item.append(make("span", undefined, { class: "key", style: `background: var(--${name})` }), make("span", text));
    return item;
  }));
  legend("kinds", [["milestone", "milestone"], ["phoenix", "phoenix"], ["sink", "sink"], ["local", `local (within ${rules.local} tokens)`],
    ["lost", "used after eviction"], ["held", "held"], ["prompt", "held, prompt"]]);
  legend("map-kinds", [["milestone", "milestone"], ["phoenix", "phoenix"], ["sink-like", "sink-like, local"], ["mixed", "nothing for certain"]]);
  options($("pick-trace"), traces.map((one, i) => [i, one.name]), 0);
  colours = Object.fromEntries([...KINDS, "lost", "held", "prompt", "focus", "card", "quiet", "grid"].map((name) => [name, colour(name)]));
  pickTrace(0);
  document.documentElement.dataset.attention = "true";
})();
