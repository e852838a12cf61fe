"""The notebooks for Kaggle and Colab: what can be said of them without running them. `python tests/standins.py` runs them."""
import ast, json, re

import pytest
from conftest import ROOT

import imgclf

FOLDER = ROOT/'nbs'/'experiments'
notebooks = sorted(o.stem for o in FOLDER.glob('*.ipynb'))
cells = {o: json.loads((FOLDER/f'{o}.ipynb').read_text(encoding='utf-8'))['cells'] for o in notebooks}
code = {o: [''.join(c['source']) for c in cs if c['cell_type'] == 'code'] for o, cs in cells.items()}

def test_there_are_some(): assert notebooks

@pytest.mark.parametrize('name', notebooks)
def test_installs_this_version_and_nothing_else_new(name):
    install = code[name][0]
    assert re.search(r"^VERSION = '(.+)'", install, re.M)[1] == imgclf.__version__, 'VERSION is another than the library here'
    assert all(o in install for o in ("'torch'", "'pandas'", "'-c'", "'--no-index'"))
    assert re.sub('^EXTRA = .*', '', install, flags=re.M) == re.sub('^EXTRA = .*', '', code[notebooks[0]][0], flags=re.M), 'the notebooks install in different ways'
    assert sum('pip' in o for o in code[name]) == 1

@pytest.mark.parametrize('name', notebooks)
def test_reads_as_python_and_holds_no_results(name):
    for o in code[name]: ast.parse(o)
    assert not any(c.get('outputs') for c in cells[name]), 'outputs of a rehearsal are no results: commit it without'
    first = ''.join(cells[name][0]['source'])
    for badge in (f'colab.research.google.com/github/imgclf/imgclf/blob/main/nbs/experiments/{name}.ipynb', f'kaggle.com/kernels/welcome?src=https://github.com/imgclf/imgclf/blob/main/nbs/experiments/{name}.ipynb'):
        assert badge in first

@pytest.mark.parametrize('name', notebooks)
def test_kaggle_can_be_told(name):
    about = json.loads((FOLDER/name/'kernel-metadata.json').read_text(encoding='utf-8'))
    assert (FOLDER/name/about['code_file']).resolve() == FOLDER/f'{name}.ipynb'
    assert about['id'].split('/')[1] == re.sub('[^a-z0-9]+', '-', about['title'].lower()), "Kaggle wants the title's own slug"
    comps = re.findall(r"^COMP = '(.+)'", '\n'.join(code[name]), re.M)
    assert about['competition_sources'] == comps and about['kernel_type'] == 'notebook' and about['enable_gpu'] is True
