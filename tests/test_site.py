"The site that mkdocs makes: every notebook, links that lead somewhere, nothing fetched, readable on a narrow screen."
import os, re, shutil, subprocess, sys
import pytest
from conftest import ROOT

pytest.importorskip('mkdocs', reason='needs the extra docs')
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
NOTEBOOKS = [f for f in sorted((ROOT/'nbs').rglob('*.ipynb')) if '.ipynb_checkpoints' not in f.parts]

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp('site')
    r = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '-d', out], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return out

def page(site, notebook): return (site/notebook.relative_to(ROOT/'nbs')).with_suffix('.html')

def test_every_notebook_is_a_page_and_every_link_leads_to_one(site):
    for path in [page(site, f) for f in NOTEBOOKS]:
        text = path.read_text()
        seen = re.findall(r'''(?:href|src)=["']?((?!https?:|#|data:|mailto:|\.?["'])[^"'#?\s>]+)''', text)
        assert [to for to in seen if not (path.parent/to).exists()] == [], path

def test_the_navigation_is_the_folder_tree(site):
    nav = re.search(r'<nav .*?</nav>', (site/'index.html').read_text(), re.S)[0]
    seen = list(dict.fromkeys(h for h in re.findall(r'href="([^"#]+)"', nav) if h.endswith('.html')))
    house = ['', 'data', 'lm', 'beyond', 'lab', 'paper']
    there = [page(site, f).relative_to(site) for f in NOTEBOOKS if f.stem != 'index']
    there = sorted(there, key=lambda f: ([house.index(f.parts[0] if len(f.parts) > 1 else '')], len(f.parts), str(f)))
    assert [s for s in seen if s != 'index.html'] == [str(f) for f in there]

def test_what_is_for_the_machine_is_not_shown(site):
    for f in NOTEBOOKS:
        text = page(site, f).read_text()
        assert not re.search(r'^(<[^>]+>)*#\| ', text, re.M), f
    assert '<math display="block">' in page(site, next(f for f in NOTEBOOKS if f.stem.endswith('_loss'))).read_text()

@pytest.mark.skipif(not BROWSER, reason='needs Chromium')
@pytest.mark.parametrize('width', [1200, 390])
def test_in_a_browser(site, width):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=['--no-sandbox'] if os.name == 'posix' and os.geteuid() == 0 else [])
        tab, asked = browser.new_page(viewport=dict(width=width, height=800)), []
        tab.on('request', lambda r: asked.append(r.url) if r.url.startswith('http') else None)
        for f in [f for f in NOTEBOOKS if re.search(r'index|_loss|_relevance|_run|experiments', f.stem)]:
            tab.goto(page(site, f).as_uri(), wait_until='load')
            assert tab.evaluate('document.documentElement.scrollWidth') <= width, f
            over = '''[...document.querySelectorAll('.rst-content :is(pre, table, math, img)')].filter(e =>
                      e.getBoundingClientRect().right > innerWidth || e.scrollWidth > e.clientWidth + 1 && e.tagName == 'PRE').length'''
            assert tab.evaluate(over) == 0, f
            assert tab.locator('.wy-nav-side a').first.is_visible() and tab.locator('merror').count() == 0
            assert (tab.locator('.wy-nav-side').bounding_box()['x'] >= 0) == (width == 1200)      # out of the way where there is no room
            math = tab.locator('math[display=block]')
            assert math.count() == 0 or math.first.bounding_box()['height'] > 15
        assert asked == []
        browser.close()
