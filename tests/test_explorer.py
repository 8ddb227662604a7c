"A set at several strengths: what is written is what an ablation writes, and the page shows it, escaped, by mouse and by keyboard."
import json, os, re, shutil
import pytest, torch
from test_page import BROWSER, EVIL, Seen, chromium
from yfpo.beyond.explorer import (answers_at, contributions_on, draw_fires, explore, explored, explorer_html, fires, in_spreads,
                                  save_explorer, usual, written_at)
from yfpo.data.pages import token_label, visible
from yfpo.data.problems import Problem
from yfpo.data.templates import make_problems
from yfpo.interventions import ablate, record
from yfpo.lm.responses import collate, encode, format_prompt, generate
from yfpo.neurons import NeuronSet, layer_matched
from yfpo.reward import ReadOut, RewardStats, fit_moments, write_norms
from yfpo.lm.families import down_projs

@pytest.fixture(scope='module')
def sets(tiny):
    g = torch.Generator().manual_seed(0)
    flat = torch.randperm(128, generator=g)[:24]
    from yfpo.neurons import model_signature
    own = NeuronSet(flat//64, flat % 64, torch.full((24,), 1/24), torch.where(torch.rand(24, generator=g) > .5, 1., -1.),
                    dict(model=model_signature(tiny[0]), selector='drawn'))
    return {'selected': own, 'random': layer_matched(own, 1)}

PROBLEMS = make_problems(3, seed=5)

@pytest.mark.parametrize('strength,mode', [(0., 'zero'), (1., None), (4., 'scale')])
def test_written_at_a_strength_is_written_under_the_ablation(tiny, sets, strength, mode):
    made = written_at(*tiny, PROBLEMS, sets['selected'], strength, max_new_tokens=10)
    with ablate(tiny[0], sets['selected'] if mode else None, mode or 'zero', **(dict(alpha=4.) if mode == 'scale' else {})):
        own = generate(*tiny, PROBLEMS, max_new_tokens=10, progress=False, backend='transformers')
    assert [t for _, t in made] == [r['text'] for r in own]
    assert [tiny[1].decode(e.ids[e.start:]).strip() for e, _ in made] == [r['text'].strip() for r in own]

def test_strengths_differ(tiny, sets):
    texts = {s: [t for _, t in written_at(*tiny, PROBLEMS, sets['selected'], s, max_new_tokens=10)] for s in (0., 1., 4.)}
    assert texts[0.] != texts[1.] != texts[4.]

def test_a_contribution_is_activation_times_direction_times_length(tiny, sets):
    model, tok = tiny
    ex, s = encode(tok, [('ab', 'cdef'), 'ghijk']), sets['selected']
    found = contributions_on(model, tok, s, ex)
    norms = torch.stack([write_norms(down_projs(model)[l], torch.tensor([i]))[0] for l, i in zip(s.layer.tolist(), s.index.tolist())])
    for e, x in zip(ex, found):
        a = record(model, collate([e], tok.pad_token_id), s)[0, e.start:]
        assert torch.allclose(x, a*s.direction*norms, atol=1e-6) and x.shape == (len(e.ids) - e.start, len(s))

def test_fires_names_those_furthest_from_their_usual(tiny, sets):
    s, prose = sets['selected'], ['abcd efgh', 'some more of it']
    seen = torch.cat(contributions_on(*tiny, s, encode(tiny[1], prose)))
    stats, raw = usual(*tiny, s, prose), contributions_on(*tiny, s, encode(tiny[1], ['3 + 4 = 7']))[0]
    assert torch.allclose(stats.mean, seen.mean(0), atol=1e-5)
    z = ((raw - stats.mean)/stats.std).clamp(-3, 3)
    own = z.abs().mean(0).argsort(descending=True)[:5]
    found = fires(*tiny, s, '3 + 4 = 7', top=5, stats=stats)
    assert list(zip(found.layer, found.index)) == [(int(s.layer[k]), int(s.index[k])) for k in own]
    assert torch.allclose(found.z, z[:, own]) and torch.allclose(found.raw, raw[:, own]) and found.z.shape == (8, 5)
    assert ''.join(found.tokens) == ' + 4 = 7'
    with pytest.raises(ValueError, match='24 neurons'): fires(*tiny, s, 'abc', stats=RewardStats(*(torch.ones(3) for _ in range(3))))
    for text, says in (('', 'text'), (5, 'text'), ('a', 'one token')):
        with pytest.raises(ValueError, match=says): fires(*tiny, s, text)
    with pytest.raises(ValueError, match='top is 0'): fires(*tiny, s, 'abc', top=0)

