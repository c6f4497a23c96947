// Draws each chart from the JSON beside it, in the colours of the page's style.
const dark = matchMedia("(prefers-color-scheme: dark)");
const fingers = matchMedia("(pointer: coarse)").matches;

function look() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, automargin: true, title: { standoff: 8 } };
  return {
    layout: {
      font: { color: colour("ink"), family: style.getPropertyValue("font-family") || "sans-serif", size: 12 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 8, r: 12, t: 8, b: 8 },
      xaxis: axis,
      yaxis: { ...axis, hoverformat: ".5~g" },
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") }, namelength: 28 },
      hovermode: "x unified",
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("muted"), activecolor: colour("ink") },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11 }, maxheight: 400 },
      dragmode: fingers ? false : "zoom", // a finger scrolls the page
    },
  };
}

const settings = {
  responsive: true,
  displaylogo: false,
  displayModeBar: fingers ? false : "hover",
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};

// A chart of many lines grows by its legend's further rows, so that its lines keep their room.
function grow(chart) {
  const more = (chart._fullLayout.legend?._effHeight ?? 0) - 40;
  if (more > 0) {
    chart.style.height = `${chart.clientHeight + more}px`;
    Plotly.Plots.resize(chart);
  }
}

const charts = [...document.querySelectorAll(".chart")];
for (const chart of charts) {
  const { data, layout } = JSON.parse(chart.nextElementSibling.textContent);
  Plotly.newPlot(chart, data, { ...layout, template: look() }, settings);
  grow(chart);
}
dark.addEventListener("change", () => charts.forEach((chart) => Plotly.relayout(chart, { template: look() })));
