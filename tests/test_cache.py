"The presize cache: the same batches and predictions to the last bit, every file decoded once, and nothing lost or wrong when processes die, meet, or find the disk full."
import json, os, pickle, random, signal, subprocess, sys, time, warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import imgclf.data.cache as cache_module
import imgclf.data.decode as decode_module
import imgclf.data.loader as loader_module
from imgclf.core import InputError
from imgclf.crossval import cross_validate
from imgclf.data.block import fold_dls, items_dl
from imgclf.data.cache import clear_caches, fill_cache, list_caches
from imgclf.data.decode import load_image, load_pixels, presized
from imgclf.data.loader import SeededDL
from imgclf.experiment import load_run
from imgclf.learner import make_learner
from imgclf.tta import tta

SETTINGS = dict(arch='test_resnet', pretrained=False, size=24, presize=32, bs=8, folds=3, schedule='one_cycle', epochs=2, lr=1e-2, duplicates=False, precision='fp32', seed=3, cache=None)

def photos(folder, n, side=40):
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for i in range(n):
        px = np.asarray(Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8)).resize((side + i % 7, side + i % 5), Image.Resampling.BICUBIC))
        path = folder/f'{i:03}.{"jpg" if i % 3 else "png"}'
        Image.fromarray(px).save(path)
        rows.append(dict(id=path.name, path=str(path), label='ab'[i % 2], fold=i // 2 % 5))
    return pd.DataFrame(rows)

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'home'))
    monkeypatch.setattr(cache_module, '_OPEN', {})
    return tmp_path/'home'

@pytest.fixture(scope='module')
def items(tmp_path_factory): return photos(tmp_path_factory.mktemp('images')/'photos', 40)

@pytest.fixture
def decodes(tmp_path, monkeypatch):
    "How many files were decoded so far, in this process and those forked from it."
    log, whole = tmp_path/'decodes', decode_module._pixels
    log.touch()
    def counted(im, *args):
        with open(log, 'ab') as f: f.write(b'.')
        return whole(im, *args)
    monkeypatch.setattr(decode_module, '_pixels', counted)
    return lambda: log.stat().st_size

def run(items, out, **kw): return cross_validate(items, {**SETTINGS, **kw}, out=out, progress=False)

# -- the same, to the last bit -----------------------------------------------------------------------------------------
@pytest.fixture(scope='module', params=['squish', 'crop'])
def undisturbed(request, items, tmp_path_factory):
    return request.param, run(items, tmp_path_factory.mktemp('plain')/'run', method=request.param, num_workers=0).oof

@pytest.mark.parametrize('cache,workers', [(None, 2), ('ram', None), ('disk', 2), ('auto', None)])
def test_runs_are_the_same(items, undisturbed, tmp_path, cache, workers):
    method, want = undisturbed
    pd.testing.assert_frame_equal(run(items, tmp_path/'run', method=method, cache=cache, num_workers=workers).oof, want, check_exact=True)

