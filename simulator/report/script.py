"""The page's own script: tables sort and are filtered, pictures slide to the original, charts are kept as files,
commands and BibTeX are copied.

It is part of the page and asks nobody for anything; without it the page shows the same.
"""

SCRIPT = """
'use strict';
const figure = cell => {
  const text = cell.dataset.value ?? cell.textContent.trim();
  const found = text.match(/^[-−]?[0-9][0-9,]*[.]?[0-9]*(e[-+]?[0-9]+)?/i);
  return found ? Number(found[0].replaceAll(',', '').replace(/^[-−]/, '-')) : text;
};
for (const table of document.querySelectorAll('table.sortable')) {
  for (const [place, head] of [...table.tHead.rows[0].cells].entries()) {
    const button = document.createElement('button');
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const up = head.ariaSort !== 'ascending';
      for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort');
      head.ariaSort = up ? 'ascending' : 'descending';
      const rows = [...table.tBodies[0].rows].map(row => [figure(row.cells[place]), row]);
      rows.sort(([a], [b]) => (up ? 1 : -1) * (typeof a === typeof b
        ? (typeof a === 'number' ? a - b : a.localeCompare(b)) : typeof a === 'number' ? -1 : 1));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    };
  }
  const lines = [...table.tBodies[0].rows], box = table.closest('.scroll');
  if (lines.length < 6) continue;  /* a screen shows as many */
  const bar = document.createElement('p'), words = document.createElement('input');
  const told = document.createElement('span');
  bar.className = 'filter';
  told.role = 'status';
  Object.assign(words, {type: 'search', placeholder: 'Filter lines', ariaLabel: `Filter ${box.ariaLabel}`});
  words.oninput = () => {
    const asked = words.value.toLowerCase().split(/\s+/);
    for (const line of lines) {
      const text = [...line.cells].map(cell => cell.textContent).join(' ').toLowerCase();
      line.hidden = !asked.every(word => text.includes(word));
    }
    told.textContent = words.value.trim() && `${lines.filter(line => !line.hidden).length} of ${lines.length} lines`;
  };
  bar.append(words, told);
  box.before(bar);
}
for (const box of document.querySelectorAll('.slides')) {
  const slider = document.createElement('input');
  Object.assign(slider, {type: 'range', min: 0, max: 100, value: 0, ariaLabel: 'how much of the original is shown'});
  slider.oninput = () => box.style.setProperty('--shown', slider.value + '%');
  box.after(slider);
}
for (const text of document.querySelectorAll('pre.copied')) {
  const bar = document.createElement('p'), button = document.createElement('button');
  bar.className = 'keep';
  bar.ariaLive = 'polite';
  button.textContent = 'Copy';
  button.onclick = async () => {
    getSelection().selectAllChildren(text);  /* where the clipboard is closed, it is marked */
    await navigator.clipboard?.writeText(text.textContent).then(() => button.textContent = 'Copied', () => {});
  };
  bar.append(button);
  text.after(bar);
}
const keep = (url, name) => Object.assign(document.createElement('a'), {href: url, download: name}).click();
for (const drawn of document.querySelectorAll('.figure svg')) {
  const box = drawn.closest('.figure'), place = [...box.querySelectorAll('svg')].indexOf(drawn);
  const name = box.ariaLabel.replace(/[^a-z0-9]+/gi, '_') + (place ? `_${place + 1}` : '');
  const file = () => {
    const copy = drawn.cloneNode(true), {width, height} = drawn.viewBox.baseVal, look = getComputedStyle(drawn);
    copy.setAttribute('width', width);
    copy.setAttribute('height', height);
    copy.setAttribute('style', `color: ${look.color}; font-family: ${look.fontFamily}; background: ${
      getComputedStyle(document.body).backgroundColor}`);
    const text = new XMLSerializer().serializeToString(copy);
    return ['data:image/svg+xml;charset=utf-8,' + encodeURIComponent(text), width, height];
  };
  const bar = document.createElement('p');
  bar.className = 'keep';
  const made = (textContent, onclick) =>
    bar.append(Object.assign(document.createElement('button'), {textContent, onclick}));
  made('SVG', () => keep(file()[0], name + '.svg'));
  made('PNG', () => {
    const [url, width, height] = file(), image = new Image();
    image.onload = () => {
      const canvas = Object.assign(document.createElement('canvas'), {width: 2 * width, height: 2 * height});
      canvas.getContext('2d').drawImage(image, 0, 0, 2 * width, 2 * height);
      keep(canvas.toDataURL('image/png'), name + '.png');
    };
    image.src = url;
  });
  drawn.after(bar);
}
"""
"""JavaScript, as it stands at the end of the page."""
