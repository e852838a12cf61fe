"""The notebooks for Kaggle and Colab: what can be said of them without running them. `python tests/standins.py` runs them, `python tests/kaggle_paths.py` takes a user's whole way."""
import ast, json, re, subprocess
from importlib import metadata

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
    assert sum("'pip', 'install'" in o for o in code[name]) == 1
    assert sum("'pip'" in o for o in code[name]) == 1 + (name == 'offline')      # which also makes wheels

def part(source, name):
    "A function of a cell, with the cell's imports."
    kept = [o for o in ast.parse(source).body if isinstance(o, (ast.Import, ast.ImportFrom)) or getattr(o, 'name', None) == name]
    there = {}
    exec(compile(ast.Module(kept, []), name, 'exec'), there)
    return there

@pytest.mark.parametrize('layout', ('', 'competitions', 'datasets/somebody', 'notebooks/somebody/imgclf-offline', 'imgclf-offline'))
def test_finds_what_is_attached(tmp_path, layout):
    there = part(code['paddy'][0], 'attached')
    there['INPUT'] = tmp_path/'input'
    assert there['attached']('imgclf-wheels') is None                            # not on Kaggle: no such folder
    (tmp_path/'input'/layout/'imgclf-wheels').mkdir(parents=True)
    (tmp_path/'input'/'other').mkdir()
    assert there['attached']('imgclf-wheels') == tmp_path/'input'/layout/'imgclf-wheels'
    assert there['attached'](str(tmp_path)) == tmp_path and there['attached']('imgclf-weights') is None

def test_an_install_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, 'run', lambda command, **kw: subprocess.CompletedProcess(command, 1))
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('IMGCLF_INPUT', str(tmp_path))
    source = re.sub("^VERSION = .*", "VERSION = '99'", code['paddy'][0], flags=re.M)
    with pytest.raises(RuntimeError, match='without internet, attach imgclf-wheels'): exec(source, {})
    (tmp_path/'imgclf-wheels').mkdir()
    with pytest.raises(RuntimeError, match='looked for in .*imgclf-wheels'): exec(source, {})
    assert f"torch=={metadata.version('torch')}" in (tmp_path/'keep.txt').read_text().split()

def test_offline_takes_all_but_the_platforms_own():
    source = next(o for o in code['offline'] if 'def needs' in o)
    there = part('from importlib import metadata\n' + next(o for o in code['offline'] if 'canonicalize_name' in o and 'imgclf.all' in o).replace('from imgclf.all import *', '') + '\n' + source, 'needs')
    there['OWN'] = own = {'torch', 'torchvision', 'pandas', 'numpy'}
    assert f'OWN = {{{", ".join(map(repr, ("torch", "torchvision", "pandas", "numpy")))}}}' in source
    plain, more = ({name for name, *_ in there['needs'](o, {})} for o in ('imgclf', 'imgclf[track]'))
    direct = {there['canonicalize_name'](there['Requirement'](o).name) for o in metadata.requires('imgclf') if 'extra ==' not in o}
    assert direct - own <= plain and {'fastcore', 'kaggle', 'spacy', 'huggingface-hub'} <= plain      # of fastai's, fastkaggle's and timm's
    assert not {o for o in plain | more if o in own or o.startswith(('nvidia', 'triton'))}
    assert {'tensorboard', 'wandb'} <= more - plain

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
    assert about['competition_sources'] == comps and about['enable_internet'] is True and about['is_private'] is True and about['kernel_type'] == 'notebook' and about['enable_gpu'] is (name != 'offline')
