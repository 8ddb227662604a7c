"What mkdocs does not know: notebooks are pages, with their stored outputs, and formulas are MathML, which needs no script and no network."
import html, re
from math_core import LatexToMathML
from mkdocs.structure.files import File, Files
from mkdocs.utils import nest_paths
from yfpo.lm.progress import track
from yfpo.lab.readme import as_markdown

HOUSE = dict(data='Data', lm='Language model', beyond='Beyond the paper', lab='Laboratory', paper='Experiments')     # others: after these

def _place(file):
    "Pages of a folder stand before its subfolders"
    *folders, name = file.src_uri.split('/')
    rank = lambda d: [*HOUSE].index(d) if d in HOUSE else len(HOUSE)
    return [(1, rank(d), d) for d in folders] + [(0, name != 'index.md', name)]

def _page(f, config):
    "The page of a notebook, and the pictures that it shows"
    folder = f.src_uri[:-len(f'{f.name}.ipynb')]
    text, pictures = as_markdown(f.abs_src_path, output_files_dir=f'{f.name}_files')
    text = re.sub(r'(\]\((?!https?:)[^)\s]+)\.ipynb\b', r'\1.md', text)
    return [File.generated(config, f'{folder}{f.name}.md', content=text),
            *(File.generated(config, folder + name, content=data) for name, data in pictures.items())]

def on_files(files, config):
    "A page in the place of every notebook"
    notebooks = [f for f in files if f.src_uri.endswith('.ipynb')]
    pages = [p for f in track(notebooks, desc='reading', unit='notebooks') for p in _page(f, config)]
    config['nav'] = nest_paths(p.src_uri for p in sorted(pages, key=_place) if p.src_uri.endswith('.md'))
    return Files([*pages, *(f for f in files if f not in notebooks)])

def on_nav(nav, **_):
    for s in nav.items:
        if s.is_section: s.title = HOUSE.get(s.title.lower(), s.title)

def on_page_content(text, **_):
    "Formulas, which Arithmatex marked"
    def drawn(m): return LatexToMathML().convert_with_local_state(html.unescape(m[2]), displaystyle=m[1] == 'div')
    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', drawn, text, flags=re.S)
