"What the tests share: the project's root, and a home of their own, so that a run reads and writes nobody's caches."
import os, resource, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture(scope='session')
def root(): return ROOT

@pytest.fixture(scope='session')
def clean_env(tmp_path_factory):
    "Environment for subprocesses: one thread, no screen, no hub, and caches in a temporary folder that this run alone uses."
    home = tmp_path_factory.mktemp('home')
    env = {k: v for k, v in os.environ.items() if not k.startswith(('XDG_', 'PYTEST_', 'IMGCLF_'))}
    return env | dict(
        HOME=str(home), XDG_CACHE_HOME=str(home/'cache'), XDG_CONFIG_HOME=str(home/'config'), XDG_DATA_HOME=str(home/'data'), XDG_STATE_HOME=str(home/'state'),
        FASTAI_HOME=str(home/'fastai'), TORCH_HOME=str(home/'torch'), HF_HOME=str(home/'hf'), MPLCONFIGDIR=str(home/'mpl'), IPYTHONDIR=str(home/'ipython'),
        HF_HUB_OFFLINE='1', MPLBACKEND='agg', OMP_NUM_THREADS='1')

@pytest.fixture(scope='session')
def sh(clean_env):
    "Run a command; returns (exit code, stdout, stderr, seconds of processor time: as long as it takes where nothing else runs)."
    def _run(*args, cwd=ROOT, timeout=600, **env):
        used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        start = used()
        r = subprocess.run([str(a) for a in args], cwd=cwd, env=clean_env | env, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
        return r.returncode, r.stdout, r.stderr, used() - start
    return _run

@pytest.fixture(scope='session')
def python(sh):
    "Run Python code in a fresh interpreter."
    return lambda code, **kw: sh(sys.executable, '-c', code, **kw)

@pytest.fixture(scope='session')
def script():
    "The path of a program installed beside this Python."
    return lambda name: Path(sys.executable).parent/name

@pytest.fixture
def imgclf(capsys, world, monkeypatch):
    "Run a command in this process, in the folder of the module's own fixture `world`; returns (exit code, stdout, stderr)."
    from imgclf.cli import main
    monkeypatch.chdir(world)
    def _run(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e: main([str(o) for o in args])
        return e.value.code or 0, *capsys.readouterr()
    return _run

def pytest_addoption(parser):
    parser.addoption('--flags', default='', help="also run notebook cells with these marks, such as 'slow' or 'slow cuda'")
