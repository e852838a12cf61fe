"The frame around the code: what importing costs, what the star import gives, and that package, exports, README and requirements are in step."
import ast, inspect, re, shutil, statistics, sys, zipfile
from configparser import ConfigParser

import pytest
from packaging.requirements import Requirement

from conftest import ROOT

LIB = ROOT/'imgclf'
CONTRACT = ast.parse('''
def items_from_folder(path): ...
def items_from_df(df, folder, *, id_col, fn_col=None, label_col=None, label_cols=None, suffix='', label_delim=None, multi=False): ...
def scan_images(items, n_workers=None): ...
def find_duplicates(items, max_distance=0): ...
def make_folds(items, n_splits=5, *, group_col=None, duplicates='exact', seed=42): ...
def split_fold(items, fold): ...
def oversample(train, factor, *, fold=None, seed=42): ...
def undersample(train, to='min', seed=42): ...
def one_vs_rest(items, label, take=.1, seed=42): ...
def class_weights(train): ...
def presize_tfms(size, *, min_scale=.75, **aug): ...
def fold_dls(items, fold, *, size, presize=None, method='squish', bs=64, oversample=None, aug=True, stats='auto', cache=None, seed=42,
             num_workers=None, item_tfms=None, batch_tfms=None, **kw): ...
def channel_stats(items, size=224): ...
def SoftTargetCE(weight=None, label_smoothing=0., reduction='mean'): ...
def make_learner(dls, arch, *, pretrained=True, weights=None): ...
def cross_validate(items, config=None, *, make=None, out, resume=True): ...
def Experiment(config): ...
def load_run(path): ...
def write_submission(preds, sample, out): ...
def soften_labels(given, oof, a=.5, when='disagree', use='hard'): ...
def soften_items(items, oof, **kw): ...
def SoftLabels(table): ...
def ProgressiveLabelCorrection(rule='ratio', warmup=.2, ids=None): ...
def MixUp(alpha=.4, num_classes=None): ...
def CutMix(alpha=1.): ...
def CutMixUp(): ...
def fit_progressive(learn, stages): ...
def Stage(size, epochs, lr, bs=None): ...
def compare_runs(a, b): ...
def create_model(name, num_classes=1000, in_chans=3): ...
def list_zoo(): ...
def zoo_table(names): ...
def tta(learn, dl=None, n=4, beta=.25, merge='mean', seed=0): ...
def attribute(learn, image, method='integrated_gradients'): ...
''').body

@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    "A copy of the project to build and export in."
    to = tmp_path_factory.mktemp('tree')/'imgclf'
    shutil.copytree(ROOT, to, symlinks=True, ignore=shutil.ignore_patterns('.git', '.venv', '_docs', '_proc', 'build', 'dist', 'runs', '*.egg-info', '__pycache__', '.*_cache',
                                                                           '.hypothesis', '.ipynb_checkpoints', 'shared'))
    return to

def texts(folder, pattern): return {p.relative_to(folder).as_posix(): p.read_text(encoding='utf-8') for p in sorted(folder.rglob(pattern)) if '.ipynb_checkpoints' not in p.parts}

def differences(a, b): return sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))

# What importing costs

def test_import_is_light(python):
    "The package alone must not bring the heavy libraries along: the command line starts with it."
    code = 'import sys, time; t = time.process_time(); import imgclf; print(time.process_time() - t); print([m for m in ("torch", "fastai", "pandas", "matplotlib") if m in sys.modules])'
    runs = [python(code) for _ in range(3)]
    assert all(code == 0 for code, *_ in runs), runs[0][2]
    seconds, heavy = zip(*(out.split('\n')[:2] for _, out, *_ in runs))
    assert set(heavy) == {'[]'}
    assert statistics.median(map(float, seconds)) < .3

@pytest.mark.skipif(not (LIB/'cli.py').exists(), reason='no command line yet')
@pytest.mark.parametrize('command', ['', 'demo', 'scan', 'fit', 'predict', 'submit', 'tta', 'compare', 'runs', 'rerun', 'clean', 'blend', 'zoo', 'bench', 'search', 'weights', 'cache', 'export'])
def test_help_is_instant(sh, script, command):
    runs = [sh(script('imgclf'), *command.split(), '--help') for _ in range(3)]
    assert all(code == 0 and 'Usage' in out for code, out, *_ in runs), runs[0]
    assert statistics.median(r[3] for r in runs) < 1

# What the star import gives

@pytest.fixture(scope='module')
def names():
    ns = {}
    exec('from imgclf.all import *', ns)
    return ns

def test_all_has_the_contract(names):
    missing = [f.name for f in CONTRACT if f.name not in names]
    assert not missing, f'imgclf/all.py does not give {", ".join(missing)}'
    foreign = [f.name for f in CONTRACT if not names[f.name].__module__.startswith('imgclf.')]
    assert not foreign, f"these are another library's: {foreign}"
    for name in ('elpv', 'mnist5k', 'fashion_mnist', 'digits', 'imagenet_model'): assert callable(getattr(names['demo'], name))
    for name in ('Learner', 'vision_learner', 'DataBlock', 'accuracy', 'L'): assert names[name].__module__.startswith(('fastai', 'fastcore')), f"{name}: fastai's is hidden"

