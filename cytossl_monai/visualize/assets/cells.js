"use strict";
// Cells by likeness: inner products of compact features.
(function () {
  const root = document.documentElement;
  window.addEventListener("error", (event) => { root.dataset.error = String(event.message); });
  const content = JSON.parse(document.getElementById("content").textContent);
  const bytes = Uint8Array.from(atob(content.features), (letter) => letter.charCodeAt(0));
  const features = new Int8Array(bytes.buffer);
  const list = document.getElementById("cells");
  const said = document.getElementById("said");
  const { width, side, across, sheet, places } = content;
  const cells = places.map(([x, y], number) => {
    const cell = document.createElement("button");
    const at = number % sheet;
    cell.type = "button";
    cell.className = `cell s${Math.floor(number / sheet)}`;
    cell.style.backgroundPosition = `${-(at % across) * side}px ${-Math.floor(at / across) * side}px`;
    cell.title = `x ${x}, y ${y}`;
    cell.setAttribute("aria-label", `cell at x ${x}, y ${y}`);
    cell.addEventListener("click", () => search(number));
    return cell;
  });
  function likeness(one, other) {
    let sum = 0;
    for (let i = 0; i < width; i += 1) sum += features[one * width + i] * features[other * width + i];
    return sum / (127 * 127);
  }
  function show(order, chosen) {
    cells.forEach((cell, number) => cell.setAttribute("aria-pressed", String(number === chosen)));
    list.replaceChildren(...order.map((number) => cells[number]));
  }
  function search(chosen) {
    const values = cells.map((_, number) => (number === chosen ? Infinity : likeness(chosen, number)));
    const order = cells.map((_, number) => number).sort((a, b) => values[b] - values[a]);
    show(order, chosen);
    said.textContent = `Most like the cell at x ${places[chosen][0]}, y ${places[chosen][1]} (level-0 pixels)`;
    root.dataset.order = order.slice(0, 10).join(" ");
    window.scrollTo(0, 0);
  }
  const natural = cells.map((_, number) => number);
  document.getElementById("reset").addEventListener("click", () => {
    show(natural, -1);
    said.textContent = "Click a cell: those most like it come first.";
  });
  document.getElementById("place").addEventListener("change", (event) => {
    const numbers = event.target.value.match(/\d+(\.\d+)?/g);
    if (!numbers || numbers.length < 2) { said.textContent = "Give two numbers: x, y"; return; }
    const distance = ([x, y]) => Math.hypot(x - numbers[0], y - numbers[1]);
    search(natural.reduce((best, number) => (distance(places[number]) < distance(places[best]) ? number : best), 0));
  });
  show(natural, -1);
  root.dataset.ready = "true";
})();
