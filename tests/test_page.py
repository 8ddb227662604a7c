"The page of a run: escaped, whole, and alive in a browser."
import html, json, os, re, shutil
from pathlib import Path
import pandas as pd
import pytest
from conftest import ROOT
from yfpo.lab.page import browser_data, card_html, figure_html, page_html, table_html, write_page
from yfpo.data.files import read_jsonl
from yfpo.lab.report import WORDS, findings, read_results

RESULTS = ROOT/'nbs'/'paper'/'results'
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)

def test_every_answer_is_there_once():
    data = browser_data(RESULTS/'cpu')
    rows = [r for f in (RESULTS/'cpu'/'samples').glob('*.jsonl') for r in read_jsonl(f) if 'text' in r]
    assert len(set(data['texts'])) == len(data['texts']) and sum(len(q['answers']) for q in data['questions']) == len(rows)
    by = {(q['set'], q['id'], a[0], a[1]): (data['texts'][a[2]], a[4]) for q in data['questions'] for a in q['answers']}
    assert all(by[r['set'], r['id'], r['arm'], r['seed']] == (r['text'], int(r['correct_numeric'])) for r in rows)
    read = json.loads((RESULTS/'cpu'/'manifest.json').read_text())['stages']['browse']['params']['n_questions']
    assert all(q['question'] and q['solution'] for q in data['questions']) and sum(bool(q['fired']) for q in data['questions']) == read

def test_nothing_is_fetched_and_nothing_written_by_a_model_can_act(tmp_path):
    folder = shutil.copytree(RESULTS/'cpu', tmp_path/'cpu')
    evil = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)>'
    f = next((folder/'samples').glob('yfpo-seed0.jsonl'))
    rows = read_jsonl(f)
    rows[0]['text'] = evil
    f.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    text = page_html(folder, 'cpu')
    assert evil not in text and text.count('<script') == 2 and not re.search(r'''(src|href)=["'](?!data:|#)''', text)
    inside = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert evil in inside['texts']

def test_a_run_without_answers_has_a_page_without_a_browser():
    text = page_html(RESULTS/'neurons', 'neurons')
    assert 'id="questions"' not in text and 'id="table-selectors-zero"' in text

def test_every_finding_and_every_neuron_is_a_card():
    folder, text = RESULTS/'cpu', page_html(RESULTS/'cpu', 'cpu')
    cards, found = json.loads((folder/'cards.json').read_text()), findings(folder)
    assert text.count('<article class="card">') == len(cards) + len(found) > 10 and f"Layer {cards[0]['layer']}, neuron" in text
    for x in found:
        own = re.search(rf'<h3>{x.title}</h3>(.*?)</article>', text, re.S)[1]
        assert html.unescape(own).replace('\xa0', ' ').count(x.said[0]) == 1 and own.count('<tr>') == len(x.table) + 1
    for word in WORDS: assert text.index(f'<dt>{word}</dt>') < text.index('<article class="card">'), 'explained before its first use'
    assert card_html(dict(cards[0], promotes=['<script>'])).count('<script>') == 0

def test_cells_and_captions_are_text():
    t = table_html(pd.DataFrame({'a<b': ['<i>x</i>', '**2** & 3']}), 'one < two')
    assert '<i>' not in t and 'a&lt;b' in t and '<b>2</b> &amp; 3' in t and 'one &lt; two' in t

def samples(change):
    "The rows of one arm's file, changed"
    def f(folder):
        path = folder/'samples'/'yfpo-seed0.jsonl'
        rows = read_jsonl(path)
        path.write_text(''.join(json.dumps(r) + '\n' for r in change(rows)))
    return f

def text(name, change): return lambda folder: (folder/name).write_text(change((folder/name).read_text()))

def without(r, key): return {k: v for k, v in r.items() if k != key}

@pytest.mark.parametrize('edit,says', [
    (text('manifest.json', lambda t: t.replace('total_seconds', 'seconds')), 'manifest.json lacks total_seconds'),
    (text('manifest.json', lambda t: t.replace('"about"', '"about": null, "_"')), 'about is None, but must be of type str'),
    (text('manifest.json', lambda t: '[]'), 'manifest.json lacks recipe'),
    (text('manifest.json', lambda t: t.replace('"torch"', '"tarch"')), 'manifest.json, versions lacks torch'),
    (samples(lambda rows: [without(r, 'seed') for r in rows]), 'yfpo-seed0.jsonl, row 1 lacks the column seed'),
    (samples(lambda rows: [without(rows[0], 'numeric'), *rows[1:]]), 'row 1 lacks the column numeric'),
    (samples(lambda rows: [{**rows[0], 'nll_gold': float('nan')}, *rows[1:]]), 'row 1: nll_gold is nan, but must be a finite number'),
    (samples(lambda rows: [{**rows[0], 'answer': 4}, *rows[1:]]), 'row 1: answer is 4, but must be text'),
    (samples(lambda rows: rows + rows[:1]), 'stands there twice'), (samples(lambda rows: []), 'yfpo-seed0.jsonl is empty'),
    (text('fired.json', lambda t: t[:50]), 'fired.json: not valid JSON'),
    (text('cards.json', lambda t: t[:50]), 'cards.json: not valid JSON'),
    (text('cards.json', lambda t: t.replace('"layer"', '"lair"', 1)), 'cards.json, card 1 lacks layer'),
    (text('cards.json', lambda t: t.replace('"tokens": [', '"tokens": ["x", ', 1)), 'card 1: tokens and scores differ in number'),
    (text('fired.json', lambda t: '[]'), 'fired.json lacks the layer'),
    (text('fired.json', lambda t: '{"templates": {"x": {"sft": [[1, 2]]}}}'), 'fired.json lacks the layer, index or value of a neuron'),
    (text('questions.jsonl', lambda t: t.replace('"id"', '"di"', 1)), 'questions.jsonl, row 1 lacks id'),
    (text('questions.jsonl', lambda t: t[:50]), 'questions.jsonl, line 1: not valid JSON'),
    (text('tables/main.csv', lambda t: ''), 'main.csv is empty'), (text('tables/main.csv', lambda t: t.splitlines()[0] + '\n'), 'no rows'),
    (text('tables/audit.csv', lambda t: t[:-4]), 'audit.csv')])
