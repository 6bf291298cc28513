"use strict";
(function () {
  const map = document.getElementById("map");
  const image = map.querySelector("svg.image");
  const width = Number(map.dataset.width), height = Number(map.dataset.height);
  const metres = Number(map.dataset.metres) || 0;
  const scale = map.querySelector(".scale");
  // What is shown: the centre in pixels of the image, and screen pixels per pixel of the image.
  let x = width / 2, y = height / 2, zoom = 1;

  function least() {
    return Math.min(map.clientWidth / width, map.clientHeight / height);
  }

  function show() {
    zoom = Math.min(Math.max(zoom, least()), Math.max(32, least()));
    x = Math.min(Math.max(x, 0), width);
    y = Math.min(Math.max(y, 0), height);
    const w = map.clientWidth / zoom, h = map.clientHeight / zoom;
    image.setAttribute("viewBox", [x - w / 2, y - h / 2, w, h].join(" "));
    if (scale && metres > 0) {
      const most = (metres / zoom) * 140;
      const power = Math.pow(10, Math.floor(Math.log10(most)));
      const length = power * [5, 2, 1].find((step) => step * power <= most * 1.000001);
      scale.querySelector("i").style.width = (length * zoom) / metres + "px";
      scale.querySelector("span").textContent =
        length >= 1000 ? +(length / 1000).toPrecision(6) + " km" : +length.toPrecision(6) + " m";
    }
  }

  function fit(x0, y0, x1, y1, room) {
    x = (x0 + x1) / 2;
    y = (y0 + y1) / 2;
    zoom = room * Math.min(map.clientWidth / (x1 - x0), map.clientHeight / (y1 - y0));
    show();
  }

  function all() {
    fit(0, 0, width, height, 1);
  }

  // Zooms so that the point under (left, top) of the map stays where it is.
  function zoomBy(factor, left, top) {
    const dx = left - map.clientWidth / 2, dy = top - map.clientHeight / 2;
    const before = zoom;
    zoom = Math.min(Math.max(zoom * factor, least()), Math.max(32, least()));
    x += dx / before - dx / zoom;
    y += dy / before - dy / zoom;
    show();
  }

  function zoomMiddle(factor) {
    zoomBy(factor, map.clientWidth / 2, map.clientHeight / 2);
  }

  map.addEventListener("wheel", (event) => {
    event.preventDefault();
    const frame = map.getBoundingClientRect();
    zoomBy(Math.exp(-event.deltaY * 0.0015), event.clientX - frame.left, event.clientY - frame.top);
  }, { passive: false });

  const fingers = new Map();
  map.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    map.setPointerCapture(event.pointerId);
  });
  map.addEventListener("pointermove", (event) => {
    const last = fingers.get(event.pointerId);
    if (!last) return;
    const now = [event.clientX, event.clientY];
    if (fingers.size === 2) {
      const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
      const apart = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]) || 1;
      const frame = map.getBoundingClientRect();
      zoomBy(apart(now) / apart(last), other[0] - frame.left, other[1] - frame.top);
    } else {
      x -= (now[0] - last[0]) / zoom;
      y -= (now[1] - last[1]) / zoom;
      show();
    }
    fingers.set(event.pointerId, now);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    map.addEventListener(end, (event) => fingers.delete(event.pointerId));
  }
  map.addEventListener("dblclick", (event) => {
    const frame = map.getBoundingClientRect();
    zoomBy(2, event.clientX - frame.left, event.clientY - frame.top);
  });

  const step = () => 60 / zoom;
  const keys = {
    ArrowLeft: () => { x -= step(); show(); },
    ArrowRight: () => { x += step(); show(); },
    ArrowUp: () => { y -= step(); show(); },
    ArrowDown: () => { y += step(); show(); },
    "+": () => zoomMiddle(1.4),
    "=": () => zoomMiddle(1.4),
    "-": () => zoomMiddle(1 / 1.4),
    "0": all,
  };
  map.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  document.getElementById("in").addEventListener("click", () => zoomMiddle(1.4));
  document.getElementById("out").addEventListener("click", () => zoomMiddle(1 / 1.4));
  document.getElementById("all").addEventListener("click", all);

  function set(group, on) {
    if (on) group.removeAttribute("display");
    else group.setAttribute("display", "none");
  }

  // Which level and which layers are drawn.
  function draw() {
    const level = document.querySelector("input[name=level]:checked").value;
    for (const group of image.querySelectorAll("g[data-level]")) {
      const layer = document.getElementById("layer-" + group.dataset.layer);
      const on = (level === "all" || level === group.dataset.level) && (!layer || layer.checked);
      // What was not looked at is dark on one level only: on all, everything was.
      set(group, on && !(level === "all" && group.dataset.layer === "dim"));
    }
    for (const group of image.querySelectorAll("g[data-always]")) {
      set(group, document.getElementById("layer-" + group.dataset.layer).checked);
    }
  }
  for (const input of document.querySelectorAll("input")) input.addEventListener("change", draw);
  for (const button of document.querySelectorAll("button[data-box]")) {
    button.addEventListener("click", () => {
      fit(...button.dataset.box.split(" ").map(Number), 0.6);
      map.focus();
      map.scrollIntoView({ block: "nearest" });
    });
  }
  new ResizeObserver(show).observe(map);
  all();
  draw();
})();