def test_a_layer_that_writes_a_hundred_times_as_much_wins_no_rank(tiny, sets):
    "In raw contributions it would win all of them"
    import copy
    loud, s, text = copy.deepcopy(tiny[0]), sets['selected'], '3 + 4 = 7'
    before = fires(*tiny, s, text, top=6)
    last = down_projs(loud)[1]
    with torch.no_grad(): last.weight.mul_(100)
    after = fires(loud, tiny[1], s, text, top=6)
    assert (after.layer, after.index) == (before.layer, before.index) and torch.allclose(after.z, before.z, atol=1e-4)
    by_raw = contributions_on(loud, tiny[1], s, encode(tiny[1], [text]))[0].abs().sum(0).argsort(descending=True)[:6]
    assert {int(s.layer[k]) for k in by_raw} == {1} != set(after.layer)

def test_the_picture_of_what_fires(tiny, sets):
    s = sets['selected']
    fig, two = draw_fires(*tiny, s, 'a $ b\n', top=2), fires(*tiny, s, 'a $ b\n', top=2)
    ax, bar = fig.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == [f'{l}.{i}' for l, i in zip(two.layer, two.index)]
    assert [t.get_text() for t in ax.get_xticklabels()] == ['␣', r'\$', '␣', 'b', '⏎']
    assert torch.allclose(torch.as_tensor(ax.images[0].get_array().data), two.z.T) and ax.images[0].get_clim() == (-3, 3)
    assert 'standard deviations' in bar.get_ylabel()

@pytest.mark.parametrize('token,shown', [(' a', ' a'), (' ', '␣'), ('', '␣'), ('\n\n', '⏎⏎'), (' \n', '␣⏎'), ('a\n', 'a⏎'), ('\t', '⇥'),
                                         ('\x1b', '␛')])
def test_a_token_alone_can_be_seen(token, shown): assert token_label(token) == shown

def test_numbers_are_in_spreads_of_the_unchanged_answers():
    row = lambda *xs: [dict(readout=list(xs))]
    plain, strong = in_spreads([row(1., 3.), row(5.)], [1., 4.])
    assert plain[0]['readout'] == [-.707, .707] and strong[0]['readout'] == [2.121]
    one, three = in_spreads([row(1.), row(3., 5.)], [1., 4.])           # a single token has no spread: all take its place
    assert one[0]['readout'] == [-1.] and three[0]['readout'] == [0., 1.]
    assert in_spreads([row(7.)], [1.])[0][0]['readout'] == [0.]

def page_data(text): return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])

def test_the_page_holds_what_was_written(tiny, sets, tmp_path):
    text = save_explorer(tmp_path/'e.html', *tiny, sets, PROBLEMS, texts=['abcdefgh', '12345678'], top=2,
                         max_new_tokens=10, progress=False).read_text()
    data, own = page_data(text), answers_at(*tiny, PROBLEMS, sets['random'], 2., max_new_tokens=10)
    assert [w for _, w in data['strengths']] == ['removed', 'halved', 'as is', 'doubled', 'four times']
    assert [a['tokens'] for a in data['answers']['random'][3]] == [visible(a.tokens) for a in own]
    assert [a['right'] for a in data['answers']['random'][3]] == [a.right for a in own]
    found = torch.tensor([x for a in data['answers']['random'][2] for x in a['readout']])
    assert abs(found.mean()) < 2e-3 and abs(found.std() - 1) < 2e-3
    assert text.count('<article class="card">') == 4 and [q['question'] for q in data['questions']] == [p.question for p in PROBLEMS]

def test_a_right_answer_is_called_right(tiny, sets, monkeypatch):
    "By the text that was written and the question's own answer"
    how, asked = dict(max_new_tokens=4), []
    assert not any(a.right for a in answers_at(*tiny, PROBLEMS, sets['selected'], 1., **how))
    def judge(text, answer): asked.append((text, answer)); return answer == PROBLEMS[0].answer
    monkeypatch.setattr('yfpo.beyond.explorer.is_correct', judge)
    made = answers_at(*tiny, PROBLEMS, sets['selected'], 1., **how)
    assert [a.right for a in made] == [p.answer == PROBLEMS[0].answer for p in PROBLEMS] and made[0].right
    assert asked == [(t, p.answer) for (_, t), p in zip(written_at(*tiny, PROBLEMS, sets['selected'], 1., **how), PROBLEMS)]

@pytest.mark.parametrize('given,says', [(dict(sets={}), 'at least one set'), (dict(problems=[]), 'one question'),
                                        (dict(strengths=(-1.,)), 'strength is -1')])
def test_what_cannot_be_explored(tiny, sets, given, says):
    with pytest.raises(ValueError, match=says): explored(*tiny, **{**dict(sets=sets, problems=PROBLEMS), 'progress': False, **given})

def test_a_killed_page_leaves_the_old_one(tiny, sets, tmp_path, monkeypatch):
    path = tmp_path/'e.html'
    path.write_text('old')
    monkeypatch.setattr('yfpo.beyond.explorer.explorer_html', lambda *a, **k: 1/0)
    with pytest.raises(ZeroDivisionError): save_explorer(path, *tiny, sets, PROBLEMS[:1], max_new_tokens=2, progress=False)
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['e.html']