def test_a_page_of_edited_files_is_refused(tmp_path, edit, says):
    folder = shutil.copytree(RESULTS/'cpu', tmp_path/'cpu')
    edit(folder)
    with pytest.raises(ValueError, match=says): page_html(folder, 'cpu')

def test_names_of_files_are_text_too(tmp_path):
    name, d = '"><b x="', tmp_path/'cpu'
    shutil.copytree(RESULTS/'cpu', d)
    shutil.copy(d/'tables'/'main.csv', d/'tables'/f'{name}.csv'); shutil.copy(d/'figures'/'method.png', d/'figures'/f'{name}.png')
    page = page_html(d, 'cpu')
    assert name not in page and 'id="table-&quot;&gt;&lt;b x=&quot;"' in page and 'id="figure-&quot;&gt;&lt;b x=&quot;"' in page

@pytest.mark.skipif(not BROWSER, reason='needs Chromium')
@pytest.mark.parametrize('width,height,scheme', [(1100, 800, 'light'), (390, 800, 'dark')])
def test_in_a_browser(tmp_path, width, height, scheme):
    "Sort a table, look for a question, open it, follow its address; no error, and no sideways scrolling of the page"
    from playwright.sync_api import sync_playwright
    folder, said = shutil.copytree(RESULTS/'cpu', tmp_path/'cpu'), []
    page = write_page(folder, 'cpu').as_uri()
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=['--no-sandbox'] if os.name == 'posix' and os.geteuid() == 0 else [])
        tab = browser.new_page(viewport=dict(width=width, height=height), color_scheme=scheme)
        tab.on('console', lambda m: said.append(m.text)); tab.on('pageerror', lambda e: said.append(str(e)))
        tab.goto(page)
        texts = tab.locator('#table-contrasts td:nth-child(4)').all_inner_texts
        cells = lambda: [float(re.match(r'[<]?([+-]?[\d.]+)', t)[1]) for t in texts()]
        before, head = cells(), tab.locator('#table-contrasts th').nth(3)
        head.locator('button').click()
        assert cells() == sorted(before) != before and head.get_attribute('aria-sort') == 'ascending'
        head.locator('button').click()
        assert cells() == sorted(before, reverse=True) and head.get_attribute('aria-sort') == 'descending'
        data = browser_data(folder)
        assert tab.locator('#list button').count() == len(data['questions'])
        q = next(q for q in data['questions'] if q['fired'])
        tab.locator('#find').fill(q['question'].lower())
        assert tab.locator('#list button').count() == 1
        tab.locator('#list button').click()
        assert tab.locator('#one h3').inner_text().endswith(q['id']) and q['question'] in tab.locator('#one').inner_text()
        assert tab.locator('.answer').count() == len({a[2] for a in q['answers']}) and tab.locator('.fired').count() == len(q['fired'])
        tab.locator('#find').fill('')
        tab.locator('#mixed').check()
        mixed = sum(len({a[4] for a in q['answers']}) > 1 for q in data['questions'])
        assert tab.locator('#list button').count() == mixed > 0
        again = browser.new_page()
        again.goto(tab.url)
        assert again.locator('#one h3').inner_text().endswith(q['id']), 'the address leads back to the question'
        assert tab.evaluate('document.documentElement.scrollWidth') <= width
        wide = tab.evaluate('''[...document.querySelectorAll('.wide')].map(x => [x.scrollWidth > x.clientWidth + 1,
            x.classList.contains('more'), !x.previousElementSibling.hidden, getComputedStyle(x).boxShadow !== 'none'])''')
        assert all(len(set(w)) == 1 for w in wide), 'a table that scrolls sideways shows it, and no other does'
        assert sum(w[0] for w in wide) > (5 if width < 500 else -1) and len(wide) == tab.locator('table').count()
        box = tab.locator('.wide').nth(next((i for i, w in enumerate(wide) if w[0]), 0))
        box.evaluate('x => x.scrollLeft = x.scrollWidth')
        tab.wait_for_timeout(100)
        assert not box.evaluate("x => x.classList.contains('more')"), 'at its end there is no more'
        assert box.evaluate("x => x.classList.contains('less')") == any(w[0] for w in wide)
        assert all(tab.evaluate('[...document.images].map(i => i.naturalWidth > 0)'))
        browser.close()
    assert said == []
