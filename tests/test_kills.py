"Kills at moments that chance chooses, and at the worst ones: the run that was killed ends in what one that was left alone found."
import json, os, signal, subprocess, sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from imgclf.core import atomic_path

# Everything is imported once, then each attempt is a fork of it: a kill costs no new start.
SCRIPT = '''
import json, os, random, shutil, signal, sys, time, warnings
warnings.filterwarnings('ignore')
import torch
torch.set_num_threads(1)
from pathlib import Path
from imgclf.crossval import cross_validate
from imgclf.data.source import items_from_folder
from imgclf.runs import Run
root = Path(sys.argv[1])
items = items_from_folder(root/'images')
config = dict(arch='test_resnet', pretrained=False, folds=3, bs=6, schedule='one_cycle', stages=[dict(size=16, epochs=2), dict(size=24, epochs=2, bs=4)], label_smoothing=.1, mix='mixup', mix_off_last=1,
              plc='margin', plc_warmup=1, plc_theta=[0., 0.], plc_scoring='clean', accumulate=2, average='ema', ema_decay=.9, clip=.5, num_workers=0, precision='fp32', duplicates=False)

def attempt(out, seconds=None, before=lambda: None):
    "Train in a fork of this process, and kill it so long after it began its work (or let `before` see to it); whether it was killed."
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            before()
            cross_validate(items, config, out=out, progress=False, on_epoch=None)
            os._exit(0)
        except BaseException as e:
            print(repr(e), flush=True)
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status): return True
    assert os.WEXITSTATUS(status) == 0, status
    return False
'''

BY_CHANCE = '''seed, kills = int(sys.argv[2]), int(sys.argv[3])
start = time.time()
attempt(root/'whole')
whole, rng = time.time() - start, random.Random(seed)
done, moments = [], []
while len(moments) < kills:
    out = root/f'run{len(done)}'
    if attempt(out, rng.uniform(.02, .5)*whole):
        epochs = len(Run(out).metrics) if (out/'run.json').is_file() else -1
        moments.append(epochs)
    else: done.append(out.name)
out = root/f'run{len(done)}'
attempt(out)
print(json.dumps(dict(done=[*done, out.name], moments=moments)))
'''

AT_THE_WORST = '''import imgclf.core, imgclf.crossval
from imgclf.runs import open_run

def kill(): os.kill(os.getpid(), signal.SIGKILL)

def before_table(name, fold, epochs):
    "Die when the state of so many epochs is saved, and the fold's rows are to be put into the table."
    write = imgclf.crossval.write_rows
    def patched(path, k, rows):
        states = Run(path.parent).state_file(k)
        if path.name == name and k == fold and imgclf.crossval.load_tensors(states)[1]['rows'][-1]['epoch'] == epochs - 1: kill()
        write(path, k, rows)
    imgclf.crossval.write_rows = patched

def half_written(name, nth):
    "Die when the file has been written under its temporary name, the nth time."
    replace, seen = os.replace, []
    def patched(tmp, path):
        if Path(path).name == name:
            seen.append(1)
            if len(seen) == nth: kill()
        replace(tmp, path)
    imgclf.core.os.replace = patched

attempt(root/'whole')
moments = dict(metrics_last=(before_table, 'metrics.csv', 0, 4), ledger_last=(before_table, 'ledger.csv', 2, 4),
               run=(half_written, 'run.json', 1), state=(half_written, 'fold1.safetensors', 2), oof=(half_written, 'oof.parquet', 2), model=(half_written, 'fold0.json', 1))
left = {}
for name, (how, *args) in moments.items():
    out = root/name
    assert attempt(out, before=lambda: how(*args)), f'{name}: it was not killed'
    left[name] = sorted(o.name for o in out.rglob('*.tmp*'))
    for o in ('report.html', 'corrections.csv'): (out/f'.{o}.999999999.tmp{Path(o).suffix}').write_text('written without the lock')
    attempt(out)
print(json.dumps(left))
'''

