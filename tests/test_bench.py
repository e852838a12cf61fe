"A benchmark that is killed and called again ends in the same table as one that was left alone; two processes share one."
import os, signal, subprocess, sys, time

import numpy as np
import pandas as pd
import pytest
from PIL import Image

FILE = '''
recipe: zoo_base
settings: {{source: {images}, size: 32, epochs: 3, bs: 8, precision: fp32, num_workers: 0, duplicates: false}}
models: {{a: {{arch: test_resnet}}, b: {{arch: test_resnet, wd: .1}}, c: {{arch: test_byobnet}}}}
choose: {{lr: [1.e-2, 1.e-3]}}
train: 40
test: {{share: .25}}
timed: false
'''

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    d, rng = tmp_path_factory.mktemp('bench'), np.random.default_rng(0)
    for label in ('blue', 'red'):
        (d/'images'/label).mkdir(parents=True)
        for i in range(32):
            px = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8); px[..., 0 if label == 'red' else 2] //= 2
            Image.fromarray(px).save(d/'images'/label/f'{i}.png')
    (d/'b.yaml').write_text(FILE.format(images=d/'images'))
    return d

def start(world, out, *args):
    return subprocess.Popen([sys.executable, '-W', 'ignore', '-m', 'imgclf.cli', 'bench', '--config', str(world/'b.yaml'), '--out', str(out), *args], start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))

def finish(world, out, *args):
    p = start(world, out, *args)
    said, _ = p.communicate(timeout=300)
    assert p.returncode == 0, said
    return said, pd.read_csv(out/'table.csv', index_col=0).drop(columns='minutes')

@pytest.fixture(scope='module')
def whole(world):
    said, table = finish(world, world/'whole')
    assert 'table.csv' in said and (world/'whole'/'curves.png').is_file() and (world/'whole'/'cost.png').is_file()
    return table

def test_scores_by_the_images_that_neither_trained_nor_chose(world, whole):
    train, test = pd.read_csv(world/'whole'/'items.csv'), pd.read_csv(world/'whole'/'test.csv')
    assert len(train) == 40 and len(test) == 16 and not set(train.id) & set(test.id)
    assert whole.index.tolist() == ['a', 'b', 'c'] and whole.score.notna().all() and (whole.low <= whole.score).all() and (whole.score <= whole.high).all()
    for row in whole.itertuples():
        oof = {k: pd.read_parquet(world/'whole'/row.Index/k/'oof.parquet').dropna().set_index('id') for k in ('lr=0.01', 'lr=0.001')}
        labels = train.set_index('id').label
        valid = {k: np.mean([o.columns[1:][v[1:].argmax()] == f'p_{labels[i]}' for i, v in zip(o.index, o.to_numpy())]) for k, o in oof.items()}
        assert abs(valid[row.chosen] - max(valid.values())) < 1e-9 and abs(row.valid - max(valid.values())) < 1e-9
        probs = pd.read_parquet(world/'whole'/row.Index/row.chosen/'test.parquet').set_index('id')
        right = [probs.columns[probs.loc[i].argmax()] == f'p_{o}' for i, o in zip(test.id, test.label)]
        assert abs(np.mean(right) - row.score) < 1e-9

def test_killed_and_called_again(world, whole, tmp_path):
    out, deadline = tmp_path/'killed', time.time() + 200
    p = start(world, out)
    while time.time() < deadline and p.poll() is None:
        m = out/'b'/'lr=0.01'/'metrics.csv'
        if m.is_file() and len(pd.read_csv(m)): break
        time.sleep(.005)
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    assert p.returncode == -signal.SIGKILL, f'it ended before it was killed: {p.stdout.read()}'
    assert not (out/'c').exists()
    pd.testing.assert_frame_equal(finish(world, out)[1], whole)

def test_two_processes_share_a_benchmark(world, whole, tmp_path):
    out = tmp_path/'shared'
    finish(world, out, '--only', 'c')
    both = [start(world, out) for _ in range(2)]
    said = [p.communicate(timeout=300)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    pd.testing.assert_frame_equal(finish(world, out)[1], whole)

def test_refused(world, imgclf):
    (world/'bad.yaml').write_text('models: [resnet81]\nsettings: {source: images}\n')
    (world/'worse.yaml').write_text('modles: [resnet18]\n')
    for args, part in ((('--config', 'none.yaml'), 'none.yaml: no such file'), (('--config', 'bad.yaml'), 'resnet81'), (('--config', 'worse.yaml'), 'did you mean models'), (('--config', 'b.yaml', '--only', 'd'), 'd is no row')):
        code, out, err = imgclf('bench', *args, '--out', 'new')
        assert code == 2 and part in err and 'Traceback' not in err, err
        assert not (world/'new').exists()
