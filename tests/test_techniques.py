"Every technique as a setting, alone and together, from the command line; what cannot be is refused before a folder is made; a kill loses nothing."
import os, signal, subprocess, sys, time

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from imgclf.cli import main

BASE = ['--arch', 'test_resnet', '--no-pretrained', '--size', '24', '--folds', '2', '--bs', '4', '--schedule', 'one_cycle', '--epochs', '2',
        '--set', 'num_workers=0', '--set', 'precision=fp32', '--set', 'duplicates=false']

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Twelve squares of three colours in class folders and in a table with two wrong labels, and a finished run on the table."
    d = tmp_path_factory.mktemp('techniques')
    rng, rows, classes = np.random.default_rng(0), [], ['blue', 'green', 'red']
    for i in range(24):
        px = rng.integers(0, 150, (28, 28, 3), dtype=np.uint8); px[..., 2 - i % 3] += 90
        truth = classes[i % 3]
        (d/'train'/truth).mkdir(parents=True, exist_ok=True)
        Image.fromarray(px).save(d/'train'/truth/f'{i}.png')
        rows.append(dict(image=f'{truth}/{i}.png', label='red' if i in (4, 9) else truth, truth=truth))
    pd.DataFrame(rows).to_csv(d/'table.csv', index=False)
    return d

def without(args, *names): return [o for a, o in zip([None, *args], args) if o not in names and a not in names]    # options with their values

TABLE = ['train', '--labels', 'table.csv', '--id-col', 'image', '--label-col', 'label', '--clean-col', 'truth']

@pytest.fixture(scope='module')
def base(world):
    os.chdir(world)
    with pytest.raises(SystemExit) as e: main(['fit', *TABLE, *BASE, '--out', 'runs/base'])
    assert not e.value.code
    return world/'runs/base'

ALONE = {'oversample': '--oversample balance', 'undersample': '--undersample min', 'sampler': '--sampler weighted', 'weights': '--class-weights balance', 'own weights': "--class-weights {red:2,green:1,blue:1}",
         'focal': '--loss focal --label-smoothing .1', 'bce': '--loss bce', 'mixup': '--mix mixup', 'cutmix': '--mix cutmix --set mix_off_last=1', 'soft': '--soft-labels runs/base --set soft_when=always --set soft_use=proba',
         'ratio': '--plc ratio --set plc_warmup=1', 'margin': '--plc margin --set plc_warmup=.5', 'stages': '--stages [{size:16,epochs:1,bs:6},{size:24,epochs:1}]', 'accumulate': '--accumulate {0:1,1:2} --set clip=.5',
         'ema': '--average ema --set ema_decay=.9', 'swa': '--average swa --set swa_start=1 --set swa_lr=.001', 'patience': '--patience 1', 'best': '--average ema --set score_at=best', 'tta': '--tta 2'}

@pytest.mark.parametrize('name', ALONE)
def test_alone(imgclf, base, name):
    options = ALONE[name].replace('{', '{ ').replace(':', ': ').split(' --')
    args = [o for part in options for o in ('--' + part.removeprefix('--')).split(' ', 1)]
    plain = without(BASE, '--epochs', '--size') if name == 'stages' else BASE
    code, out, err = imgclf('fit', *TABLE, *plain, *args, '--out', f'runs/{name.replace(" ", "-")}')
    assert code == 0, err
    oof = pd.read_parquet(f'runs/{name.replace(" ", "-")}/oof.parquet')
    assert np.allclose(oof.filter(like='p_').sum(axis=1), 1, atol=1e-5) and len(oof) == 24
    if name in ('ratio', 'margin'): assert pd.read_csv(f'runs/{name}/ledger.csv').columns.tolist() == ['id', 'epoch', 'old', 'new', 'score', 'threshold', 'fold']
    if name == 'tta': assert pd.read_csv('runs/tta/tta.csv').shape[0] == 4
    code, out, err = imgclf('predict', f'runs/{name.replace(" ", "-")}', 'train', '--out', 'preds.csv')
    assert code == 0, err

