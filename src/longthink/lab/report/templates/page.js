"use strict";
(() => {
  const hover = JSON.parse(document.getElementById("hover").textContent);
  const tip = document.getElementById("tip");
  const REACH = 30, GAP = 14;

  // Every point has its text; a horizontal line, which has no points, has one anywhere along it.
  const marksOf = (plot) => [...plot.querySelectorAll("g[id]")].filter((line) => line.id in hover).flatMap((line) => {
    const points = line.querySelectorAll("use");
    return hover[line.id].map((text, i) => ({ text, line, point: points[i] }));
  });
  const distance = ({ point, line }, x, y) => {
    const box = (point || line).getBoundingClientRect();
    if (point) return Math.hypot(box.left + box.width / 2 - x, box.top + box.height / 2 - y);
    return Math.hypot(Math.max(box.left - x, 0, x - box.right), Math.max(box.top - y, 0, y - box.bottom));
  };
  const hide = () => { tip.hidden = true; };
  const show = (marks, x, y) => {
    let nearest = null, least = REACH;
    for (const mark of marks) {
      const away = distance(mark, x, y);
      if (away < least) [nearest, least] = [mark, away];
    }
    tip.hidden = nearest === null;
    if (!nearest) return;
    tip.textContent = nearest.text;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(0, x + GAP + width < innerWidth ? x + GAP : x - GAP - width)}px`;
    tip.style.top = `${Math.max(0, Math.min(y + GAP, innerHeight - height))}px`;
  };
  for (const plot of document.querySelectorAll(".plot")) {
    const marks = marksOf(plot);
    for (const kind of ["pointermove", "pointerdown"]) {
      plot.addEventListener(kind, (event) => show(marks, event.clientX, event.clientY));
    }
    plot.addEventListener("pointerleave", hide);
  }
  addEventListener("scroll", hide, { passive: true });
  document.documentElement.dataset.drawn = "true";
})();
