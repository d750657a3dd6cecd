"use strict";
// What `sft report` lets its page do beside the charts: on paper all that is folded is there.
{
  const { runs } = JSON.parse(document.getElementById("data").textContent);
  const place = document.getElementById("charts");
  if (place !== null) sftCharts(place).show(runs);
  const folded = [...document.querySelectorAll("details:not([open])")];
  addEventListener("beforeprint", () => folded.forEach(one => { one.open = true; }));
  addEventListener("afterprint", () => folded.forEach(one => { one.open = false; }));
}
