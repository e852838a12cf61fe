"A run that is killed in the middle of a later fold, and resumed, ends with the same predictions as one that was left alone."
import os, signal, subprocess, sys, time

import numpy as np
import pandas as pd
import pytest

SCRIPT = '''
import sys, torch, warnings
warnings.filterwarnings('ignore')
torch.set_num_threads(1)
from imgclf.crossval import cross_validate
from imgclf.data.source import items_from_folder
items = items_from_folder(sys.argv[1])
cross_validate(items, dict(arch='test_resnet', pretrained=False, size=32, presize=40, bs=8, folds=3, schedule='fine_tune', epochs=4,
               freeze_epochs=2, lr=1e-2, duplicates=False, num_workers=int(sys.argv[3]), precision='fp32', label_smoothing=.1), out=sys.argv[2], progress=False)
'''

@pytest.fixture(scope='module')
def images(tmp_path_factory):
    from PIL import Image
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for label in ('blue', 'red'):
        (folder/label).mkdir()
        for i in range(24):
            px = rng.integers(0, 255, (48, 48, 3), dtype=np.uint8); px[..., 0 if label == 'red' else 2] //= 2
            Image.fromarray(px).save(folder/label/f'{i}.png')
    return folder

def start(images, out, workers=0):
    return subprocess.Popen([sys.executable, '-c', SCRIPT, str(images), str(out), str(workers)], start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def finish(images, out, workers=0):
    p = start(images, out, workers)
    said, _ = p.communicate(timeout=300)
    assert p.returncode == 0, said
    return pd.read_parquet(out/'oof.parquet')

@pytest.fixture(scope='module')
def undisturbed(images, tmp_path_factory):
    return finish(images, tmp_path_factory.mktemp('whole')/'run')

@pytest.mark.parametrize('fold,epoch', [(1, 0), (1, 3), (2, 2)])   # in the frozen phase, in the unfrozen one, in the last fold
def test_killed_and_resumed(images, undisturbed, tmp_path, fold, epoch):
    out = tmp_path/'run'
    p, deadline = start(images, out), time.time() + 200
    while time.time() < deadline and p.poll() is None:
        if (out/'metrics.csv').is_file():
            m = pd.read_csv(out/'metrics.csv')
            if ((m.fold == fold) & (m.epoch >= epoch)).any(): break
        time.sleep(.005)
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    assert p.returncode == -signal.SIGKILL, f'the run ended before it was killed: {p.stdout.read()}'
    before = pd.read_csv(out/'metrics.csv')
    assert (out/'state'/f'fold{fold}.safetensors').is_file()
    oof = finish(images, out)
    pd.testing.assert_frame_equal(oof, undisturbed)                 # to the last bit
    after = pd.read_csv(out/'metrics.csv')
    assert after.groupby('fold').epoch.apply(list).tolist() == [list(range(6))]*3
    done = before.merge(after, on=['fold', 'epoch'], suffixes=('', '_after'))
    assert (done.seconds == done.seconds_after).all(), 'an epoch that was finished was trained again'
    assert not list((out/'state').glob('*')) and not list(out.rglob('*.tmp*'))

def test_workers_change_nothing(images, undisturbed, tmp_path):
    pd.testing.assert_frame_equal(finish(images, tmp_path/'run', workers=2), undisturbed)