@pytest.mark.parametrize('f', CONTRACT, ids=lambda f: f.name)
def test_signature_keeps_the_contract(names, f):
    if f.name not in names: pytest.skip('not in imgclf.all')
    has = inspect.signature(names[f.name]).parameters
    ns = {}
    exec(ast.unparse(f), ns)
    anything = any(p.kind == p.VAR_KEYWORD for p in has.values())
    for name, want in inspect.signature(ns[f.name]).parameters.items():
        if want.kind == want.VAR_KEYWORD: continue
        assert name in has or (anything and want.kind == want.KEYWORD_ONLY), f'{f.name} lost {name}'
        if name in has and want.default is not want.empty: assert has[name].default == want.default, f'{f.name}: {name} is {has[name].default} by default, not {want.default}'

# Notebooks, modules, README

def test_modules_are_exported(tree, sh, script):
    "Exported anew into a folder with the hand-written files only, every module and the index come out as they are here, and none is left over."
    for p in (tree/'imgclf').rglob('*.py'):
        if p.name == '_modidx.py' or 'AUTOGENERATED' in p.read_text(encoding='utf-8'): p.unlink()
    code, out, err, _ = sh(script('nbdev-export'), cwd=tree)
    assert code == 0, err
    differ = differences(texts(LIB, '*.py'), texts(tree/'imgclf', '*.py'))
    assert not differ, f'run nbdev-export: {", ".join(differ)} is not what the notebooks say'

def test_notebooks_are_clean(tree, sh, script):
    code, out, err, _ = sh(script('nbdev-clean'), cwd=tree)
    assert code == 0, err
    differ = differences(texts(ROOT/'nbs', '*.ipynb'), texts(tree/'nbs', '*.ipynb'))
    assert not differ, f'run nbdev-clean: {", ".join(differ)}'

def test_readme_is_the_first_page(sh):
    code, out, err, _ = sh(sys.executable, ROOT/'.ci/readme', '--check')
    assert code == 0, err

def test_readme_names_the_commands(root):
    text = (root/'README.md').read_text(encoding='utf-8')
    for extra, command in (('demo', 'imgclf demo'), ('dev', 'pytest')):
        assert f"\npython3 -m venv .venv && .venv/bin/pip install -e '.[{extra}]' && .venv/bin/{command}\n" in text

# Package and requirements

def test_wheel_holds_everything(tree, sh, tmp_path):
    code, out, err, _ = sh(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', tmp_path, tree)
    assert code == 0, out + err
    with zipfile.ZipFile(next(tmp_path.glob('*.whl'))) as z: inside = set(z.namelist())
    wanted = {p.relative_to(ROOT).as_posix() for pat in ('*.py', '*.yaml', 'py.typed') for p in LIB.rglob(pat)}
    assert wanted <= inside, f'not in the wheel: {sorted(wanted - inside)}'
    assert {o.split('/')[0] for o in inside} == {'imgclf', next(o.split('/')[0] for o in inside if '.dist-info' in o)}, 'the wheel holds a second package'
    assert any(o.endswith('LICENSE') for o in inside)

def versions(name): return dict(line.split('==') for line in (ROOT/name).read_text().lower().split('\n') if line and not line.startswith('#'))

def requirements():
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT/'settings.ini')
    lines = '\n'.join([ini['DEFAULT']['requirements'], *(v for k, v in ini['extras'].items() if k not in ini.defaults())]).split('\n')
    return [Requirement(o) for o in map(str.strip, lines) if o and not o.startswith('imgclf')]

@pytest.mark.parametrize('req', requirements(), ids=str)
def test_constraints_lie_in_the_ranges(req):
    name = req.name.lower()
    norm = lambda d: {k.replace('_', '-'): v for k, v in d.items()}
    newest, oldest = norm(versions('constraints.txt')), norm(versions('constraints-min.txt'))
    assert name in newest and req.specifier.contains(newest[name]), f'constraints.txt: {newest.get(name)}'
    if name in oldest: assert req.specifier.contains(oldest[name]), f'constraints-min.txt: {oldest[name]}'

def test_lower_bounds_are_the_ones_tried():
    ini = ConfigParser(delimiters=['='], interpolation=None)
    ini.read(ROOT/'settings.ini')
    oldest = versions('constraints-min.txt')
    for line in map(str.strip, ini['DEFAULT']['requirements'].split('\n')):
        req = Requirement(line)
        bound = re.search(r'>=([\d.]+)', line)[1]
        tried = oldest.get(req.name.lower(), 'no version of it')
        assert tried.startswith(bound), f'{line}: constraints-min.txt tries {tried}'

def test_outputs_name_no_machine():
    "No saved output shows where it was made."
    shown = [f'{name}:{n}' for name, text in texts(ROOT/'nbs', '*.ipynb').items() for n, line in enumerate(text.split('\n'), 1) if re.search(r'/site-packages/|/imgclf/[\w/]+\.py:\d+', line)]
    assert not shown, f"remove these outputs (a library's warning?): {shown}"
