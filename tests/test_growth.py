"What grows with the number of images: a table of predictions is not held twice, and work is counted, not timed."
import json

import numpy as np
import pandas as pd
import pytest

N, C = 120_000, 200

SCRIPT = '''
import ctypes, gc, json, sys, warnings; warnings.filterwarnings('ignore')
import numpy as np, pandas as pd, pyarrow as pa
from pathlib import Path
from imgclf.blend import blend_runs
from imgclf.calibration import calibrate_run
from imgclf.compare import compare_runs
from imgclf.config import Config
from imgclf.results import aligned, confusion, per_image
from imgclf.runs import Run, open_run
import imgclf.calibration
root = Path(sys.argv[1])
def rss(key): return next(int(l.split()[1])*1024 for l in open('/proc/self/status') if l.startswith(key + ':'))
def made(name, N, C):
    items = pd.DataFrame(dict(id=[f'{i:07d}' for i in range(N)], path='x.png', label=[f'c{i % C:03d}' for i in range(N)], fold=np.arange(N)*7 % 5))
    with open_run(root/name, items, Config(folds=5)) as run: return run
def fold(run, k, seed):
    at = np.flatnonzero(run.items.fold == k)
    p = np.random.default_rng([seed, k]).random((len(at), len(run.vocab)), np.float32)
    p[np.arange(len(at)), run.targets()[at]] += .5
    p /= p.sum(1, keepdims=True)
    return run.items.id[at].to_numpy(object), p
def write(runs):
    for seed, run in enumerate(runs):
        for k in range(5): run.put_oof(*parts[run.path.name, k])
imgclf.calibration.minimize_scalar = lambda f, bounds, **kw: type('res', (), dict(x=min((.1, .2), key=f)))      # two steps of the search are like fifty
steps = dict(write=write, read=lambda r: r[0].oof, scores=lambda r: r[0].scores(), log_loss=lambda r: r[0].scores('log_loss', interval=False), aligned=lambda r: aligned(r[0]), per_image=lambda r: per_image(r[0]), confusion=lambda r: confusion(r[0]),
             calibration=lambda r: calibrate_run(r[0], n=10), compare=lambda r: compare_runs(*r, n=10), blend=lambda r: blend_runs(*r))
tiny, large = [made(o, 200, 4) for o in ('small', 'other')], [made(o, int(sys.argv[2]), int(sys.argv[3])) for o in ('a', 'b')]
found = {}
for k, f in steps.items():
    parts = {(o.path.name, i): fold(o, i, s) for s, o in enumerate(tiny) for i in range(5)} if k == 'write' else None
    f(tiny)                     # whatever is loaded at first use
    if k == 'write': parts = {('a', i): fold(large[0], i, 0) for i in range(5)}
    gc.collect(); pa.default_memory_pool().release_unused(); ctypes.CDLL(None).malloc_trim(0)
    open('/proc/self/clear_refs', 'w').write('5')
    before = rss('VmRSS')
    f(large if k != 'write' else large[:1])
    found[k] = (rss('VmHWM') - before)/(int(sys.argv[2])*int(sys.argv[3])*4)
    if k == 'write': parts = {('b', i): fold(large[1], i, 1) for i in range(5)}; write(large[1:]); parts = None
print(json.dumps(found))
'''

MOST = dict(write=2, read=1.5, scores=2, log_loss=2, aligned=1.6, per_image=2, confusion=2, calibration=2, compare=4, blend=6)      # of one table; the last two read two

def test_predictions_are_held_once(python, tmp_path):
    "Peak memory over what there was before, in sizes of the table (96 MB as float32)."
    code, out, err, _ = python(f'import sys; sys.argv = ["", {str(tmp_path)!r}, "{N}", "{C}"]\n' + SCRIPT)
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])
    print({k: round(v, 2) for k, v in found.items()})
    assert not (over := {k: (round(v, 2), MOST[k]) for k, v in found.items() if v > MOST[k]}), over

def test_same_file_as_pandas(tmp_path):
    "Written in parts and by folds, in any order of images, `oof.parquet` is what pandas would have written at once; and a file of pandas' own is read."
    from imgclf.config import Config
    from imgclf.runs import open_run
    n, rng = 30_000, np.random.default_rng(0)
    items = pd.DataFrame(dict(id=[f'{i:05d}' for i in rng.permutation(n)], path='x.png', label=[f'a.{i % 90}' if i % 2 else f'a.{i % 90}.b' for i in range(n)], fold=np.arange(n) % 3))
    with open_run(tmp_path/'run', items, Config(folds=3)) as run:
        p = rng.random((n, len(run.vocab)), np.float32)
        for k in (2, 0, 1):
            assert run.lacking(run.partial_oof()) == {o: n//3 for o in range(3) if o not in [2, 0, 1][:[2, 0, 1].index(k)]}
            at = rng.permutation(np.flatnonzero(items.fold == k))
            run.put_oof(items.id.to_numpy(object)[at], p[at])
    whole = items[['id', 'fold']].assign(**dict(zip(run.prob_cols, p.T)))
    whole.to_parquet(tmp_path/'whole.parquet')
    found, ref = pd.read_parquet(run.path/'oof.parquet'), pd.read_parquet(tmp_path/'whole.parquet')
    pd.testing.assert_frame_equal(found, ref)
    pd.testing.assert_frame_equal(run.oof, ref)
    few = items.sample(500, random_state=0)
    assert (run.probs(few) == p[few.index]).all() and np.shares_memory(run.probs(items, oof := run.oof), oof.iloc[:, 2:].to_numpy())
    whole.to_parquet(run.path/'oof.parquet')
    pd.testing.assert_frame_equal(run.oof, ref)

@pytest.mark.parametrize('metric', ['accuracy', 'macro_f1', 'log_loss', 'roc_auc', 'kappa'])
def test_a_draw_does_not_copy_the_table(metric):
    "What a bootstrap needs of each row is worked out once: a draw of rows touches no row of probabilities, but for roc_auc, which ranks them."
    from imgclf.metrics import _Rows, _value
    seen, rng = [], np.random.default_rng(0)
    class Counted(_Rows):
        def normal(self, at=slice(None)): seen.append(len(self.probs[at])); return super().normal(at)
    p = rng.dirichlet(np.ones(4), 1000)
    rows = Counted(p, rng.integers(0, 4, 1000))
    for _ in range(20): _value(metric, rows, rng.integers(0, 1000, 1000))
    assert sum(seen) <= 1000

def test_folds_of_a_million_rows():
    "In groups, under ten seconds of processor time on one core, and with no quadratic step: four times the rows, not much more than four times the time."
    import time
    from imgclf.data.fold import make_folds
    def spent(n):
        rng = np.random.default_rng(0)
        items = pd.DataFrame(dict(id=np.arange(n).astype(str), label=rng.integers(0, 10, n).astype(str), patient=rng.integers(0, n//4, n)))
        t = time.process_time(); made = make_folds(items, group_col='patient', duplicates=False); t = time.process_time() - t
        assert (made.groupby('patient').fold.nunique() == 1).all()
        return t
    spent(1000)
    small, large = spent(250_000), spent(1_000_000)
    assert large < 10 and large < 4*1.8*small, (small, large)
