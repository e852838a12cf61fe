"A batch that is halved until it fits, where memory is really refused: a process with a limit of its own, the command line, and everything that reads a run's batch size."
import json, os, subprocess, sys
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from imgclf.bench import BenchConfig, run_bench
from imgclf.config import Config
from imgclf.data.source import items_from_folder
from imgclf.experiment import load_run
from imgclf.models.build import Classifier
from imgclf.one_vs_rest import one_vs_rest_study
from imgclf.runs import Run, load_tensors
from imgclf.search import SearchConfig, run_search

TINY = ['--arch', 'test_resnet', '--no-pretrained', '--size', '32', '--folds', '2', '--set', 'freeze_epochs=0', '--set', 'num_workers=0', '--set', 'precision=fp32', '--set', 'duplicates=false']

# Each image of a training batch takes 64 MiB of address space. The process may have 1.5 GiB more than it has after its imports: 16 images fit, 32 do not.
LIMITED = '''
import json, resource, sys, traceback
import torch, imgclf.all
from imgclf.cli import main
from imgclf.experiment import load_run
from imgclf.models.build import Classifier
torch.set_num_threads(1)
real = Classifier.forward
def forward(self, x):
    room = torch.empty(len(x) << 26, dtype=torch.uint8) if self.training else None
    return real(self, x)
Classifier.forward = forward
def limit(gib):
    used = int(open('/proc/self/statm').read().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(gib*2**30) if gib else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for line in sys.stdin:
    gib, *args = json.loads(line)
    limit(gib)
    print('$', *args, file=sys.stderr)
    try: main(args)
    except SystemExit as e: code = e.code or 0
    except BaseException: code = -1; traceback.print_exc()
    limit(0)
    print('code', code, file=sys.stderr, flush=True)
'''

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    d, rng = tmp_path_factory.mktemp('batch'), np.random.default_rng(0)
    for i in range(144):
        px = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8); px[..., i % 2] += 100
        file = d/('new' if i >= 140 else f'train/{"ab"[i % 2]}')/f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(px).save(file)
    return d

def fit(out, *more, epochs=2): return ['fit', 'train', *TINY, '--epochs', str(epochs), '--out', out, *more]

@pytest.fixture(scope='module')
def limited(world, clean_env):
    "What several commands said, one after another in a process whose memory is limited in some of them: (exit code, text) by number."
    lines = [(1.5, *fit('full', '--bs', '64')), (1.5, *fit('auto', '--bs', 'auto')), (0, *fit('auto', '--bs', 'auto')), (0, *fit('by-hand', '--bs', '16', '--accumulate', '4')), (0, *fit('full', '--bs', '64')), (.05, *fit('none', '--bs', 'auto'))]
    env = clean_env | dict(PYTHONPATH=os.environ.get('PYTHONPATH', ''), PYTHONWARNINGS='ignore')
    p = subprocess.run([sys.executable, '-c', LIMITED], cwd=world, env=env, input='\n'.join(map(json.dumps, lines)) + '\n', capture_output=True, text=True, timeout=500)
    parts = p.stderr.split('\n$ ')[-len(lines):]
    assert p.returncode == 0 and len(parts) == len(lines), p.stderr[-3000:]
    return [(int(o.rsplit('\ncode ', 1)[1].split()[0]), o) for o in parts]

def test_memory_used_up_in_training(world, limited):
    code, said = limited[0]
    assert code == 2 and 'Traceback' not in said
    message = said[said.index('imgclf: fold 0'):].split('\ncode')[0].strip()
    assert '\n' not in message and 'batches of 64 images of 32 pixels (another 4,096 MiB asked for)' in message and 'bs=auto' in message and 'bs=32 and accumulate=2' in message

def test_goes_on_when_there_is_room(world, limited):
    assert limited[4][0] == 0
    run = Run(world/'full')
    assert run.oof.notna().all(axis=None) and run.config.bs == 64 and not list((world/'full').rglob('*.tmp*'))

