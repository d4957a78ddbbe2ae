"use strict";
// Sorting and filtering of the list of slides.
(function () {
  const root = document.documentElement;
  window.addEventListener("error", (event) => { root.dataset.error = String(event.message); });
  const list = document.querySelector("ol.slides");
  if (!list) { root.dataset.ready = "true"; return; }
  const rows = [...list.children];
  const count = document.getElementById("count");
  const orders = {
    suspicion: (a, b) => b.dataset.suspicion - a.dataset.suspicion,
    name: (a, b) => a.dataset.name.localeCompare(b.dataset.name, undefined, { numeric: true }),
  };
  document.getElementById("order").addEventListener("change", (event) => {
    rows.sort(orders[event.target.value]).forEach((row) => list.append(row));
  });
  document.getElementById("filter").addEventListener("input", (event) => {
    const wanted = event.target.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = row.dataset.text.includes(wanted);
      row.classList.toggle("hidden", !fits);
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length} slides`;
  });
  root.dataset.ready = "true";
})();
