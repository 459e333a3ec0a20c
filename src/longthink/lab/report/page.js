"use strict";
(() => {
  const panels = JSON.parse(document.getElementById("panels").textContent);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Text and grid follow the page's colours, in light and in dark.
  const themed = () => {
    const axis = (name) => ({ [`${name}.gridcolor`]: colour("--grid"), [`${name}.linecolor`]: colour("--line") });
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      "font.color": colour("--text"),
      "font.family": "system-ui, sans-serif",
      "font.size": 12,
      "hoverlabel.bgcolor": colour("--card"),
      "hoverlabel.bordercolor": colour("--line"),
      "hoverlabel.font.color": colour("--text"),
      ...axis("xaxis"),
      ...axis("yaxis"),
    };
  };
  const options = { responsive: true, displaylogo: false, displayModeBar: false };

  const draw = async () => {
    for (const [id, panel] of Object.entries(panels)) {
      await Plotly.newPlot(id, panel.data, panel.layout, options);
      await Plotly.relayout(id, themed());
    }
    document.documentElement.dataset.drawn = "true";
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const id of Object.keys(panels)) Plotly.relayout(id, themed());
  });
  draw();
})();
