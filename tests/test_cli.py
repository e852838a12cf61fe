"""The command line, from a folder of images to a submission, and everything that can be typed or handed in wrong."""
import hashlib, os, resource, signal, struct, subprocess, sys, time, zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import imgclf.cli_models
from imgclf.cli import app, main

# the smallest of timm's models and of everything else, so that a whole run takes seconds
TINY = ['--arch', 'test_resnet', '--no-pretrained', '--size', '32', '--epochs', '1', '--folds', '2', '--bs', '8',
        '--set', 'freeze_epochs=0', '--set', 'num_workers=0', '--set', 'precision=fp32']
CLASSES = ('rust', 'scab', 'sound')

def save(path, label=0, seed=0):
    "A picture with something of its class in it."
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 90, (24, 28, 3), dtype=np.uint8); a[..., label] += 120
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(path)
    return path

def png(width, height):
    "A valid PNG, one bit a pixel, all black: 200 megapixels in some 25 kB."
    chunk = lambda name, data: struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(bytes((1 + -(-width // 8))*height), 9)) + chunk(b'IEND', b'')

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A folder with class folders, a flat folder with tables, test images that a path sort puts out of order, and a finished run on each."
    d = tmp_path_factory.mktemp('world')
    for i, label in enumerate(CLASSES):
        for k in range(6): save(d/'train'/label/f'{k}.png', i, 10*i + k)
    rows = []
    for k in range(18):
        save(d/'flat'/f'im{k}.png', k % 3, k)
        rows.append(dict(image_id=f'im{k}', label=CLASSES[k % 3], **{c: int(CLASSES[k % 3] == c) for c in CLASSES}))
    pd.DataFrame(rows).to_csv(d/'train.csv', index=False)
    for k in range(8, 12): save(d/'test'/f'im{k}.png', k % 3, k)
    return d

@pytest.fixture(scope='module')
def base(world):
    "A run on class folders."
    os.chdir(world)
    with pytest.raises(SystemExit) as e: main(['fit', 'train', *TINY, '--out', 'runs/base'])
    assert not e.value.code
    return world/'runs/base'

@pytest.fixture(scope='module')
def plant(world):
    "A run on a table with one-hot columns and ids without their suffix."
    os.chdir(world)
    with pytest.raises(SystemExit) as e: main(['fit', 'flat', '--labels', 'train.csv', '--id-col', 'image_id', '--label-cols', ','.join(CLASSES), '--suffix', '.png', *TINY, '--out', 'runs/plant'])
    assert not e.value.code
    return world/'runs/plant'

def snapshot(folder):
    return {str(p): (p.stat().st_mtime_ns, hashlib.sha1(p.read_bytes()).hexdigest()) for p in sorted(folder.rglob('*')) if p.is_file()} | {str(p): 'dir' for p in folder.rglob('*') if p.is_dir()}

@pytest.fixture
def refused(imgclf, world):
    "The command ends with code 2 and one message that holds all of `parts`, and touches nothing."
    def _check(args, *parts):
        before = snapshot(world)
        code, out, err = imgclf(*args)
        assert code == 2, (code, out, err)
        assert 'Traceback' not in out + err and not out.strip().startswith('{')
        assert err.count('imgclf: ') - err.count('imgclf: note: ') == 1, err
        for part in parts: assert part in err, f'{part!r} not in: {err}'
        assert snapshot(world) == before
        return err
    return _check

# -- help --------------------------------------------------------------------------------------------------------------
def test_help_waits_for_nothing_heavy(python):
    names = [o.callback.__name__ for o in app.registered_commands]
    assert set(names) >= {'scan', 'fit', 'predict', 'submit', 'report', 'demo', 'config'}
    code, out, err, _ = python(f'''
import sys
from imgclf.cli import main
for args in (["--help"], ["--version"], ["config"], *([o, "--help"] for o in {names})):
    try: main(args)
    except SystemExit as e: assert not e.code, args
print([o for o in ("torch", "fastai", "timm", "pandas", "sklearn", "matplotlib", "rich") if o in sys.modules])''')
    assert code == 0, err
    assert out.splitlines()[-1] == '[]'

def test_help_under_a_second(sh, script):
    def seconds():   # of this program, not of others on the machine
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert sh(script('imgclf'), '--help')[0] == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert min(seconds() for _ in range(3)) < 1

def test_config_prints_a_file_that_reads_back(imgclf, world, tmp_path):
    code, out, _ = imgclf('config', 'elpv', '--set', 'epochs=3')
    assert code == 0
    (tmp_path/'mine.yaml').write_text(out)
    assert imgclf('config', tmp_path/'mine.yaml')[1] == out
    assert 'epochs: 3' in out and 'tf_efficientnet_lite0' in out

# -- the path ----------------------------------------------------------------------------------------------------------
def test_scan(imgclf, world):
    code, out, _ = imgclf('scan', 'train', '--picture', 'scan.png')
    assert code == 0 and '18 images' in out and '28x24' in out and 'rust' in out
    assert Image.open(world/'scan.png').size[0] > 100
    (world/'scan.png').unlink()
    assert '4 images' in imgclf('scan', 'test')[1]                                     # without labels
    code, out, _ = imgclf('scan', 'flat', '--labels', 'train.csv', '--id-col', 'image_id', '--label-col', 'label', '--suffix', '.png')
    assert code == 0 and '3 classes' in out

def test_fit_leaves_a_run_folder(base, imgclf):
    for name in ('config.yaml', 'items.csv', 'oof.parquet', 'metrics.csv', 'report.html', 'models/fold0.safetensors', 'models/fold1.safetensors'): assert (base/name).is_file(), name
    oof = pd.read_parquet(base/'oof.parquet')
    assert oof.columns.tolist() == ['id', 'fold', *(f'p_{c}' for c in CLASSES)] and not oof.isna().any(axis=None) and len(oof) == 18
    code, out, _ = imgclf('report', 'runs/base')
    assert code == 0 and 'fold 1' in out and 'pooled' in out and '95 %' in out and 'imgclf predict' in out

def test_fit_again_changes_no_prediction(base, imgclf):
    before = {o: (base/o).read_bytes() for o in ('oof.parquet', 'metrics.csv', 'models/fold0.safetensors', 'config.yaml')}
    assert imgclf('fit', 'train', *TINY, '--out', 'runs/base')[0] == 0
    assert before == {o: (base/o).read_bytes() for o in before}

def test_predict_by_id_in_any_order(base, imgclf, world, tmp_path):
    code, out, err = imgclf('predict', 'runs/base', 'test', '--out', tmp_path/'new/preds.csv')
    assert code == 0, err
    preds = pd.read_csv(tmp_path/'new/preds.csv').set_index('id')
    assert list(preds) == ['label', 'confidence', *(f'p_{c}' for c in CLASSES)] and set(preds.index) == {f'im{k}.png' for k in range(8, 12)}
    p = preds[[f'p_{c}' for c in CLASSES]]
    assert np.allclose(p.sum(axis=1), 1, atol=1e-4) and np.allclose(p.max(axis=1), preds.confidence, atol=1e-6)
    assert (p.idxmax(axis=1).str[2:] == preds.label).all()
    assert imgclf('predict', 'runs/base', 'test', '--calibrate', '--out', tmp_path/'cal.csv')[0] == 0
    cal = pd.read_csv(tmp_path/'cal.csv').set_index('id')
    assert (cal.label == preds.label).all() and not np.allclose(cal.confidence, preds.confidence, atol=1e-3)
    assert imgclf('predict', 'runs/base', world/'test/im9.png', '--out', tmp_path/'one.csv')[0] == 0
    one = pd.read_csv(tmp_path/'one.csv').set_index('id')
    assert one.index.tolist() == ['im9.png'] and np.allclose(one.p_rust, preds.p_rust['im9.png'], atol=1e-5)

@pytest.mark.parametrize('ids', [[f'im{k}.png' for k in range(8, 12)], [f'im{k}' for k in range(8, 12)]])
def test_submit(base, plant, imgclf, tmp_path, ids):
    assert imgclf('predict', 'runs/plant', 'test', '--out', tmp_path/'preds.csv')[0] == 0
    preds = pd.read_csv(tmp_path/'preds.csv').set_index('id')
    assert set(preds.index) == {f'im{k}' for k in range(8, 12)}                       # trained with a suffix, so ids are without
    pd.DataFrame(dict(image_id=ids, **{c: .25 for c in reversed(CLASSES)})).to_csv(tmp_path/'sample.csv', index=False)
    code, out, err = imgclf('submit', 'runs/plant', '--images', 'test', '--sample', tmp_path/'sample.csv', '--out', tmp_path/'sub.csv')
    assert code == 0, err
    sub = pd.read_csv(tmp_path/'sub.csv')
    assert sub.image_id.tolist() == ids and list(sub) == ['image_id', *reversed(CLASSES)]
    assert np.allclose(sub.rust, preds.p_rust.loc[[o.removesuffix('.png') for o in ids]], atol=1e-6)
    pd.DataFrame(dict(image_id=ids, label='')).to_csv(tmp_path/'sample.csv', index=False)
    assert imgclf('submit', 'runs/base', '--images', 'test', '--sample', tmp_path/'sample.csv', '--out', tmp_path/'sub.csv')[0] == 0
    assert pd.read_csv(tmp_path/'sub.csv').label.isin(CLASSES).all()

def test_rows_that_are_no_images_can_be_dropped(imgclf, world, tmp_path):
    for i, label in enumerate(CLASSES[:2]):
        for k in range(4): save(tmp_path/'train'/label/f'{k}.png', i, k)
    (tmp_path/'train/rust/note.jpg').write_text('no image')
    code, out, err = imgclf('fit', tmp_path/'train', *TINY, '--on-bad', 'drop', '--out', tmp_path/'run')
    assert code == 0, err
    assert 'dropped 1 row' in err
    assert len(pd.read_parquet(tmp_path/'run/oof.parquet')) == 8

# -- what is refused ---------------------------------------------------------------------------------------------------
def test_source_that_is_none(refused, world):
    refused(['fit', 'trian', *TINY, '--out', 'runs/new'], 'trian', 'did you mean train')
    refused(['scan', 'trian'], 'did you mean train')
    refused(['fit', 'train.csv', *TINY, '--out', 'runs/new'], 'train.csv')
    (world/'empty').mkdir(exist_ok=True)
    refused(['fit', 'empty', *TINY, '--out', 'runs/new'], 'no images')
    refused(['scan', 'empty'], 'no images')
    refused(['fit', *TINY, '--out', 'runs/new'], 'no SOURCE')
    refused(['fit', 'train', *TINY], 'no --out')

def test_broken_images_are_all_named(refused, world, tmp_path):
    for i, label in enumerate(CLASSES[:2]):
        for k in range(3): save(tmp_path/'bad'/label/f'{k}.png', i, k)
    rust = tmp_path/'bad/rust'
    (rust/'text.jpg').write_text('no image at all')
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)).save(rust/'half.jpg')
    (rust/'half.jpg').write_bytes((rust/'half.jpg').read_bytes()[:9000])
    (rust/'bomb.png').write_bytes(png(20_000, 10_000))
    refused(['fit', tmp_path/'bad', *TINY, '--out', 'runs/new'], 'text.jpg', 'half.jpg', 'bomb.png')
    for name in ('text.jpg', 'half.jpg', 'bomb.png'):                                    # and each alone, by its own reason
        for k, o in enumerate(CLASSES): save(tmp_path/name/o/'a.png', k, k); save(tmp_path/name/o/'b.png', k, k + 9)
        (tmp_path/name/'rust'/name).write_bytes((rust/name).read_bytes())
        refused(['fit', tmp_path/name, *TINY, '--out', 'runs/new'], name)

def test_broken_images_are_scanned(imgclf, tmp_path):
    save(tmp_path/'a/1.png'); save(tmp_path/'b/1.png', 1)
    (tmp_path/'a/text.jpg').write_text('no image at all'); (tmp_path/'b/bomb.png').write_bytes(png(20_000, 10_000))
    code, out, err = imgclf('scan', tmp_path)
    assert code == 0 and 'text.jpg' in out and 'bomb.png' in out and 'Traceback' not in err

def test_settings(refused, world, tmp_path):
    fit = ['fit', 'train', *TINY, '--out', 'runs/new']
    refused([*fit, '--arch', 'tset_resnet'], 'tset_resnet', 'did you mean', 'test_resnet')
    refused([*fit, '--set', 'epoch=3'], 'unknown setting epoch', 'did you mean epochs')
    refused([*fit, '--set', 'epochs'], 'key=value')
    refused([*fit, '--recipe', 'elvp'], 'did you mean elpv')
    refused([*fit, '--method', 'stretch', '--bs', '0'], '2 problems', "method='stretch'", 'bs=0')
    refused([*fit, '--weights', 'w.safetensors'], 'no effect')
    refused([*fit, '--set', 'pretrained=true', '--weights', 'nowhere.safetensors'], 'nowhere.safetensors')
    refused([*fit, '--label-col', 'label'], 'no table is given')
    refused([*fit, '--presize', '16'], 'smaller than size')
    for text, part in (('learning_rate: 1', 'unknown setting learning_rate'), ('epochs: [', 'not valid YAML'), ('epochs: 1\nepochs: 2', 'given twice')):
        (tmp_path/'c.yaml').write_text(text)
        refused([*fit, '--config', tmp_path/'c.yaml'], part)
    refused([*fit, '--config', tmp_path/'no.yaml'], 'no such file')
    refused([*fit, '--arch', 'test_vit', '--size', '100'], 'test_vit', '100')        # a transformer whose patches do not fill it
    refused([*fit, '--set', 'metric=acuracy'], 'did you mean accuracy')
    refused(['fit', 'train', *TINY, '--folds', '7', '--out', 'runs/new'], '7 folds')

def test_tables(refused, world, tmp_path):
    fit = ['fit', 'flat', *TINY, '--out', 'runs/new', '--labels']
    refused([*fit, 'train.csv'], 'needs id_col')
    refused([*fit, 'trian.csv', '--id-col', 'image_id', '--label-col', 'label'], 'trian.csv')
    refused([*fit, 'train.csv', '--id-col', 'image', '--label-col', 'label'], "'image'", 'did you mean image_id')
    refused([*fit, 'train.csv', '--id-col', 'image_id', '--label-col', 'label'], "suffix='.png'")
    df = pd.read_csv(world/'train.csv')
    df.loc[0, 'image_id'] = '../secret'; df.loc[1, 'label'] = ''; df.loc[2, 'image_id'] = df.image_id[3]; df.loc[5, 'image_id'] = 'gone'
    df.to_csv(tmp_path/'bad.csv', index=False)
    refused([*fit, tmp_path/'bad.csv', '--id-col', 'image_id', '--label-col', 'label', '--suffix', '.png'], 'secret', 'row 1', 'im3', 'gone')

def test_out_that_holds_something(refused, base, world):
    refused(['fit', 'train', *TINY, '--epochs', '2', '--out', 'runs/base'], 'another run', 'epochs')
    refused(['fit', 'train', *TINY, '--no-resume', '--out', 'runs/base'], 'holds a run')
    refused(['fit', 'train', *TINY, '--out', 'flat'], 'not a run folder')
    refused(['fit', 'train', *TINY, '--out', 'train.csv'], 'is a file')

def test_predict_refuses(refused, base, world, tmp_path):
    refused(['predict', 'runs/bsae', 'test', '--out', tmp_path/'p.csv'], 'bsae')
    refused(['predict', 'train', 'test', '--out', tmp_path/'p.csv'], 'not a run folder')
    refused(['predict', 'runs/base', 'tset', '--out', tmp_path/'p.csv'], 'did you mean test')
    refused(['predict', 'runs/base', 'test', '--out', 'train'], 'is a folder')
    save(tmp_path/'new/1.png'); (tmp_path/'new/2.jpg').write_text('no image')
    refused(['predict', 'runs/base', tmp_path/'new', '--out', tmp_path/'p.csv'], '2.jpg')
    assert not (tmp_path/'p.csv').exists()

def test_submit_refuses(refused, base, world, tmp_path, monkeypatch):
    from imgclf.runs import Run
    monkeypatch.setattr(Run, 'predict', lambda *args, **kw: pytest.fail('predicted before the sample was checked'))
    sample = pd.DataFrame(dict(id=[f'im{k}.png' for k in range(8, 12)], label=''))
    def submit(table, *parts, out=tmp_path/'sub.csv'):
        table.to_csv(tmp_path/'sample.csv', index=False)
        refused(['submit', 'runs/base', '--images', 'test', '--sample', tmp_path/'sample.csv', '--out', out], *parts)
    submit(sample[1:], 'im8.png', 'does not have')
    submit(sample.assign(id=['im7.png', *sample.id[1:]]), 'im7.png', 'no prediction')
    submit(sample.assign(id='im8.png'), 'more than once')
    submit(sample.assign(label='scabs'), 'did you mean scab')
    submit(sample.drop(columns='label').assign(rust=0, scab=0), 'class sound')
    submit(sample, 'would be overwritten', out=tmp_path/'sample.csv')
    refused(['submit', 'runs/base', '--images', 'test', '--sample', 'nowhere.csv', '--out', tmp_path/'sub.csv'], 'nowhere.csv')
    assert not (tmp_path/'sub.csv').exists()

# -- as a program ------------------------------------------------------------------------------------------------------
def test_program_ends_with_2(sh, script, world):
    code, out, err, _ = sh(script('imgclf'), 'fit', 'trian', '--out', 'runs/new', cwd=world)
    assert (code, out) == (2, '') and err.count('\n') == 1 and 'did you mean train' in err
    assert sh(script('imgclf'), 'fit', 'train', '--epoch', '3', cwd=world)[0] == 2

def test_own_errors_keep_their_trace(python):
    code, out, err, _ = python('''
import imgclf.cli as cli
def broken(*args): raise KeyError('deep inside')
cli.make_config = broken
cli.main(['config'])''')
    assert code == 1 and 'Traceback' in err and 'deep inside' in err

def test_no_credentials(base, sh, world, tmp_path):
    pd.DataFrame(dict(id=[f'im{k}' for k in range(8, 12)], label='')).to_csv(tmp_path/'sample.csv', index=False)
    none = [o for name in ('USERNAME', 'KEY', 'API_TOKEN') for o in ('-u', f'KAGGLE_{name}')]
    code, out, err, _ = sh('env', *none, sys.executable, '-m', 'imgclf.cli', 'submit', 'runs/base', '--images', 'test', '--sample', tmp_path/'sample.csv', '--out', tmp_path/'sub.csv',
                           '--competition', 'plant-pathology', cwd=world, KAGGLE_CONFIG_DIR=str(tmp_path/'kaggle'))
    assert code == 2 and 'no working Kaggle credentials' in err and 'Traceback' not in err
    assert (tmp_path/'sub.csv').is_file()                                               # what was asked before that is kept

def test_ctrl_c_keeps_the_last_epoch(imgclf, world, clean_env, tmp_path):
    fit = ['fit', 'train', *TINY, '--epochs', '15', '--out', str(tmp_path/'run')]
    p = subprocess.Popen([sys.executable, '-m', 'imgclf.cli', *fit], cwd=world, env=clean_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))   # a background job's children would ignore Ctrl-C
    try:
        state = tmp_path/'run/state/fold0.safetensors'
        until = time.time() + 120
        while not state.is_file() and p.poll() is None and time.time() < until: time.sleep(.05)
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=60)
    finally: p.kill()
    assert p.returncode == 130, err
    assert 'Traceback' not in err and err.strip().endswith('the same command goes on from there')
    assert state.is_file()
    code, out, err = imgclf(*fit)
    assert code == 0, err
    metrics = pd.read_csv(tmp_path/'run/metrics.csv')
    assert metrics.groupby('fold').epoch.nunique().tolist() == [15, 15]
