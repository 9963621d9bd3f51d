'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const touch = matchMedia('(pointer: coarse)');
const narrow = matchMedia('(max-width: 600px)');
const dark = matchMedia('(prefers-color-scheme: dark)');
const OPACITY = 0.6;

// Charts: plotly draws them, the page gives the colours.

function colours(layout) {
  const style = getComputedStyle(document.documentElement);
  const [text, line, raised] = ['--text', '--line', '--raised'].map(
    (name) => style.getPropertyValue(name).trim());
  const patch = {
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    'font.color': text, 'hoverlabel.bgcolor': raised,
    'hoverlabel.bordercolor': line, 'hoverlabel.font.color': text,
  };
  for (const axis of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
    for (const part of ['gridcolor', 'zerolinecolor', 'linecolor']) {
      patch[`${axis}.${part}`] = line;
    }
  }
  return patch;
}

function put(target, path, value) {
  const keys = path.split('.');
  const last = keys.pop();
  for (const key of keys) target = target[key] ??= {};
  target[last] = value;
}

function draw(div) {
  const chart = data.charts[div.dataset.chart];
  const layout = chart.layout;
  for (const [path, value] of Object.entries(colours(layout))) put(layout, path, value);
  const plot = layout.height - 110;
  // Names of stages, those of each run above the others.
  const names = Math.max(0, ...(layout.annotations ?? []).map((one) => one.yshift));
  Object.assign(layout, {
    autosize: true, margin: {l: 56, r: 12, t: 34 + names, b: 60},
    legend: {orientation: 'h', x: 0, y: -48 / plot, yanchor: 'top', traceorder: 'normal'},
    dragmode: touch.matches ? false : 'zoom',
  });
  layout.font.size = narrow.matches ? 11 : 12;
  return Plotly.newPlot(div, chart.data, layout, {
    responsive: true, displaylogo: false,
    displayModeBar: touch.matches ? false : undefined,
  });
}

const charts = [...document.querySelectorAll('.chart')];
charts.forEach(draw);
dark.addEventListener('change', () => charts.forEach(
  (div) => Plotly.relayout(div, colours(div.layout))));
// What was folded away had no width.
for (const details of document.querySelectorAll('details')) {
  details.addEventListener('toggle', () => details.querySelectorAll('.chart').forEach(
    (div) => Plotly.Plots.resize(div)));
}

// Experts over images.

function numbers(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Uint16Array(bytes.buffer);
}

function canvasOf(width, height) {
  const canvas = document.createElement('canvas');
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

function light(image) {
  // Grey and without dark, which would turn orange to brown.
  const canvas = canvasOf(image.naturalWidth, image.naturalHeight);
  const context = canvas.getContext('2d');
  context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const [red, green, blue] = pixels.data.subarray(i, i + 3);
    pixels.data.fill(70 + (red + green + blue) * 185 / 765, i, i + 3);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function tint(map, shown, palette) {
  const canvas = canvasOf(map.width, map.height);
  const context = canvas.getContext('2d');
  const pixels = context.createImageData(map.width, map.height);
  numbers(map.experts).forEach((expert, i) => {
    if (shown.has(expert)) {
      pixels.data.set([...(expert ? palette[expert - 1] : [0, 0, 0]), 255 * OPACITY], 4 * i);
    }
  });
  context.putImageData(pixels, 0, 0);
  return canvas;
}

function load(url) {
  const image = new Image();
  image.src = url;
  return image.decode().then(() => image);
}

function connect(block) {
  const experts = data.experts[block.dataset.experts];
  const slider = block.querySelector('input[type=range]');
  if (!slider) return;
  const boxes = [...block.querySelectorAll('input[type=checkbox]')];
  const canvases = [...block.querySelectorAll('canvas')];
  const classes = block.querySelector('.chart');
  const pictures = [];

  for (const box of boxes) {
    const colour = box.value === '0' ? [0, 0, 0] : experts.colours[box.value - 1];
    box.nextElementSibling.style.background = `rgb(${colour})`;
  }

  function paint() {
    const shown = new Set(boxes.filter((box) => box.checked).map((box) => Number(box.value)));
    pictures.forEach(({image, grey}, i) => {
      const map = experts.overlays[i].maps[slider.value];
      const context = canvases[i].getContext('2d');
      context.imageSmoothingEnabled = false;
      context.drawImage(shown.size ? grey : image, 0, 0);
      context.drawImage(tint(map, shown, experts.colours), 0, 0,
        map.right * canvases[i].width, map.down * canvases[i].height);
    });
  }

  function turn() {
    const layer = experts.layers[slider.value];
    block.querySelector('output').textContent = layer;
    slider.setAttribute('aria-valuetext', layer);
    if (classes) {
      block.querySelector('.current').textContent = layer;
      Plotly.restyle(classes, {visible: experts.layers.map((_, i) => i === Number(slider.value))});
    }
    paint();
  }

  slider.addEventListener('input', turn);
  boxes.forEach((box) => box.addEventListener('change', paint));
  for (const button of block.querySelectorAll('button')) {
    button.addEventListener('click', () => {
      boxes.forEach((box) => { box.checked = Boolean(button.dataset.all); });
      paint();
    });
  }
  return Promise.all(experts.overlays.map((overlay) => load(data.images[overlay.image])))
    .then((images) => {
      images.forEach((image, i) => {
        canvases[i].width = image.naturalWidth;
        canvases[i].height = image.naturalHeight;
        pictures.push({image, grey: light(image)});
      });
      paint();
      block.dataset.ready = 'yes';
    });
}

document.querySelectorAll('.experts').forEach(connect);