def made_of(text):
    "A page in which every text is `text`"
    answer = lambda s: dict(tokens=['a' if s == 1. else 'b', text], readout=[1., -s], right=s == 1.)
    strengths = (0., 1., 3.)
    return explorer_html({k: [[answer(s)] for s in strengths] for k in ('selected', text)}, [Problem('x', text, '', text, 'own')],
                         strengths,
                         {text: [dict(layer=1, index=2, weight=.5, direction=1, promotes=[text], demotes=[], contexts=[])]}, text, text)

def test_texts_stay_texts():
    word = ' '.join(EVIL)
    seen = Seen(made_of(word))
    assert seen.tags.count('script') == 2 and not {'svg', 'iframe', 'object', 'form'} & {*seen.tags}
    assert not [k for _, k, _ in seen.at if k.startswith('on')]

def coloured(text):
    "(token, its number, opacity of its colour) of each span of a page or a widget"
    spans = re.findall(r'<span([^>]*)title="([+−][0-9.]+) standard deviations"[^>]*>([^<]*)</span>', text)
    number = lambda x: float(x.replace('−', '-'))
    return [(t, number(x), float((re.search(r',([0-9.]+)\)"', s) or [0, 0])[1])) for s, x, t in spans]

def test_the_live_widget_shows_what_the_page_shows(tiny, sets):
    "The same numbers of the same answers in the same unit, which both name"
    pytest.importorskip('ipywidgets')
    asked, how = [Problem('own', 'How many?', '', '0', 'own')], dict(max_new_tokens=6, progress=False)
    box = explore(*tiny, sets, 'How many?', max_new_tokens=6)
    ask, (which, strength, button), out = box.children[0], box.children[1].children, box.children[2]
    which.value, strength.value = 'random', 4.
    button.click()
    made = explored(*tiny, sets, asked, **how)
    of_page = page_data(explorer_html(made, asked))['answers']['random'][4][0]
    seen = coloured(out.value)
    assert [x for _, x, _ in seen] == pytest.approx([x for x in of_page['readout']], abs=.0051) and len(seen) == len(of_page['tokens']) == 6
    assert [a for *_, a in seen if a] == pytest.approx([.2*min(3, abs(x)) for x in of_page['readout'] if abs(x) > .1], abs=.0051)
    assert 'Mean read-out: ' in out.value and 'three standard deviations' in out.value
    ask.value = ''
    button.click()
    assert 'refused' in out.value

@pytest.mark.skipif(not BROWSER, reason='needs Chromium')
@pytest.mark.parametrize('width,scheme', [(1100, 'light'), (390, 'dark')])
def test_in_a_browser(tmp_path, width, scheme):
    "Choose by keyboard, follow the address, read what a screen reader is told; no error, and no sideways scrolling"
    from playwright.sync_api import sync_playwright
    word, said = ' '.join(EVIL), []
    (tmp_path/'e.html').write_text(made_of(word))
    with sync_playwright() as p:
        browser = chromium(p)
        tab = browser.new_page(viewport=dict(width=width, height=800), color_scheme=scheme)
        tab.on('console', lambda m: said.append(m.text)); tab.on('pageerror', lambda e: said.append(str(e)))
        tab.goto((tmp_path/'e.html').as_uri())
        assert tab.locator('#verdict').inner_text().startswith('As is: right') and tab.locator('#answer').inner_text().startswith('a')
        assert 'The model is unchanged.' in tab.locator('#before').inner_text() and not tab.locator('[data-set]').is_visible()
        tab.locator('input[name=strength]:checked').focus()
        tab.keyboard.press('ArrowRight')
        assert tab.locator('#verdict').inner_text().startswith('Times 3: wrong') and tab.locator('#answer').inner_text().startswith('b')
        assert 'The unchanged model writes: a' in tab.locator('#before').inner_text()
        assert tab.locator('#answer span').first.get_attribute('title') == '+0.71 standard deviations'
        assert 'Mean read-out: −' in tab.locator('#before').inner_text()
        first, second = (tab.locator('#answer span').nth(i).evaluate('e => e.style.background') for i in (0, 1))
        assert first.startswith('rgba(213, 94, 0') and second.startswith('rgba(0, 114, 178')
        tab.get_by_label('Question').focus()
        tab.locator('input[name=set]').nth(1).check()
        assert tab.locator('[data-set]').is_visible() and tab.url.endswith('#1.2.0')
        assert tab.locator('#written').get_attribute('aria-live') == 'polite'
        assert tab.evaluate('document.documentElement.scrollWidth <= innerWidth') and said == []
        tab.reload()
        assert tab.locator('#verdict').inner_text().startswith('Times 3: wrong') and tab.locator('[data-set]').is_visible()
        browser.close()