def start(folder, script, *args):
    "Run a script on images that it finds in the folder; what it printed last."
    rng = np.random.default_rng(0)
    for k, label in enumerate(('blue', 'green', 'red')):
        (folder/'images'/label).mkdir(parents=True)
        for i in range(12):
            px = rng.integers(0, 200, (28, 28, 3), dtype=np.uint8); px[..., 2 - k] += 55
            Image.fromarray(px).save(folder/'images'/label/f'{i}.png')
    p = subprocess.run([sys.executable, '-c', SCRIPT + script, str(folder), *args], capture_output=True, text=True, timeout=900, env=os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    assert p.returncode == 0, p.stdout + p.stderr
    return json.loads(p.stdout.splitlines()[-1])

def same(run, whole):
    "To the last bit, and with nothing left lying about."
    pd.testing.assert_frame_equal(pd.read_parquet(run/'oof.parquet'), pd.read_parquet(whole/'oof.parquet'))
    for f in ('metrics.csv', 'ledger.csv'):
        one, other = (pd.read_csv(d/f).drop(columns='seconds', errors='ignore') for d in (run, whole))
        pd.testing.assert_frame_equal(one, other)
    assert not (left := sorted(o.name for o in (run/'state').iterdir())), left

@pytest.mark.parametrize('seed', [0])
def test_twenty_kills(tmp_path, seed):
    found = start(tmp_path, BY_CHANCE, str(seed), '20')
    assert len(found['moments']) == 20 and len(set(found['moments'])) >= 5, found       # kills fell into different epochs, and not all before the first
    for o in found['done']:
        same(tmp_path/o, tmp_path/'whole')
        assert not list((tmp_path/o).rglob('*.tmp*'))

def test_killed_at_the_worst_moments(tmp_path):
    "Between a state and the tables' rows that belong to it, and with a file half written; what others may be writing in the folder stays."
    left = start(tmp_path, AT_THE_WORST)
    assert {k for k, v in left.items() if v} == {'run', 'state', 'oof', 'model'}, left      # there was something to clear away
    for name in left:
        same(tmp_path/name, tmp_path/'whole')
        assert {o.name for o in (tmp_path/name).rglob('*.tmp*')} == {'.report.html.999999999.tmp.html', '.corrections.csv.999999999.tmp.csv'}, name

def test_living_processes_files_stay(tmp_path):
    "A temporary file of a process that lives is its own affair, whatever it is called; one whose process is gone goes."
    from imgclf.runs import clear_leftovers
    (tmp_path/'state').mkdir(); (tmp_path/'models').mkdir()
    dead, living = subprocess.Popen([sys.executable, '-c', '']), subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)
    dead.wait()
    try:
        names = ['.metrics.csv.{}.tmp.csv', 'state/.fold0.safetensors.{}.tmp.safetensors', 'models/.fold2.json.{}.tmp.json']
        others = ['.table.csv.{}.tmp.csv', '.fold0.safetensors.{}.tmp.safetensors', 'metrics.csv.{}.tmp.csv']      # of a benchmark's folder; not where a run has it; not a name of atomic_path's
        for o in names + others:
            for p in (dead, living): (tmp_path/o.format(p.pid)).write_text('half')
        held, loose = tmp_path/'state'/'.tmpAbC123', tmp_path/'state'/'.tmpXyZ789'       # as safetensors names what it is writing: no number tells whose it is
        loose.write_text('half')
        with open(held, 'w'): clear_leftovers(tmp_path)
        assert held.exists() and not loose.exists()
        held.unlink()
        there = {o.relative_to(tmp_path).as_posix() for o in tmp_path.rglob('*') if o.is_file()}
        assert there == {o.format(living.pid) for o in names + others} | {o.format(dead.pid) for o in others}
    finally: living.communicate(b'\n')
    with atomic_path(tmp_path/'oof.parquet') as tmp:                 # the name that is looked for is the name that is given
        tmp.write_text('half')
        clear_leftovers(tmp_path)
        assert not tmp.exists()                                       # of this very process number: who opens a run has written nothing yet
        tmp.write_text('whole')
