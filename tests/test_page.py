"The page of a run: escaped, whole, and alive in a browser."
import base64, hashlib, html, json, os, re, shutil
from html.parser import HTMLParser
from urllib.parse import quote
import pandas as pd
import pytest
from conftest import ROOT
from yfpo.beyond.cards import cards_html, save_cards
from yfpo.lab.page import browser_data, card_html, page_html, table_html, write_page
from yfpo.data.files import read_jsonl, write_jsonl
from yfpo.data.pages import asset
from yfpo.lab.findings import GLOSSARY, findings
from yfpo.lab.results import read_results

RESULTS = ROOT/'nbs'/'paper'/'results'
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)

def test_every_answer_is_there_once():
    data = browser_data(RESULTS/'first-look')
    rows = [r for f in (RESULTS/'first-look'/'samples').glob('*.jsonl') for r in read_jsonl(f) if 'text' in r]
    assert len(set(data['texts'])) == len(data['texts']) and sum(len(q['answers']) for q in data['questions']) == len(rows)
    by = {(q['set'], q['id'], a[0], a[1]): (data['texts'][a[2]], a[4]) for q in data['questions'] for a in q['answers']}
    assert all(by[r['set'], r['id'], r['arm'], r['seed']] == (r['text'], int(r['correct_numeric'])) for r in rows)
    read = json.loads((RESULTS/'first-look'/'manifest.json').read_text())['stages']['browse']['params']['n_questions']
    assert all(q['question'] and q['solution'] for q in data['questions']) and sum(bool(q['fired']) for q in data['questions']) == read

EVIL = ['</script><script>document.title="owned"</script>', '<img src=x onerror="document.title=1">',
        '</style><svg onload="document.title=2">', '<a href="javascript:document.title=3">here</a>', 'javascript:document.title=4',
        '"><b x="', '{{ 7*7 }}{% raw %}', '<!--', ']]>', '\x1b[31mred\x1b[0m\x07\x00', 'ab\u202edc', "'); document.title=5; ('"]
DRAWN = {'\x1b': '\u241b', '\x07': '\u2407', '\x00': '\u2400', '\u202e': '\u27e8202E\u27e9'}
SHOWN = [''.join(DRAWN.get(c, c) for c in t) for t in EVIL]

def hostile(folder):
    "A copy of the results of first-look in which every place that a text can stand in holds each of EVIL"
    folder, word = shutil.copytree(RESULTS/'first-look', folder/'first-look'), ' '.join(EVIL)
    f = folder/'samples'/'yfpo-seed0.jsonl'
    rows = read_jsonl(f)
    write_jsonl(f, [{**r, 'text': word} if i == 0 else r for i, r in enumerate(rows)])
    known = read_jsonl(folder/'questions.jsonl')
    key = (rows[0]['set'], rows[0]['id'])
    write_jsonl(folder/'questions.jsonl', [{**q, 'question': word, 'solution': word} if (q['set'], q['id']) == key else q for q in known])
    cards = json.loads((folder/'cards.json').read_text())
    cards[0].update(promotes=EVIL, demotes=EVIL, contexts=[dict(peak=0, tokens=EVIL, scores=[1.]*len(EVIL))])
    (folder/'cards.json').write_text(json.dumps(cards))
    (folder/'tables'/'main.csv').write_text(pd.DataFrame({t: [t, t] for t in EVIL}).to_csv(index=False, lineterminator='\n'))
    (folder/'tables'/'main.md').write_text(f'**Table.** {word}\n')
    manifest = json.loads((folder/'manifest.json').read_text())
    (folder/'manifest.json').write_text(json.dumps({**manifest, 'about': word}))
    return folder, f'{key[0]}/{key[1]}'

class Seen(HTMLParser):
    "Tags, attributes and texts of a page, as a browser reads them"
    def __init__(self, page):
        super().__init__()
        self.tags, self.at, self.texts = [], [], []
        self.feed(page)
    def handle_starttag(self, tag, attrs): self.tags.append(tag); self.at += [(tag, k, v) for k, v in attrs]
    def handle_data(self, data): self.texts.append(data)

def test_nothing_is_fetched_and_nothing_written_by_a_model_can_act(tmp_path):
    folder, _ = hostile(tmp_path)
    page = page_html(folder, 'first-look')
    seen = Seen(page)
    assert seen.tags.count('script') == 2 and not {'svg', 'iframe', 'object', 'form'} & {*seen.tags}
    assert {v.partition(':')[0] for t, k, v in seen.at if k in ('src', 'href') and not v.startswith('#')} == {'data'}
    assert not [k for _, k, _ in seen.at if k.startswith('on')] and not re.search('[\x00-\x08\x0b-\x1f\x7f\u202e]', page)
    shown = ''.join(seen.texts)
    for text in SHOWN: assert shown.count(text) > 5, text
    inside = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert ' '.join(SHOWN) in inside['texts'] and any(q.get('question') == ' '.join(SHOWN) for q in inside['questions'])

def test_only_its_own_script_may_run():
    "The policy names the script by its checksum, and the script writes no markup"
    page = page_html(RESULTS/'neurons', 'neurons')
    policy, = [v for _, k, v in Seen(page).at if k == 'content' and 'default-src' in v]
    script = re.search(r'<script>(.*?)</script>', page, re.S)[1]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy and "default-src 'none'" in policy
    assert not re.search(r'innerHTML|outerHTML|insertAdjacent|document\.write|eval|fetch|import', script) and 'textContent' in script

