// A page of results: tables that sort, boxes that show they scroll, questions to look for. Every text goes in as text, never as markup.
const $ = id => document.getElementById(id);
const make = (tag, text, cls) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (cls) e.className = cls;
  return e;
};

// ---- tables: the head of a column sorts by it, by number where there is one; DataTables' offline bundle outweighs most of these pages

const key = cell => {
  const text = cell.textContent.trim(), x = parseFloat(text.replace('<', ''));
  return [isNaN(x), isNaN(x) ? text : x];
};
const order = (a, b) => {
  const [m, x] = key(a), [n, y] = key(b);
  return m !== n ? m - n : typeof x === 'number' ? x - y : x.localeCompare(y);
};
const sort = head => {
  const body = head.closest('table').tBodies[0], i = head.cellIndex, up = head.getAttribute('aria-sort') !== 'ascending';
  for (const h of head.parentNode.cells) h.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const rows = [...body.rows].sort((a, b) => order(a.cells[i], b.cells[i])*(up ? 1 : -1));
  body.append(...rows);
};
for (const head of document.querySelectorAll('th')) {
  const button = make('button', head.textContent);
  button.type = 'button'; button.onclick = () => sort(head);
  head.replaceChildren(button);
}

// ---- boxes that scroll sideways

for (const box of document.querySelectorAll('.wide')) {
  const mark = () => {
    box.classList.toggle('more', box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
    box.classList.toggle('less', box.scrollLeft > 1);
  };
  box.onscroll = mark;
  new ResizeObserver(() => {
    mark();
    box.previousElementSibling.hidden = box.scrollWidth <= box.clientWidth + 1;
  }).observe(box);
}

// ---- questions; an answer is [arm, seed, text, number, right, NLL, finished]

const browse = data => {
  const group = (xs, k) => xs.reduce((m, x) => m.set(x[k], [...(m.get(x[k]) || []), x]), new Map());
  const several = new Set(data.questions.flatMap(q => q.answers.filter(a => a[1] > 0).map(a => a[0])));
  const label = arm => Object.hasOwn(data.arms, arm) ? data.arms[arm][0] : arm;
  const short = text => text.length > 84 ? text.slice(0, 80) + ' …' : text;
  const mixed = q => new Set(q.answers.map(a => a[4])).size > 1;
  const words = q => [q.id, q.question || '', ...q.answers.map(a => data.texts[a[2]])].join(' ').toLowerCase();
  let at = null;

  const list = () => {
    const set = $('set').value, word = $('find').value.toLowerCase();
    const some = data.questions.filter(q => (!set || q.set === set) && (!$('mixed').checked || mixed(q)) && (!word || words(q).includes(word)));
    $('count').textContent = some.length + ' of ' + data.questions.length;
    $('list').replaceChildren(...some.map(q => {
      const item = make('li'), button = make('button', short(q.question || q.id));
      button.type = 'button'; button.onclick = () => open(q, button);
      if (q === at) button.setAttribute('aria-current', 'true');
      item.append(button);
      return item;
    }));
  };

  const open = (q, button) => {
    at = q;
    for (const x of $('list').querySelectorAll('[aria-current]')) x.removeAttribute('aria-current');
    if (button) {
      button.setAttribute('aria-current', 'true');
      history.replaceState(null, '', '#q=' + encodeURIComponent(q.set + '/' + q.id));
    }
    $('one').replaceChildren(...asked(q), ...[...group(q.answers, 2).values()].map(answered), ...likely(q), ...fired(q));
  };

  const asked = q => {
    const parts = [make('h3', data.sets[q.set] + ', ' + q.id)];
    if (q.question) parts.push(make('p', q.question));
    parts.push(make('p', 'Right answer: ' + q.gold, 'soft'));
    if (q.solution) {
      const solution = make('details');
      solution.append(make('summary', 'gold solution'), make('p', q.solution));
      parts.push(solution);
    }
    return parts;
  };

  const answered = own => {
    const box = make('div', undefined, 'answer'), [, , text, number, right, , finished] = own[0];
    for (const [arm, xs] of group(own, 0)) {
      const seeds = (xs.length > 1 ? ', seeds ' : ', seed ') + xs.map(a => a[1]).join(' ');
      const chip = make('span', label(arm) + (several.has(arm) ? seeds : ''), 'chip');
      chip.style.borderColor = data.arms[arm][1];
      box.append(chip);
    }
    const verdict = right ? 'right' : number === null ? 'no number' : 'wrong: ' + number;
    box.append(make('span', verdict + (finished ? '' : ', cut off'), right ? 'right' : 'wrong'), make('p', data.texts[text]));
    return box;
  };

  const likely = q => {
    const nll = q.answers.filter(a => a[5] !== null), mean = xs => (xs.reduce((x, a) => x + a[5], 0)/xs.length).toFixed(3);
    const said = [...group(nll, 0)].map(([arm, xs]) => label(arm) + ' ' + mean(xs)).join(', ');
    return nll.length ? [make('p', 'NLL of the gold solution, nats per token: ' + said, 'soft')] : [];
  };

  const fired = q => Object.entries(q.fired || {}).map(([arm, top]) => {
    const p = make('p', undefined, 'soft fired');
    const which = top.map(([layer, index, z]) => layer + '.' + index + ' ' + (z > 0 ? '+' : '') + z.toFixed(1)).join(', ');
    p.append(make('b', label(arm)),
      ': selected neurons that fired most on its answer (layer.index, in standard deviations): ' + which);
    return p;
  });

  for (const [set, name] of Object.entries(data.sets)) {
    const option = make('option', name);
    option.value = set;
    $('set').append(option);
  }
  for (const id of ['set', 'find', 'mixed']) $(id).oninput = list;
  list();
  const want = (location.hash.match(/q=(.*)/) || [])[1] || '';
  open(data.questions.find(q => encodeURIComponent(q.set + '/' + q.id) === want) || data.questions[0]);
};

const data = JSON.parse($('data').textContent);
if (data.questions.length) browse(data);
