"use strict";
const charts = JSON.parse(document.getElementById("data").textContent).charts;
const tip = document.getElementById("tip");

function short(value) {
  return value === null ? "none" : Number(value.toPrecision(4)).toLocaleString("en");
}

function ofTime(chart, strip, share) {
  const found = chart.strips[strip];
  const count = found.series[0].mean.length;
  const bin = Math.min(count - 1, Math.floor(share * count));
  const lines = found.series.map(({ name, low, mean, high }) => {
    if (mean[bin] === null) return `${name}: no step`;
    const range = low[bin] === high[bin] ? "" : ` (${short(low[bin])} to ${short(high[bin])})`;
    return `${name}: ${short(mean[bin])}${range}`;
  });
  return [`${found.label}, at ${short((bin * chart.span_s) / count)} s`, ...lines].join("\n");
}

function ofHistogram(chart, share) {
  const bin = Math.min(chart.counts.length - 1, Math.floor(share * chart.counts.length));
  const range = `${short(chart.edges[bin])} to ${short(chart.edges[bin + 1])} ms`;
  return `${range}\n${chart.counts[bin].toLocaleString("en")} ${chart.counted}`;
}

function show(event, chart, strip, plot) {
  const box = plot.getBoundingClientRect();
  const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
  tip.textContent = chart.kind === "time" ? ofTime(chart, strip, share) : ofHistogram(chart, share);
  tip.hidden = false;
  const left = event.clientX + 14 + tip.offsetWidth > innerWidth;
  tip.style.left = `${Math.max(4, event.clientX + (left ? -14 - tip.offsetWidth : 14))}px`;
  tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 12)}px`;
}

for (const figure of document.querySelectorAll("figure")) {
  const chart = charts[figure.id];
  figure.querySelectorAll(".plot").forEach((plot, strip) => {
    plot.addEventListener("pointermove", (event) => show(event, chart, strip, plot));
    plot.addEventListener("pointerleave", () => { tip.hidden = true; });
  });
}

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});

const choice = document.getElementById("run");
if (choice) {
  const choose = () => {
    for (const run of document.querySelectorAll(".run")) run.hidden = run.id !== choice.value;
  };
  choice.addEventListener("change", choose);
  choose();
}