def same(a, b):
    a, b = list(a), list(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        assert [type(o) for o in x] == [type(o) for o in y]
        assert all(torch.equal(torch.as_tensor(o), torch.as_tensor(q)) and o.stride() == q.stride() for o, q in zip(x, y))

@pytest.mark.parametrize('kw', [{}, dict(method='pad'), dict(method='crop'), dict(oversample={'a': 2}), dict(sampler='weighted'), dict(size=(24, 16), presize=(36, 24)), dict(aug=False), dict(decoder='reduced'), dict(stats='train'), dict(bs=7, val_bs=3)], ids=str)
def test_batches_are_the_same(items, kw, monkeypatch):
    kw = dict(size=24, presize=32, bs=8) | kw
    by_item, plain, cached = (fold_dls(items, 1, cache=o, num_workers=0, **kw) for o in (None, None, 'disk'))
    def epochs(dls):
        for e in (0, 1):
            for dl in dls: dl.epoch = e; yield from list(dl)
    with monkeypatch.context() as m:
        m.setattr(loader_module, '_batches', lambda dl: None)                              # fastai's own way
        want = list(epochs(by_item))
    monkeypatch.setattr(SeededDL, 'do_item', lambda *_: pytest.fail('an item was made'))
    for dls in (plain, cached): same(epochs(dls), want)

def test_multi_label(items, monkeypatch):
    several = items.assign(label=[('a', 'b') if i % 3 else () for i in range(len(items))])
    a, b, c = (fold_dls(several, 1, size=24, bs=8, cache=o, num_workers=0).train for o in ('ram', None, None))
    with monkeypatch.context() as m:
        m.setattr(loader_module, '_batches', lambda dl: None)
        want = list(c)
    monkeypatch.setattr(SeededDL, 'do_item', lambda *_: pytest.fail('an item was made'))
    for dl in (a, b): same(dl, want)

@pytest.mark.parametrize('cache', [None, 'ram'])
def test_targets_are_made_once_a_label(items, cache, monkeypatch):
    dls, asked = fold_dls(items, 1, size=24, bs=8, cache=cache, num_workers=0), []
    for dl in dls:
        pipe = dl.dataset.tls[1]
        monkeypatch.setattr(pipe, '_after_item', lambda o, f=pipe._after_item: asked.append(o) or f(o))
    y = [y for dl in dls for _ in (0, 1) for _, y in dl]
    assert len(asked) == 2*2 and sum(map(len, y)) == 2*len(items)                           # two loaders, two labels; two epochs

# -- decoded once ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kw', [dict(cache='ram'), dict(cache='disk'), dict(cache='auto'), {}], ids=str)
def test_five_folds_decode_once(items, tmp_path, decodes, kw, monkeypatch):
    "Also where nobody speaks of a cache."
    if not kw: monkeypatch.delitem(SETTINGS, 'cache')
    run(items, tmp_path/'run', **kw, method='crop', stats='train', folds=5)
    assert decodes() == len(items)
    run(items, tmp_path/'again', **kw, method='crop', seed=4, oversample={'a': 2})     # another experiment
    assert decodes() == len(items)

def test_without_a_cache_every_epoch_decodes(items, tmp_path, decodes):
    run(items, tmp_path/'run', epochs=2, num_workers=0)
    assert decodes() > 3*2*len(items)

def test_a_later_process_decodes_nothing(items, decodes):
    fill_cache(items.path, (32, 32), cache='disk')
    cache_module._OPEN.clear()
    held = fill_cache(items.path[::-1], (32, 32), cache='disk')
    assert decodes() == len(items) and torch.equal(held.read(items.path[3]), presized(items.path[3], (32, 32)))

def test_tta_decodes_once(items, decodes):
    learn = make_learner(fold_dls(items, 0, size=24, presize=32, bs=8, num_workers=0), 'test_resnet', pretrained=False)
    new = items[items.fold == 2].drop(columns=['label', 'fold'])
    loader = items_dl(learn.dls, new)
    with learn.no_bar():
        for dl, n in ((learn.dls.valid, 8), (loader, len(new))):
            before = decodes()
            tta(learn, dl, n=4)
            assert decodes() - before == n
        learn.dls = fold_dls(items, 0, size=24, presize=32, bs=8, cache='ram')
        before = decodes()
        tta(learn, n=4)
        assert decodes() == before

@pytest.mark.parametrize('n', [0, 4])
@pytest.mark.parametrize('workers', [0, 2])
def test_a_run_predicts_by_one_decode_an_image(items, tmp_path, decodes, n, workers):
    out = run(items, tmp_path/'run', cache='ram', epochs=1).run
    before = decodes()
    out.predict(items[['id', 'path']], tta=n, num_workers=workers, progress=False)          # three models, n + 1 views
    assert decodes() - before == len(items)

# -- an image changes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('cache', ['ram', 'disk'])
def test_a_changed_image_is_decoded_anew(tmp_path, decodes, cache):
    items = photos(tmp_path/'photos', 10)
    dls = fold_dls(items, 0, size=24, bs=4, cache=cache)
    old = torch.cat([x for x, _ in dls.valid])
    assert decodes() == 10
    Image.new('RGB', (50, 50), 'red').save(items.path[0])                                   # one of the validation rows
    assert torch.equal(torch.cat([x for x, _ in dls.valid]), old)                           # these loaders keep what they began with
    new = fold_dls(items, 0, size=24, bs=4, cache=cache)
    assert decodes() == 11
    same(new.valid, fold_dls(items, 0, size=24, bs=4, num_workers=0).valid)
    assert not torch.equal(torch.cat([x for x, _ in new.valid]), old)
    os.remove(items.path[1])
    with pytest.raises(InputError, match='001.jpg cannot be read: No such file'): fold_dls(items, 0, size=24, bs=4, cache=cache)

# -- killed, and two at once -------------------------------------------------------------------------------------------
FILL = '''
import sys, os, time, warnings
warnings.filterwarnings('ignore')
import imgclf.data.cache as c, imgclf.data.decode as d
from pathlib import Path
folder, log, pause, commit = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
c._COMMIT, whole = commit, d._pixels
def slow(im, *args):
    time.sleep(pause)
    with open(log, 'ab') as f: f.write(b'.')
    return whole(im, *args)
d._pixels = slow
paths = sorted(str(p) for p in Path(folder).iterdir())
print('ready', flush=True)
sys.stdin.readline()
held = c.fill_cache(paths, (32, 32), 'crop', cache='disk')
print(len(held), all((held.read(p) == d.presized(p, (32, 32), 'crop')).all() for p in paths[::9]) if pause == 0 else '', flush=True)
'''

def filler(items, log, pause, commit, home):
    "A process that is ready to fill a cache, and begins at `go`."
    p = subprocess.Popen([sys.executable, '-c', FILL, str(Path(items.path[0]).parent), str(log), str(pause), str(commit)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, env=os.environ | dict(XDG_CACHE_HOME=str(home), OMP_NUM_THREADS='1'))
    assert p.stdout.readline() == 'ready\n', p.stderr.read()
    return p

def go(p): p.stdin.write('go\n'); p.stdin.flush()

def end(p):
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0, out + err
    return out.split()

def index(home): return next(iter(home.glob('imgclf/presized/*/index.jsonl')), None)
def lines(home): return 0 if (f := index(home)) is None else f.read_bytes().count(b'\n') - 1

def wait_for(f, p, seconds=120):
    until = time.time() + seconds
    while time.time() < until and p.poll() is None:
        if f(): return
        time.sleep(.002)
    pytest.fail(f'not reached; exit code {p.poll()}: {p.communicate()}')

@pytest.mark.parametrize('after', [0, 19])
def test_killed_and_filled_again(items, own_cache, tmp_path, after):
    p = filler(items, tmp_path/'first', .02, 4*3*32*40, own_cache)                        # lines for every four images or so
    go(p)
    wait_for(lambda: index(own_cache) and lines(own_cache) >= after, p)
    p.send_signal(signal.SIGKILL); p.wait()
    held = lines(own_cache)
    assert after <= held < len(items)
    if after == 19:                                                                         # the worst: half a line, and pixels that no line is about
        with open(index(own_cache), 'ab') as f: f.write(b'["/half/a/li')
        with open(index(own_cache).with_name('pixels'), 'ab') as f: f.write(b'x'*5000)
    p = filler(items, tmp_path/'second', 0, 2**27, own_cache)
    go(p)
    assert end(p) == ['40', 'True']
    assert (tmp_path/'second').stat().st_size == len(items) - held + len(items[::9])       # the rest, and those it compares
    rows = [json.loads(o) for o in index(own_cache).read_text().splitlines()[1:]]
    assert len(rows) == 40 and index(own_cache).with_name('pixels').stat().st_size == sum(r[4] for r in rows)

def test_two_fill_it_together(items, own_cache, tmp_path):
    ps = [filler(items, tmp_path/'log', .02, 2000, own_cache) for _ in range(2)]
    for p in ps: go(p)
    for p in ps: assert end(p) == ['40']
    assert (tmp_path/'log').stat().st_size == len(items)
    assert len(list_caches()) == 1 and list_caches().images.item() == 40

def test_one_dies_while_the_other_waits(items, own_cache, tmp_path):
    first, second = filler(items, tmp_path/'log', .15, 4*3*32*40, own_cache), filler(items, tmp_path/'log2', .001, 2**27, own_cache)
    go(first)
    wait_for(lambda: lines(own_cache) >= 8, first)
    go(second)
    time.sleep(.5)
    assert not (tmp_path/'log2').exists()                                                   # it waits
    first.kill(); first.wait()
    assert end(second) == ['40']
    assert 8 <= len(items) - (tmp_path/'log2').stat().st_size < 40

def test_filled_while_it_is_read(items):
    "Whoever reads need not wait for those who write."
    half = fill_cache(items.path[:20], (32, 32), cache='disk')
    read, want = half.reader(items.path[:20]), presized(items.path[7], (32, 32))
    other = cache_module.PresizeCache(half.about, half.folder).refresh()
    fill_cache(items.path, (32, 32), cache='disk')
    assert torch.equal(read([7], [(0, 0)])[0], want) and torch.equal(other.read(items.path[7]), want)
    assert other.read(items.path[30]) is None and torch.equal(other.refresh().read(items.path[30]), presized(items.path[30], (32, 32)))
    clear_caches()
    assert torch.equal(other.read(items.path[7]), want)                                     # the file lives as long as somebody has it open
    assert len(other.refresh()) == 0

@pytest.mark.parametrize('damage', ['index', 'pixels', 'head', 'format'])
def test_damaged_files_are_made_anew(items, damage):
    held = fill_cache(items.path[:9], (32, 32), cache='disk')
    file = held.folder/('pixels' if damage == 'pixels' else 'index.jsonl')
    if damage in ('pixels', 'index'): os.remove(file)
    elif damage == 'head': file.write_bytes(b'\0'*100 + file.read_bytes()[100:])
    else: file.write_text('{}\n')
    cache_module._OPEN.clear()
    again = fill_cache(items.path[:9], (32, 32), cache='disk')
    assert len(again) == 9 and torch.equal(again.read(items.path[3]), presized(items.path[3], (32, 32)))

# -- no room -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    "A cache folder on a disk of one megabyte, of which the system says that it is large."
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', disk], capture_output=True).returncode: pytest.skip('a small disk cannot be mounted here (needs root)')
    monkeypatch.setenv('XDG_CACHE_HOME', str(disk))
    monkeypatch.setattr(cache_module, 'free_disk', lambda folder: 10**12)
    yield disk
    subprocess.run(['umount', '-l', disk], check=True)

def used(disk): return sum(f.stat().st_size for f in disk.rglob('*') if f.is_file())

@pytest.mark.parametrize('commit', [2**27, 60_000])
def test_full_disk(items, small_disk, monkeypatch, commit):
    monkeypatch.setattr(cache_module, '_COMMIT', commit)
    with pytest.warns(UserWarning, match='the disk is full') as said: dls = fold_dls(items, 0, size=128, bs=8, cache='auto')        # 40 images: 2 MB
    assert len(said) == 1 and str(dls.train_ds.tls[0].tfms[-1].cache) == '40 images in memory'
    assert used(small_disk) < 10_000                                                        # its space is the run's again
    (small_disk/'ballast').write_bytes(bytes(900_000))
    with pytest.warns(UserWarning, match='images are decoded in each epoch instead'): assert fill_cache(items.path, (256, 256), cache='disk') is None
    assert used(small_disk) < 910_000
    same(dls.valid, fold_dls(items, 0, size=128, bs=8, num_workers=0).valid)

def test_a_full_disk_keeps_what_others_read(items, small_disk):
    held = fill_cache(items.path[:9], (128, 128), cache='disk')
    read, want = held.reader(items.path[:9]), presized(items.path[8], (128, 128))
    with pytest.warns(UserWarning, match='the disk is full'): fill_cache(items.path, (128, 128), cache='auto')
    assert torch.equal(read([8], [(0, 0)])[0], want)
    assert len(fill_cache(items.path[:9], (128, 128), cache='disk')) >= 9
    assert used(small_disk) < 9*3*128*128 + 10_000

@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_read_only_folder(items, own_cache):
    own_cache.mkdir(mode=0o500)
    with pytest.warns(UserWarning, match='cannot be written'): assert str(fill_cache(items.path, (32, 32))) == '40 images in memory'

def test_budget(items, monkeypatch):
    need = 40*3*32*32
    def room(disk, memory): monkeypatch.setattr(cache_module, 'free_disk', lambda f: disk); monkeypatch.setattr(cache_module, 'free_memory', lambda: memory)
    def made(cache, size=32):
        cache_module._OPEN.clear()
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            return str(fill_cache(items.path, (size, size), cache=cache)), ' '.join(str(o.message) for o in w)
    room(2*need - 1, 2*need)
    assert made('auto') == ('40 images in memory', '')
    room(need, need)
    held, said = made('auto')
    assert held == 'None' and said.count('free') == 2 and 'JPEG' not in said                 # it never alters a pixel
    for cache, where in (('disk', 'on disk'), ('ram', 'in memory')):
        held, said = made(cache)
        assert held == f'40 images {where} as JPEG' and 'off by one or two of 255' in said
    room(10**9, 10**9)
    assert made('ram') == ('40 images in memory', '') and made('disk')[0] == '40 images on disk as JPEG'     # that is there already: the same pixels as before
    assert made('auto') == ('40 images on disk', '')
    clear_caches()
    assert made('disk') == ('40 images on disk', '')
    room(100, 100)
    held, said = made('auto', 33)
    assert held == 'None' and said.count('free') == 2 and 'decoded in each epoch' in said

def test_jpeg_cache_trains(items, tmp_path, monkeypatch, decodes):
    monkeypatch.setattr(cache_module, 'free_disk', lambda f: 40*3*32*32); monkeypatch.setattr(cache_module, 'free_memory', lambda: 40*3*32*32)
    with pytest.warns(UserWarning, match='JPEG of quality 95'):
        a, b = (run(items, tmp_path/f'run{w}', cache='disk', num_workers=w, epochs=1, folds=2) for w in (0, 2))
    pd.testing.assert_frame_equal(a.oof, b.oof, check_exact=True)
    assert decodes() == len(items) and json.loads((tmp_path/'run0/models/fold0.json').read_text())['jpeg_cache'] is True

# -- what is said ------------------------------------------------------------------------------------------------------
def test_progress(tmp_path, capfd):
    items = photos(tmp_path/'photos', 500, 8)
    for cache in ('ram', 'disk'):
        fill_cache(items.path, (9, 9), cache=cache, progress=False)
        assert capfd.readouterr() == ('', '')
        fill_cache(items.path, (10, 10), cache=cache)
        said = capfd.readouterr().err
        assert 'presize cache: 500 images at 10 × 10 take 0.1 MB; ' in said and 'decoding: 100%' in said
    cross_validate(items, {**SETTINGS, 'folds': 2, 'epochs': 1, 'size': 8, 'presize': 8, 'cache': 'ram', 'bs': 100}, out=tmp_path/'run', progress=False, only=[0])
    assert capfd.readouterr() == ('', '')

def test_threads_are_put_back(items):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        fill_cache(items.path, (32, 32), cache='ram')
        with ThreadPoolExecutor(1) as other: assert torch.get_num_threads() == other.submit(torch.get_num_threads).result() == 3
    finally: torch.set_num_threads(before)

def test_pickle_holds_no_pixels(items):
    for cache in ('ram', 'disk'):
        held = fill_cache(items.path, (64, 64), cache=cache)
        data = pickle.dumps(held)
        assert len(data) < 1000
        cache_module._OPEN.clear()
        assert len(pickle.loads(data)) == (40 if cache == 'disk' else 0)

def test_command(items, imgclf):
    assert 'no presized images' in imgclf('cache')[1]
    name = fill_cache(items.path, (32, 32), cache='disk').folder.name
    fill_cache(items.path, (16, 16), cache='disk')
    code, out, _ = imgclf('cache')
    assert code == 0 and name in out and ' 40 ' in out and '0.2 MB in ' in out
    code, _, err = imgclf('cache', 'clear', name.replace('squish', 'squash'))
    assert code == 2 and f'did you mean {name}' in err
    for args in (('clear',), ('clean',), ('--all',), ('clear', name, '--all')): assert imgclf('cache', *args)[0] == 2
    with cache_module._locked(cache_module.cache_folder()/name, None):
        code, _, err = imgclf('cache', 'clear', name)
        assert code == 2 and 'a process is filling it now' in err
    assert 'freed       0.1 MB' in imgclf('cache', 'clear', name)[1] and len(list_caches()) == 1
    assert imgclf('cache', 'clear', '--all')[0] == 0 and len(list_caches()) == 0

@pytest.fixture
def world(tmp_path): return tmp_path

# -- files with a flipped byte -----------------------------------------------------------------------------------------
@pytest.mark.filterwarnings('ignore')
def test_damaged_jpegs_are_read_as_pillow_reads_them(items, capfd):
    rng, data = random.Random(0), Path(items.path[1]).read_bytes()
    outcomes = []
    for _ in range(300):
        b = bytearray(data)
        for _ in range(rng.randint(1, 3)): b[rng.randrange(len(b))] = rng.randrange(256)
        if rng.random() < .3: b = b[:rng.randrange(len(b))]
        found = []
        for read in (lambda o: np.asarray(load_image(o)), lambda o: load_pixels(o).permute(1, 2, 0).numpy()):
            try: found.append(read(bytes(b)))
            except InputError as e: found.append(str(e))
        assert type(found[0]) is type(found[1]) and np.array_equal(*found)
        outcomes.append(isinstance(found[0], str))
    assert 20 < sum(outcomes) < 280