def test_halved_and_kept(world, limited):
    assert limited[1][0] == 0 and 'bs: auto found {bs: 16, accumulate: 4}' in limited[1][1]
    assert limited[2][0] == 0 and 'found' not in limited[2][1].replace('run folder', '')          # resumed with room for 64: not searched again
    auto, by_hand = Run(world/'auto'), Run(world/'by-hand')
    assert (auto.config.bs, auto.config.accumulate, auto.asked.bs, auto.asked.accumulate) == (16, 4, 'auto', None)
    assert auto.config.diff(by_hand.config) == {}

def test_same_numbers_by_hand_to_the_last_bit(world, limited):
    pd.testing.assert_frame_equal(Run(world/'auto').oof, Run(world/'by-hand').oof, check_exact=True)
    for k in (0, 1):
        a, b = (load_tensors(world/o/'models'/f'fold{k}.safetensors')[0] for o in ('auto', 'by-hand'))
        assert a.keys() == b.keys() and all(torch.equal(a[o], b[o]) for o in a)

def test_nothing_fits(world, limited):
    code, said = limited[5]
    assert code == 2 and 'a training step with 2 images does not fit into the memory' in said and 'Traceback' not in said
    assert not (world/'none').exists()

# From here on without a limit: the allocator is asked for 128 TiB, which nobody has

@pytest.fixture
def four_fit():
    "Four images of 32 pixels fit; `seen` holds the sizes of the batches that were tried."
    real, seen = Classifier.forward, []
    def forward(self, x):
        if self.training:
            seen.append(len(x))
            if x.numel() > 4*3*32*32: torch.empty(1 << 47, dtype=torch.uint8)
        return real(self, x)
    with patch.object(Classifier, 'forward', forward): yield seen

def test_every_reader_takes_the_numbers_found(world, imgclf, four_fit):
    code, out, err = imgclf(*fit('four', '--bs', 'auto', epochs=1))
    assert code == 0 and 'bs: auto found {bs: 4, accumulate: 16}' in err, err
    assert max(four_fit) == 64
    four_fit.clear()
    run = load_run(world/'four')
    assert run.learner(1).dls.train.bs == 4
    assert imgclf('predict', 'four', 'new', '--out', 'preds.csv')[0] == 0 and len(pd.read_csv(world/'preds.csv')) == 4
    assert imgclf('report', 'four')[0] == 0
    assert 'four' in imgclf('runs', '.', '--where', 'bs=4')[1]
    assert imgclf('rerun', 'four', '--out', 'again')[0] == 0 and max(four_fit) == 4          # nowhere searched again
    pd.testing.assert_frame_equal(Run(world/'again').oof, run.oof, check_exact=True)
    assert imgclf('rerun', 'four', '--out', 'anew', '--set', 'bs=auto')[0] == 0 and max(four_fit) == 64      # asked for once more
    assert Run(world/'anew').config == run.config
    code, out, err = imgclf('config', 'four')
    assert '\nbs: 4 ' in out and '\naccumulate: 16 ' in out

def test_bench_search_and_one_vs_rest(world, four_fit, monkeypatch):
    monkeypatch.chdir(world)
    items = items_from_folder(world/'train').groupby('label').head(20).reset_index(drop=True)
    base = dict(source='train', size=32, schedule='one_cycle', epochs=1, precision='fp32', num_workers=0, duplicates=False, pretrained=False, bs='auto')
    bench = BenchConfig(recipe='baseline', settings=base, models=dict(a=dict(arch='test_resnet')), test=dict(share=.25))
    table = run_bench(bench, world/'bench', items, progress=False)
    assert table.score.notna().all() and Run(next((world/'bench').rglob('run.json')).parent).config.bs == 4
    four_fit.clear()
    run_bench(bench, world/'bench', items, progress=False)
    assert not four_fit          # neither trained nor searched again
    found = run_search(SearchConfig(settings=base | dict(arch='test_resnet', folds=2), space=dict(lr=[1e-2, 1e-3]), trials=2, prune=False), world/'search', items, progress=False)
    assert (found.run.config.bs, Config.load(world/'search'/'best.yaml').accumulate) == (4, 16)
    one_vs_rest_study(items, base | dict(arch='test_resnet', folds=2), out=world/'rest', progress=False)
    assert {Run(o.parent).config.bs for o in (world/'rest').rglob('run.json')} == {4}
