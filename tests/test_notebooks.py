"""Every notebook runs from top to bottom, by nbdev's own runner: a cell that raises, or an assertion that fails, fails its test.

Cells marked `slow`, `cuda` or `notest` are left out (`tst_flags` in pyproject.toml); `pytest --flags slow` runs them too.
Each notebook runs in its own process and in a copy of `nbs/`, so that it can neither see another's leavings nor write in the tree."""
import re, shutil

import pytest
from conftest import ROOT

NBS = ROOT/'nbs'
notebooks = sorted(p.relative_to(NBS).as_posix() for p in NBS.rglob('*.ipynb')
                   if p.relative_to(NBS).parts[0] != 'experiments' and not any(o.startswith(('.', '_')) for o in p.relative_to(NBS).parts))

@pytest.fixture(scope='session')
def copy(tmp_path_factory):
    "A copy of the notebooks that knows nbdev's settings; the package under test stays the installed one."
    here = tmp_path_factory.mktemp('project')
    shutil.copytree(NBS, here/'nbs', ignore=shutil.ignore_patterns('experiments', '.ipynb_checkpoints'))
    shutil.copytree(ROOT/'benchmarks'/'elpv', here/'benchmarks'/'elpv')     # predictions that a guide reads
    shutil.copy(ROOT/'pyproject.toml', here)
    return here

def files(folder): return {p.relative_to(folder).as_posix() for p in folder.rglob('*') if '__pycache__' not in p.parts}

@pytest.mark.parametrize('nb', notebooks)
def test_notebook(nb, copy, sh, script, request):
    before = files(copy)
    flags = request.config.getoption('--flags')
    code, out, err, _ = sh(script('nbdev-test'), copy/'nbs'/nb, *(['--flags', flags] if flags else []), cwd=copy, timeout=1200)
    log = re.sub(r'\x1b\[[0-9;]*m', '', f'{out}\n{err}').strip()
    assert code == 0, f'{nb} failed:\n{log}'
    assert files(copy) == before, f'{nb} leaves files beside itself; write to a temporary folder'
