"use strict";
// The zoomable slide of a report. Everything it shows is in the page; nothing is fetched.
(function () {
  const root = document.documentElement;
  window.addEventListener("error", (event) => { root.dataset.error = String(event.message); });
  const canvas = document.getElementById("slide");
  if (!canvas) { root.dataset.ready = "true"; return; }

  const content = JSON.parse(document.getElementById("content").textContent);
  const picture = document.getElementById("picture");
  const heat = document.getElementById("heat");
  const where = document.getElementById("where");
  const context = canvas.getContext("2d");
  const buttons = [...document.querySelectorAll("button.tile")];
  const kind = document.getElementById("gallery").dataset.kind;
  const kindName = kind[0].toUpperCase() + kind.slice(1);
  const tiles = content.tiles.map((tile, i) => ({ ...tile, image: buttons[i].querySelector("img"), path: null }));
  const state = { scale: 1, x: 0, y: 0, heat: true, marks: true, nuclei: true, strength: 0.75, chosen: -1 };
  let width = 0, height = 0, ratio = 1, waiting = false, printing = false;

  // scale: CSS pixels per level-0 pixel; x, y: the level-0 point in the canvas' corner.
  const fitScale = () => Math.min(width / content.width, height / content.height);
  const em = () => parseFloat(getComputedStyle(root).fontSize); // the reader's letters, also where they are large
  const largest = () => Math.max(2, fitScale() * 4);

  function fit() {
    state.scale = fitScale();
    state.x = (content.width - width / state.scale) / 2;
    state.y = (content.height - height / state.scale) / 2;
    redraw();
  }

  function keepInside() {
    state.scale = Math.min(largest(), Math.max(fitScale() * 0.7, state.scale));
    const margin = 60 / state.scale;
    const most = (length, view) => [Math.min(-margin, (length - view) / 2), Math.max(length - view + margin, (length - view) / 2)];
    const [left, right] = most(content.width, width / state.scale);
    const [top, bottom] = most(content.height, height / state.scale);
    state.x = Math.min(right, Math.max(left, state.x));
    state.y = Math.min(bottom, Math.max(top, state.y));
  }

  function zoom(factor, px = width / 2, py = height / 2) {
    const x = state.x + px / state.scale, y = state.y + py / state.scale;
    state.scale = Math.min(largest(), Math.max(fitScale() * 0.7, state.scale * factor));
    state.x = x - px / state.scale;
    state.y = y - py / state.scale;
    redraw();
  }

  function show(i) {
    const tile = tiles[i];
    state.chosen = i;
    state.scale = Math.min(largest(), 0.6 * Math.min(width, height) / tile.size);
    state.x = tile.x + tile.size / 2 - width / state.scale / 2;
    state.y = tile.y + tile.size / 2 - height / state.scale / 2;
    buttons.forEach((button, k) => {
      button.classList.toggle("chosen", k === i);
      button.setAttribute("aria-pressed", String(k === i));
    });
    where.textContent = `${kindName} ${i + 1}: suspicion ${tile.score.toFixed(2)}, attention ${tile.attention.toFixed(1)} times the mean, ` +
      `at x ${tile.x}, y ${tile.y}`;
    redraw();
  }

  function redraw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  }

  function draw() {
    keepInside();
    const s = state.scale;
    const at = (x, y) => [(x - state.x) * s, (y - state.y) * s];
    canvas.classList.toggle("zoomed", s > fitScale() * 1.05);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = printing ? "#eef1f4" : getComputedStyle(root).getPropertyValue("--glass");
    context.fillRect(0, 0, width, height);
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(picture, ...at(0, 0), content.width * s, content.height * s);
    if (state.heat) {
      context.save();
      context.beginPath();
      context.rect(...at(0, 0), content.width * s, content.height * s);
      context.clip();
      context.globalAlpha = state.strength;
      context.globalCompositeOperation = "multiply"; // what is dark stays dark: nuclei show through
      context.imageSmoothingEnabled = false;
      context.drawImage(heat, ...at(0, 0), heat.naturalWidth * content.cell * s, heat.naturalHeight * content.cell * s);
      context.restore();
    }
    // Where the picture is too coarse the leading tiles are drawn from their own pictures, above the heat.
    const fine = s * content.width / picture.naturalWidth > 1.2;
    for (let i = tiles.length - 1; i >= 0; i--) {
      const tile = tiles[i], [x, y] = at(tile.x, tile.y), side = tile.size * s;
      if (x > width || y > height || x + side < 0 || y + side < 0) continue;
      context.imageSmoothingEnabled = true;
      if (fine && tile.image.complete) context.drawImage(tile.image, x, y, side, side);
      if (fine && state.nuclei) outline(tile, x, y, side);
      if (state.marks) mark(i, x, y, side);
    }
    scaleBar(s);
  }

  function outline(tile, x, y, side) {
    context.save();
    context.translate(x, y);
    const k = side / tile.pixels;
    context.scale(k, k);
    tile.path = tile.path || new Path2D(tile.outline);
    context.lineWidth = 1.6 / k;
    context.strokeStyle = "#00a45c";
    context.stroke(tile.path);
    context.restore();
  }

  function mark(i, x, y, side) {
    const chosen = i === state.chosen;
    context.lineWidth = chosen ? 4 : 2;
    context.strokeStyle = "#fff";
    context.strokeRect(x - 1, y - 1, side + 2, side + 2);
    context.lineWidth = chosen ? 2.5 : 1.2;
    context.strokeStyle = chosen ? "#5b2a86" : "#1d2733";
    context.strokeRect(x - 1, y - 1, side + 2, side + 2);
    const letter = 0.75 * em();
    if (side < 1.3 * letter) return;
    context.font = `600 ${letter}px system-ui, sans-serif`;
    const text = String(i + 1), wide = context.measureText(text).width + 0.8 * letter;
    context.fillStyle = chosen ? "#5b2a86" : "rgb(29 39 51 / 0.8)";
    context.fillRect(x, y, wide, 1.5 * letter);
    context.fillStyle = "#fff";
    context.fillText(text, x + 0.4 * letter, y + 1.1 * letter);
  }

  function scaleBar(s) {
    const micrometre = s / content.mpp, limit = Math.min(220, width / 3) / micrometre;
    const power = 10 ** Math.floor(Math.log10(limit));
    const length = [5, 2, 1].map((step) => step * power).find((value) => value <= limit) || power;
    const bar = length * micrometre, text = length >= 1000 ? `${length / 1000} mm` : `${length} \u00b5m`;
    const letter = 0.8 * em();
    context.font = `${letter}px system-ui, sans-serif`;
    const wide = Math.max(bar, context.measureText(text).width);
    context.fillStyle = "rgb(255 255 255 / 0.85)";
    context.fillRect(10, height - 29 - letter, wide + 20, letter + 21);
    context.fillStyle = "#1d2733";
    context.fillRect(20, height - 18, bar, 4);
    context.fillText(text, 20, height - 24);
  }

  function resize() {
    const box = canvas.parentElement.getBoundingClientRect();
    const before = width ? fitScale() : 0, fitted = !width || Math.abs(state.scale - before) < 1e-9;
    ratio = window.devicePixelRatio || 1;
    // What was in the middle stays there: a phone is turned.
    state.x += (width - box.width) / 2 / state.scale;
    state.y += (height - box.height) / 2 / state.scale;
    width = box.width;
    height = box.height;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    if (fitted) fit(); else redraw();
  }

  // -- pointer, wheel, keys ---------------------------------------------------------------------------------------
  const pointers = new Map();
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, place(event));
    canvas.classList.add("held");
  });
  canvas.addEventListener("pointermove", (event) => {
    const old = pointers.get(event.pointerId);
    if (!old) return;
    const now = place(event);
    if (pointers.size === 2) {
      const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, p]) => p);
      const apart = (a) => Math.hypot(a[0] - other[0], a[1] - other[1]);
      zoom(apart(now) / Math.max(1, apart(old)), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    } else if (pointers.size === 1) {
      state.x -= (now[0] - old[0]) / state.scale;
      state.y -= (now[1] - old[1]) / state.scale;
      redraw();
    }
    pointers.set(event.pointerId, now);
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => {
      pointers.delete(event.pointerId);
      if (!pointers.size) canvas.classList.remove("held");
    });
  }
  canvas.addEventListener("dblclick", (event) => zoom(2, ...place(event)));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)), ...place(event));
  }, { passive: false });

  const toggle = (id, key) => {
    const button = document.getElementById(id);
    button.addEventListener("click", () => {
      state[key] = !state[key];
      button.setAttribute("aria-pressed", String(state[key]));
      if (key === "nuclei") document.getElementById("gallery").classList.toggle("plain", !state.nuclei);
      redraw();
    });
    return button;
  };
  const heatButton = toggle("toggle-heat", "heat");
  toggle("toggle-marks", "marks");
  toggle("toggle-nuclei", "nuclei");
  document.getElementById("strength").addEventListener("input", (event) => {
    state.strength = event.target.value / 100;
    redraw();
  });
  document.getElementById("zoom-in").addEventListener("click", () => zoom(1.6));
  document.getElementById("zoom-out").addEventListener("click", () => zoom(1 / 1.6));
  document.getElementById("zoom-fit").addEventListener("click", fit);
  canvas.addEventListener("keydown", (event) => {
    const step = 80 / state.scale;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (moves[event.key]) {
      state.x += moves[event.key][0];
      state.y += moves[event.key][1];
      redraw();
    } else if (event.key === "+" || event.key === "=") zoom(1.6);
    else if (event.key === "-") zoom(1 / 1.6);
    else if (event.key === "0") fit();
    else if (event.key === "h") heatButton.click();
    else return;
    event.preventDefault();
  });
  buttons.forEach((button, i) => button.addEventListener("click", () => {
    show(i);
    const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    canvas.scrollIntoView({ block: "center", behavior: still ? "auto" : "smooth" });
  }));

  window.addEventListener("beforeprint", () => { printing = true; draw(); });
  window.addEventListener("afterprint", () => { printing = false; draw(); });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  // The choice of a tile is also a link: report.html#tile-3.
  const linked = /^#tile-(\d+)$/.exec(location.hash);
  const start = () => {
    const broken = [picture, heat, ...tiles.map((tile) => tile.image)].filter((image) => !image.naturalWidth);
    if (broken.length) throw new Error(`${broken.length} pictures of the report are damaged`);
    resize();
    draw();
    new ResizeObserver(resize).observe(canvas.parentElement);
    if (linked && tiles[linked[1] - 1]) show(linked[1] - 1);
    root.dataset.ready = "true";
  };
  if (document.readyState === "complete") start(); else window.addEventListener("load", start);
})();