TOGETHER = [*TABLE, '--arch', 'test_resnet', '--no-pretrained', '--folds', '2', '--schedule', 'one_cycle', '--stages', '[{size: 16, epochs: 2, bs: 6}, {size: 24, epochs: 2, bs: 4}]', '--oversample', '{red: 2}',
            '--class-weights', 'balance', '--label-smoothing', '.1', '--soft-labels', 'runs/base', '--plc', 'margin', '--mix', 'cutmixup', '--accumulate', '2', '--average', 'ema', '--tta', '2',
            *(o for k in ('plc_warmup=1', 'plc_theta=[0.0, 0.0]', 'plc_scoring=clean', 'mix_off_last=1', 'clip=.5', 'ema_decay=.9', 'num_workers=0', 'precision=fp32', 'duplicates=false') for o in ('--set', k))]

def test_together_and_killed(base):
    "All at once; killed by SIGKILL at three moments, it ends with the same predictions, corrections and curves."
    one_thread = 'import torch; torch.set_num_threads(1); from imgclf.cli import main; main()'      # sums depend on the number of threads
    command = [sys.executable, '-c', one_thread, 'fit', *TOGETHER, '--out']
    undisturbed = subprocess.run([*command, 'runs/whole'], capture_output=True, text=True, cwd=base.parents[1], timeout=300)
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert 'flipped' in undisturbed.stderr and 'test-time augmentation' in undisturbed.stderr
    os.chdir(base.parents[1])
    whole = pd.read_parquet('runs/whole/oof.parquet')
    for fold, epoch in ((0, 0), (0, 2), (1, 1)):
        p, deadline = subprocess.Popen([*command, 'runs/killed'], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), time.time() + 200
        while time.time() < deadline and p.poll() is None:
            if os.path.isfile('runs/killed/metrics.csv'):
                m = pd.read_csv('runs/killed/metrics.csv')
                if ((m.fold == fold) & (m.epoch >= epoch)).any(): break
            time.sleep(.005)
        os.killpg(p.pid, signal.SIGKILL); p.wait()
        assert p.returncode == -signal.SIGKILL, p.stdout.read()
    done = subprocess.run([*command, 'runs/killed'], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    again = pd.read_parquet('runs/killed/oof.parquet')
    pd.testing.assert_frame_equal(again, whole)
    assert open('runs/killed/ledger.csv').read() == open('runs/whole/ledger.csv').read()
    same = [c for c in pd.read_csv('runs/whole/metrics.csv') if c != 'seconds']
    pd.testing.assert_frame_equal(pd.read_csv('runs/killed/metrics.csv')[same], pd.read_csv('runs/whole/metrics.csv')[same])
    ledger = pd.read_csv('runs/whole/ledger.csv').merge(pd.read_csv('runs/whole/items.csv')[['id', 'fold']], on='id', suffixes=('', '_held'))
    assert (ledger.fold != ledger.fold_held).all(), 'a label of the held-out fold was corrected'

def test_asked_afterwards(imgclf, base):
    "What test-time augmentation gains, and which run is better, from finished runs."
    code, out, err = imgclf('tta', 'runs/base', '--tta', '2', '--aug', 'light')
    assert code == 0 and 'mean' in out and 'gain' in out, err
    imgclf('fit', *TABLE, *BASE, '--label-smoothing', '.2', '--out', 'runs/smooth')
    code, out, err = imgclf('compare', 'runs/base', 'runs/smooth', '--picture', 'gain.png')
    assert code == 0 and 'smooth' in out and '95%' in out and os.path.isfile('gain.png'), err

def test_blended(imgclf, base):
    imgclf('fit', *TABLE, *BASE, '--average', 'ema', '--set', 'ema_decay=.5', '--out', 'runs/other')
    code, out, err = imgclf('blend', 'runs/base', 'runs/other')
    assert code == 0 and 'gain over' in out, err
    code, out, err = imgclf('predict', 'runs/base', 'train', '--with', 'runs/other', '--out', 'blend.csv')
    assert code == 0 and 'blend' in out and len(pd.read_csv('blend.csv')) == 24, err
    code, out, err = imgclf('predict', 'runs/base', 'train', '--with', 'runs/base', '--out', 'x.csv')
    assert code == 2 and 'given twice' in err and not os.path.exists('x.csv')

def test_labels_reviewed(imgclf, base):
    "Doubtful labels as a page and a table; a person's decision in the next run; nothing of the first one is changed."
    before = {f: open(f'runs/base/{f}', 'rb').read() for f in ('items.csv', 'oof.parquet', 'config.yaml')}
    code, out, err = imgclf('clean', 'runs/base', '--n', '5')
    assert code == 0 and 'disputed labels' in out, err
    sheet = pd.read_csv('runs/base/corrections.csv', dtype=str, keep_default_na=False)
    sheet.loc[0, ['action', 'label']] = 'change', 'red' if sheet.given[0] != 'red' else 'blue'
    sheet.loc[1, 'action'] = 'drop'
    sheet.to_csv('runs/base/corrections.csv', index=False)
    code, out, err = imgclf('fit', *TABLE, *BASE, '--corrections', 'runs/base/corrections.csv', '--out', 'runs/corrected')
    assert code == 0, err
    items = pd.read_csv('runs/corrected/items.csv', dtype=str).set_index('id')
    assert len(items) == 23 and items.label[sheet.id[0]] == sheet.label[0] and items.given[sheet.id[0]] == sheet.given[0] and sheet.id[1] not in items.index
    assert {f: open(f'runs/base/{f}', 'rb').read() for f in before} == before
    code, out, err = imgclf('rerun', 'runs/corrected', '--out', 'runs/corrected-again')
    assert code == 0 and pd.read_parquet('runs/corrected-again/oof.parquet').equals(pd.read_parquet('runs/corrected/oof.parquet')), err
    code, out, err = imgclf('runs', '--sort', 'started', '--where', 'epochs=2')
    assert code == 0 and 'corrected-again' in out and os.path.isfile('runs/runs.csv'), err

REFUSED = {'--mix mixpu': 'did you mean mixup', '--plc ratio --mix mixup': 'plc_scoring=clean', '--class-weights balance --sampler weighted': 'has no effect', '--class-weights {red:2}': 'no weight for blue, green',
           '--oversample {rde:2}': 'did you mean red', '--oversample {red:0}': 'factors from 1', '--undersample {red:99}': 'oversample repeats rows', '--soft-labels runs/nowhere': 'no such folder',
           '--soft-labels runs/base --set soft_a=1.5': 'from 0', '--set soft_a=.5': 'soft_labels is null', '--plc ratio --set plc_warmup=9': 'no label would be corrected', '--accumulate 0': 'a number', '--average ema --set ema_decay=2': 'below 1',
           '--stages [{size:32,epochs:1},{size:16,epochs:1}]': 'sizes must not fall', '--mix cutmix --set mix_off_last=2': 'no epoch would be mixed', '--clean-col thruth': "clean_col='thruth'", '--tta -1': '0 for none',
           '--set arch_args={cbs:3}': 'no argument of the architecture', '--set arch_args={drop_path:3}': 'drop_path', '--loss fokal': 'did you mean focal', '--patience 0': 'validation'}

@pytest.mark.parametrize('options', REFUSED)
def test_refused(imgclf, base, options):
    "One message that says what to do, exit code 2, and no folder."
    args = [o for part in options.replace('{', '{ ').replace(':', ': ').split(' --') for o in ('--' + part.removeprefix('--')).split(' ', 1)]
    plain = without(BASE, '--epochs', '--size') if 'stages' in options else BASE
    code, out, err = imgclf('fit', *(without(TABLE, '--clean-col') if 'clean-col' in options else TABLE), *plain, *args, '--out', 'runs/refused')
    assert code == 2, out + err
    assert REFUSED[options] in err and 'Traceback' not in err, err
    assert not os.path.exists('runs/refused')
