// Answers at several strengths of a set of neurons. Every text goes in as text, never as markup.
const $ = id => document.getElementById(id);
const data = JSON.parse($('data').textContent);
const sets = Object.keys(data.answers);
const unchanged = data.strengths.findIndex(s => s[0] === 1);
const make = (tag, text) => {
  const e = document.createElement(tag);
  e.textContent = text;
  return e;
};

// ---- choices: radio buttons, so that arrow keys and screen readers work without any help

const radios = (id, words, chosen) => words.forEach((word, i) => {
  const label = make('label', ' ' + word), input = document.createElement('input');
  Object.assign(input, {type: 'radio', name: id, value: i, checked: i === chosen});
  label.prepend(input);
  $(id).append(label);
});
const chosen = id => Number(document.querySelector('input[name=' + id + ']:checked').value);

// ---- an answer: its tokens, coloured by the set's read-out, in standard deviations from the mean token of the unchanged model's answers

const color = x => 'rgba(' + (x > 0 ? '213,94,0' : '0,114,178') + ',' + (.2*Math.min(3, Math.abs(x))).toFixed(2) + ')';
const spreads = x => {
  const y = Math.round(100*x)/100;                              // no minus before 0.00
  return (y < 0 ? '\u2212' : '+') + Math.abs(y).toFixed(2) + ' standard deviations';
};
const upper = text => text[0].toUpperCase() + text.slice(1);
const mean = xs => xs.reduce((a, x) => a + x, 0)/Math.max(1, xs.length);

const show = () => {
  const set = sets[chosen('set')], at = chosen('strength'), q = Number($('question').value);
  const answer = data.answers[set][at][q], plain = unchanged < 0 ? answer : data.answers[set][unchanged][q];
  const gold = data.questions[q].answer;
  const known = answer.right !== null;                          // a question may have no answer
  $('verdict').textContent = upper(data.strengths[at][1]) +
    (known ? ': ' + (answer.right ? 'right, ' + gold : 'wrong, ' + gold + ' is right') : '');
  $('asked').textContent = data.questions[q].question;
  $('verdict').className = !known ? '' : answer.right ? 'right' : 'wrong';
  $('answer').replaceChildren(...answer.tokens.map((t, i) => {
    const span = make('span', t);
    span.title = spreads(answer.readout[i]);
    span.style.background = color(answer.readout[i]);
    return span;
  }));
  const same = answer.tokens.join('') === plain.tokens.join('');
  $('before').textContent = 'Mean read-out: ' + spreads(mean(answer.readout)) + '. ' +
    (at === unchanged ? 'The model is unchanged.' : same ? 'The unchanged model writes the same.'
      : 'The unchanged model writes: ' + plain.tokens.join(''));
  for (const box of document.querySelectorAll('[data-set]')) box.hidden = box.dataset.set !== set;
  history.replaceState(null, '', '#' + [chosen('set'), at, q].join('.'));
};

const [set, strength, question] = (location.hash.match(/^#(\d+)\.(\d+)\.(\d+)$/) || ['', 0, unchanged, 0]).slice(1).map(Number);
radios('set', sets, Math.min(set, sets.length - 1));
radios('strength', data.strengths.map(s => s[1]), Math.min(Math.max(0, strength), data.strengths.length - 1));
data.questions.forEach((q, i) => $('question').append(Object.assign(make('option', q.question), {value: i})));
$('question').value = Math.min(question, data.questions.length - 1);
for (const e of document.querySelectorAll('#choices input, #choices select')) e.oninput = show;
show();
