(function () {
  function paint() {
    var ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
    document.querySelectorAll(".js-plotly-plot").forEach(function (plot) {
      Plotly.relayout(plot, {"font.color": ink});
    });
  }
  if (window.Plotly) {
    window.addEventListener("load", paint);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
    window.matchMedia("print").addEventListener("change", paint);
    // paper is narrower than the window: plots keep to its width, and return afterwards
    window.addEventListener("beforeprint", function () { resize(); });
    window.addEventListener("afterprint", function () { resize(); });
  }
  function resize() {
    document.querySelectorAll(".js-plotly-plot").forEach(function (plot) { Plotly.Plots.resize(plot); });
  }
  // paper shows everything
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (fold) { fold.open = true; });
  });
})();
