"Trackers for real: what TensorBoard and Weights & Biases read back, over kills, resumes, broken services and packages that are not there."
import json, os, re, shutil, signal, subprocess, sys, time, warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from imgclf.core import InputError
from imgclf.crossval import cross_validate
from imgclf.experiment import Experiment

pytest.importorskip('tensorboard'); pytest.importorskip('wandb')
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

SETTINGS = dict(arch='test_resnet', pretrained=False, size=24, bs=8, folds=2, epochs=2, freeze_epochs=1, lr=1e-2, duplicates=False, num_workers=0, precision='fp32')
ROWS = 24      # two folds: 12 images to train on, 2 batches an epoch, 3 epochs, 6 batches in all

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    "Sums are rounded alike in all processes."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def quiet(m, home):
    "Weights & Biases without a network, a login, or anybody's caches."
    for k in [k for k in os.environ if k.startswith('WANDB_')]: m.delenv(k)
    for k, v in dict(WANDB_MODE='offline', WANDB_ERROR_REPORTING='false', WANDB_CONFIG_DIR=home/'config', WANDB_CACHE_DIR=home/'cache', WANDB_DATA_DIR=home/'data').items(): m.setenv(k, str(v))

@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory): quiet(monkeypatch, tmp_path_factory.mktemp('home'))

