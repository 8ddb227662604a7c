"The site made without quarto: every notebook, links that lead somewhere, readable on a narrow screen."
import os, re, shutil
from pathlib import Path
import pytest
from conftest import ROOT
from yfpo.lab.site import page_of, site_pages, write_site

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)

@pytest.fixture(scope='module')
def site(tmp_path_factory): return write_site(ROOT, tmp_path_factory.mktemp('site'), say=lambda t: None)

def test_every_notebook_is_a_page_and_every_link_leads_to_one(site):
    pages = site_pages(ROOT)
    assert {p[1].stem for p in pages} == {f.stem for d in ('nbs', 'nbs/paper') for f in (ROOT/d).glob('*.ipynb')} and len(pages) > 60
    for _, path, *_ in pages:
        page = site/path.relative_to(ROOT/'nbs').with_suffix('.html')
        text = page.read_text()
        assert "<title>YFPO: " in text and text[:text.index('</nav>')].count('aria-current="page"') == 1
        seen = re.findall(r'href="((?!https?:|#|data:|mailto:)[^"#]+\.html)', text)
        seen += re.findall(r'<img[^>]+src="((?!data:|https?:)[^"]+)"', text)
        for to in seen: assert (page.parent/to).resolve().exists(), (path.stem, to)

def test_what_is_for_the_machine_is_not_shown():
    text = page_of(ROOT/'nbs'/'04_loss.ipynb', site_pages(ROOT))
    assert '#| export' not in text and 'default_exp' not in text and 'nf">dpo_loss<' in text

@pytest.mark.skipif(not BROWSER, reason='needs Chromium')
def test_in_a_browser(site):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=['--no-sandbox'] if os.name == 'posix' and os.geteuid() == 0 else [])
        for name in ('index', '12_loss', 'paper/experiments'):
            for width in (1200, 390):
                tab, said = browser.new_page(viewport=dict(width=width, height=800)), []
                tab.route('**/*', lambda r: r.abort() if r.request.url.startswith('http') else r.continue_())    # fonts of formulas
                tab.goto((site/f'{name}.html').as_uri(), wait_until='domcontentloaded')
                assert tab.evaluate('document.documentElement.scrollWidth') <= width, (name, width)
                assert tab.locator('#site a').first.is_visible() == (width == 1200)
                if width == 390: tab.locator('#site summary').click(); assert tab.locator('#site a').first.is_visible()
                tab.close()
        browser.close()