def test_the_pages_of_cards_and_of_a_run_have_one_style(tmp_path):
    "Both hold the file of cards; a fragment for a notebook holds that alone, and names no element outside itself"
    cards = json.loads((RESULTS/'first-look'/'cards.json').read_text())
    whole = save_cards(cards, tmp_path/'cards.html', '</title><script>', EVIL[0]).read_text()
    report, fragment = page_html(RESULTS/'first-look', 'first-look'), cards_html(cards)
    assert all(asset('cards.css') in t for t in (whole, report, fragment)) and all(asset('page.css') in t for t in (whole, report))
    assert asset('page.css') not in fragment and 'script' not in Seen(whole).tags and "script-src" not in whole
    rules = re.findall(r'([^{}]+)\{[^{}]*\}', re.sub(r'/\*.*?\*/', '', asset('cards.css'), flags=re.S))
    assert len(rules) > 8 and all(s.strip().startswith('.yfpo') for r in rules for s in r.split(','))
    assert str(card_html(cards[0])) in whole and str(card_html(cards[0])) in report

def test_a_run_without_answers_has_a_page_without_a_browser():
    text = page_html(RESULTS/'neurons', 'neurons')
    assert 'id="questions"' not in text and 'id="table-selectors-zero"' in text

def test_every_finding_and_every_neuron_is_a_card():
    folder, text = RESULTS/'first-look', page_html(RESULTS/'first-look', 'first-look')
    cards, found = json.loads((folder/'cards.json').read_text()), findings(folder)
    assert text.count('<article class="card">') == len(cards) + len(found) > 10 and f"Layer {cards[0]['layer']}, neuron" in text
    for x in found:
        own = re.search(rf'<h3>{re.escape(x.title)}</h3>(.*?)</article>', text, re.S)[1]
        assert html.unescape(own).replace('\xa0', ' ').count(x.said[0]) == 1 and own.count('<tr>') == len(x.table) + 1
    for word in GLOSSARY: assert text.index(f'<dt>{word}</dt>') < text.index('<article class="card">'), 'explained before its first use'
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
    folder = shutil.copytree(RESULTS/'first-look', tmp_path/'first-look')
    edit(folder)
    with pytest.raises(ValueError, match=says): page_html(folder, 'first-look')

def test_names_of_files_are_text_too(tmp_path):
    name, d = '"><b x="', tmp_path/'first-look'
    shutil.copytree(RESULTS/'first-look', d)
    shutil.copy(d/'tables'/'main.csv', d/'tables'/f'{name}.csv'); shutil.copy(d/'figures'/'method.png', d/'figures'/f'{name}.png')
    page = page_html(d, 'first-look')
    assert name not in page and 'id="table-&#34;&gt;&lt;b x=&#34;"' in page and 'id="figure-&#34;&gt;&lt;b x=&#34;"' in page

def chromium(p):
    return p.chromium.launch(executable_path=BROWSER, args=['--no-sandbox'] if os.name == 'posix' and os.geteuid() == 0 else [])

@pytest.mark.skipif(not BROWSER, reason='needs Chromium')
def test_hostile_texts_in_a_browser(tmp_path):
    "They are shown as they are, and do nothing; with the data's script broken into, the policy would still stop it"
    from playwright.sync_api import sync_playwright
    folder, key = hostile(tmp_path)
    path = write_page(folder, 'first-look')
    with sync_playwright() as p:
        browser, said = chromium(p), []
        tab = browser.new_page()
        tab.on('console', lambda m: said.append(m.text)); tab.on('pageerror', lambda e: said.append(str(e)))
        tab.on('request', lambda r: said.append(r.url) if not r.url.startswith(('file:', 'data:')) else None)
        tab.on('dialog', lambda d: (said.append(d.message), d.dismiss()))
        tab.goto(f'{path.as_uri()}#q={quote(key, safe="")}')
        for place in ('#one', '#neurons', '#table-main', 'h1 + p'):
            text = tab.locator(place).first.evaluate('e => e.textContent')
            assert all(t in text for t in SHOWN), place
        assert tab.title() == 'YFPO: first-look' and said == [] and tab.locator('#one a, #one img, #one svg, #neurons a').count() == 0
        assert tab.evaluate('document.documentElement.scrollWidth <= innerWidth')
        broken = path.with_name('broken.html')
        broken.write_text(path.read_text().replace('<h1>', EVIL[0] + EVIL[1] + '<h1>'))
        tab.goto(broken.as_uri())
        assert tab.title() == 'YFPO: first-look' and sum('Content Security Policy' in s for s in said) >= 2
        browser.close()

@pytest.mark.skipif(not BROWSER, reason='needs Chromium')
@pytest.mark.parametrize('width,height,scheme', [(1100, 800, 'light'), (390, 800, 'dark')])
def test_in_a_browser(tmp_path, width, height, scheme):
    "Sort a table, look for a question, open it, follow its address; no error, and no sideways scrolling of the page"
    from playwright.sync_api import sync_playwright
    folder, said = shutil.copytree(RESULTS/'first-look', tmp_path/'first-look'), []
    page = write_page(folder, 'first-look').as_uri()
    with sync_playwright() as p:
        browser = chromium(p)
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