@pytest.fixture(scope='module')
def items(tmp_path_factory):
    folder, rng, rows = tmp_path_factory.mktemp('images'), np.random.default_rng(0), []
    for i in range(ROWS):
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(folder/f'{i}.png')
        rows.append(dict(id=str(i), path=str(folder/f'{i}.png'), label='ab'[i % 2], fold=i // 2 % 2))
    return pd.DataFrame(rows)

@pytest.fixture(scope='module')
def untracked(items, tmp_path_factory): return cross_validate(items, SETTINGS, out=tmp_path_factory.mktemp('plain')/'run', progress=False)

def run(items, out, track, **kw): return cross_validate(items, dict(SETTINGS, track=track), out=out, progress=False, **kw)

def events(folder):
    found = EventAccumulator(str(folder), size_guidance=dict(scalars=0)).Reload()
    return pd.DataFrame({k: pd.Series({e.step: e.value for e in found.Scalars(k)}) for k in found.Tags()['scalars']}), found

def records(file):
    "What is in a file of Weights & Biases: LevelDB's log of records (checksum, length, part) in blocks of 32 KiB after seven bytes of its own."
    data, at, whole = file.read_bytes(), 7, b''
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7: at += left; continue
        n, part = int.from_bytes(data[at + 4:at + 6], 'little'), data[at + 6]
        if part == 0: break
        whole, at = whole + data[at + 7:at + 7 + n], at + 7 + n
        if part in (1, 4): yield wandb_internal_pb2.Record.FromString(whole); whole = b''

def offline_run(*parts):
    "Config, history, last summary, identity and exit codes of one run that was kept offline, in one folder or after a resume in several."
    config, rows, summary, about, exits = {}, [], {}, {}, []
    for r in (r for part in parts for file in part.glob('run-*.wandb') for r in records(file)):
        kind = r.WhichOneof('record_type')
        if kind == 'run':
            about = dict(id=r.run.run_id, name=r.run.display_name, group=r.run.run_group, project=r.run.project)
            config |= {o.key: json.loads(o.value_json) for o in r.run.config.update}
        elif kind == 'history': rows.append({(o.key or o.nested_key[0]): json.loads(o.value_json) for o in r.history.item})
        elif kind == 'summary': summary |= {(o.key or o.nested_key[0]): json.loads(o.value_json) for o in r.summary.update}
        elif kind == 'exit': exits.append(r.exit.exit_code)
    return config, pd.DataFrame(rows), summary, about, exits

def parts_of(out, fold):
    "The id of a fold's run, and its folders, the oldest first."
    key = (out/'wandb'/f'fold{fold}.id').read_text()
    return key, sorted((out/'wandb').glob(f'offline-run-*-{key}'))

# -- both, for a run ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def tracked(items, tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        quiet(m, tmp_path_factory.mktemp('home'))
        return run(items, tmp_path_factory.mktemp('tracked')/'base', 'tensorboard,wandb')

def test_tracking_changes_no_result(tracked, untracked):
    pd.testing.assert_frame_equal(tracked.oof, untracked.oof)
    same = [c for c in untracked.metrics if c != 'seconds']
    pd.testing.assert_frame_equal(tracked.metrics[same], untracked.metrics[same])

@pytest.mark.parametrize('fold', [0, 1])
def test_tensorboard_reads_it_back(tracked, fold):
    curves, found = events(tracked.run.path/'tensorboard'/f'fold{fold}')
    assert curves.index.tolist() == [1, 2, 3, 4, 5, 6] and curves.epoch.dropna().to_dict() == {2: 1, 4: 2, 6: 3}
    mine = tracked.metrics[tracked.metrics.fold == fold]
    for c in ('train_loss', 'valid_loss', 'accuracy', 'lr'): np.testing.assert_allclose(curves[c].dropna(), mine[c], rtol=1e-5, err_msg=c)
    text = found.Tensors('config/text_summary')[0].tensor_proto.string_val[0].decode()
    assert 'arch: test_resnet' in text and f'fold: {fold}' in text
    assert '_hparams_/session_start_info' in found.summary_metadata

def test_wandb_is_one_run_a_fold(tracked):
    folder = tracked.run.path/'wandb'
    assert sorted(o.name for o in folder.glob('*.id')) == ['fold0.id', 'fold1.id'] and len(list(folder.glob('offline-run-*'))) == 2
    for fold in (0, 1):
        key, (one,) = parts_of(tracked.run.path, fold)
        config, rows, summary, about, exits = offline_run(one)
        assert about == dict(id=key, name=f'base/fold{fold}', group='base', project='imgclf')
        assert config['arch'] == 'test_resnet' and config['fold'] == fold and config['lr'] == 1e-2
        mine = tracked.metrics[tracked.metrics.fold == fold]
        assert rows._step.tolist() == [1, 2, 3, 4, 5, 6]
        for c in ('train_loss', 'valid_loss', 'accuracy', 'lr'): np.testing.assert_allclose(rows[c].dropna(), mine[c], rtol=1e-6, err_msg=c)
        assert summary['epoch'] == 3 and summary['accuracy'] == pytest.approx(mine.accuracy.iloc[-1]) and exits == [0]

def test_folds_in_processes(items, untracked, tmp_path):
    both = run(items, tmp_path/'base', 'tensorboard,wandb', jobs=2)
    pd.testing.assert_frame_equal(both.oof, untracked.oof)
    for fold in (0, 1):
        assert events(both.run.path/'tensorboard'/f'fold{fold}')[0].epoch.dropna().tolist() == [1, 2, 3]
        assert offline_run(*parts_of(both.run.path, fold)[1])[2]['epoch'] == 3

# -- resumed -----------------------------------------------------------------------------------------------------------
SCRIPT = """
import sys, json, torch, pandas as pd
torch.set_num_threads(1)
from imgclf.crossval import cross_validate
items = pd.read_csv(sys.argv[1], dtype=dict(id=str))
cross_validate(items, json.loads(sys.argv[3]), out=sys.argv[2], progress=False)
"""

def test_killed_and_resumed_in_the_same_run(items, tmp_path):
    "SIGKILL in the middle of the second fold; the tracker's run goes on, each batch once."
    settings = dict(SETTINGS, epochs=12, track=['tensorboard', 'wandb'])
    items.to_csv(tmp_path/'items.csv', index=False)
    out = tmp_path/'base'
    def start(): return subprocess.Popen([sys.executable, '-c', SCRIPT, str(tmp_path/'items.csv'), str(out), json.dumps(settings)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    p, deadline = start(), time.time() + 200
    while time.time() < deadline and p.poll() is None:
        if (out/'metrics.csv').is_file() and (pd.read_csv(out/'metrics.csv').fold == 1).sum() >= 3: break
        time.sleep(.002)
    p.send_signal(signal.SIGKILL); p.wait()
    assert p.returncode == -signal.SIGKILL, p.stdout.read()
    kept = (pd.read_csv(out/'metrics.csv').fold == 1).sum()
    assert 3 <= kept < 13
    q = start()
    said, _ = q.communicate(timeout=200)
    assert q.returncode == 0, said
    curves, _ = events(out/'tensorboard'/'fold1')
    assert curves.index.tolist() == list(range(1, 27)) and curves.epoch.dropna().tolist() == list(range(1, 14))
    np.testing.assert_allclose(curves.train_loss.dropna(), (mine := pd.read_csv(out/'metrics.csv').query('fold == 1')).train_loss, rtol=1e-5)
    key, (first, second) = parts_of(out, 1)
    _, rows, summary, about, exits = offline_run(second)
    assert about['id'] == key and first.name.endswith(key)
    assert rows.epoch.dropna().tolist() == list(range(1, 14))                      # the later part tells every epoch
    np.testing.assert_allclose(rows.train_loss.dropna(), mine.train_loss, rtol=1e-6)
    assert set(range(2*kept + 1, 27)) <= {*rows._step}                             # and each batch since
    assert summary['epoch'] == 13 and summary['train_loss'] == pytest.approx(mine.train_loss.iloc[-1]) and exits == [0]

def test_tracking_may_begin_later(items, untracked, tmp_path):
    "It belongs to the settings that may differ on resume, and the folder says what holds now."
    def stop(fold, row):
        if (fold, row['epoch']) == (1, 0): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run(items, tmp_path/'run', None, on_epoch=stop)
    res = run(items, tmp_path/'run', 'tensorboard')
    pd.testing.assert_frame_equal(res.oof, untracked.oof)
    assert sorted(o.name for o in (tmp_path/'run'/'tensorboard').iterdir()) == ['fold1']
    assert events(tmp_path/'run'/'tensorboard'/'fold1')[0].index.tolist() == [1, 2, 3, 4]       # what it saw
    assert res.run.config.track == ['tensorboard'] and 'track: [tensorboard]' in (tmp_path/'run'/'config.yaml').read_text()

# -- failing -----------------------------------------------------------------------------------------------------------
def told(f):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        res = f()
    return res, [str(o.message) for o in said if 'left out' in str(o.message) or 'cannot be reached' in str(o.message)]

def test_places_that_cannot_be_written(items, untracked, tmp_path):
    "Files stand where the trackers want folders."
    out = tmp_path/'run'
    for part in range(2):
        def stop(fold, row):
            for name in ('tensorboard', 'wandb'): (out/name).write_text('in the way')
            raise KeyboardInterrupt
        if part == 0:
            with pytest.raises(KeyboardInterrupt): run(items, out, None, on_epoch=stop)
        else: res, said = told(lambda: run(items, out, 'tensorboard,wandb'))
    pd.testing.assert_frame_equal(res.oof, untracked.oof)
    assert len(said) == 2 and said[0].startswith('run: TensorBoard failed (') and said[1].startswith('run: WandB failed (')       # once each, though there are two folds

def test_service_that_dies(items, untracked, tmp_path):
    "The process of Weights & Biases is killed in the middle of a training."
    code = SCRIPT.replace('cross_validate(items, json.loads(sys.argv[3]), out=sys.argv[2], progress=False)', """
import os, pathlib, signal, warnings
def children(of):
    "Its processes and theirs."
    below = [int(o) for t in pathlib.Path(f'/proc/{of}/task').glob('*/children') for o in t.read_text().split()]
    return below + [o for c in below for o in children(c)]
def kill(fold, row):
    if (fold, row['epoch']) != (0, 1): return
    found = [o for o in children(os.getpid()) if 'wandb' in pathlib.Path(f'/proc/{o}/comm').read_text()]
    assert found
    for o in found: os.kill(o, signal.SIGKILL)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    res = cross_validate(items, json.loads(sys.argv[3]), out=sys.argv[2], progress=False, on_epoch=kill)
print(*['SAID ' + str(o.message) for o in said if 'left out' in str(o.message)], sep=chr(10))
""")
    if not Path('/proc/self/task').is_dir(): pytest.skip('finds processes in /proc')
    items.to_csv(tmp_path/'items.csv', index=False)
    p = subprocess.run([sys.executable, '-c', code, str(tmp_path/'items.csv'), str(tmp_path/'run'), json.dumps(dict(SETTINGS, track=['wandb', 'tensorboard']))], capture_output=True, text=True, timeout=300)
    said = [o for o in p.stdout.splitlines() if o.startswith('SAID ')]
    assert p.returncode == 0, p.stderr
    assert 1 <= len(said) <= 2 and all('run: WandB failed (' in o for o in said) and len({*said}) == len(said), said
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path/'run'/'oof.parquet'), untracked.oof)
    for fold in (0, 1): assert events(tmp_path/'run'/'tensorboard'/f'fold{fold}')[0].epoch.dropna().tolist() == [1, 2, 3]     # the other one is whole

def test_no_login_is_kept_offline(items, tmp_path, monkeypatch):
    "Online is asked for, and nobody is logged in: values are kept, and it is said once."
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.setenv('NETRC', str(tmp_path/'none')); monkeypatch.delenv('WANDB_MODE')
    items.to_csv(tmp_path/'items.csv', index=False)
    code = SCRIPT.replace('import sys,', 'import warnings; warnings.simplefilter("always")\nimport sys,')
    p = subprocess.run([sys.executable, '-c', code, str(tmp_path/'items.csv'), str(tmp_path/'run'), json.dumps(dict(SETTINGS, track=['wandb']))], capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert p.returncode == 0, p.stderr
    assert len(re.findall('Weights & Biases cannot be reached .*api.key', p.stderr, re.I)) == 1 and 'left out' not in p.stderr
    for fold in (0, 1): assert offline_run(*parts_of(tmp_path/'run', fold)[1])[2]['epoch'] == 3

def test_not_installed_is_said_before_anything(items, tmp_path, monkeypatch):
    import imgclf.callback.track as module
    found = module.find_spec
    monkeypatch.setattr(module, 'find_spec', lambda name: None if name == 'wandb' else found(name))
    for go in (lambda: run(items, tmp_path/'run', 'wandb'), lambda: Experiment(SETTINGS, track='tensorboard,wandb').run(tmp_path/'run', items, progress=False)):
        with pytest.raises(InputError, match=r"track=wandb needs wandb, not installed here; run: pip install 'imgclf\[track\]'"): go()
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('track', ['wanbd', 'tensorboard,tensorboard', [], 3])
def test_bad_settings(track):
    with pytest.raises(InputError, match='track=.* is not allowed .*tensorboard, wandb'): Experiment(SETTINGS, track=track)

def test_by_the_command_line(sh, script, items, tmp_path):
    for o in items.itertuples(): (tmp_path/'train'/o.label).mkdir(parents=True, exist_ok=True); shutil.copy(o.path, tmp_path/'train'/o.label)
    tiny = ['--arch', 'test_resnet', '--no-pretrained', '--size', '24', '--epochs', '1', '--folds', '2', '--bs', '8', '--set', 'freeze_epochs=0', '--set', 'num_workers=0', '--set', 'precision=fp32']
    code, out, err, _ = sh(script('imgclf'), 'fit', 'train', *tiny, '--track', 'tensorboard,wandb', '--out', 'run', cwd=tmp_path, WANDB_MODE='offline', WANDB_ERROR_REPORTING='false')
    assert code == 0, err
    assert 'tensorboard --logdir run/tensorboard' in out and 'wandb sync run/wandb/offline-run-*' in out and 'Traceback' not in err
    assert events(tmp_path/'run'/'tensorboard'/'fold0')[0].epoch.dropna().tolist() == [1]
    code, _, err, _ = sh(script('imgclf'), 'fit', 'train', *tiny, '--track', 'tensorbord', '--out', 'no', cwd=tmp_path)
    assert code == 2 and "track='tensorbord' is not allowed" in err and not (tmp_path/'no').exists()
