"The pages of a run and of a comparison in a browser: whole, alone, and as wide as the screen; and by the command line."
import http.server, json, re, shutil, subprocess, threading

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from imgclf.config import Config
from imgclf.report import write_report
from imgclf.runs import Run, open_run
from imgclf.versus import write_comparison

BROWSER = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
FLAGS = '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-default-apps'.split()
CLASSES = ['a class with a name that goes on and on', 'rust', 'scab', 'sound']

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Three runs over the same 120 photos of 300 pixels, one of them over other folds; no training."
    d, rng = tmp_path_factory.mktemp('world'), np.random.default_rng(0)
    rows = []
    for i in range(120):
        Image.fromarray(rng.integers(0, 255, (300, 260, 3), dtype=np.uint8)).save(d/f'{i:03d}.jpg', quality=60)
        rows.append(dict(id=f'{i:03d}.jpg', path=str(d/f'{i:03d}.jpg'), label=CLASSES[i % 4], fold=i//4 % 3))
    items = pd.DataFrame(rows)
    for name, skill, its, kw in (('base', .5, items, {}), ('strong', .8, items, dict(mix='mixup')), ('other', .5, items.assign(fold=2 - items.fold), {})):
        with open_run(d/'runs'/name, its, Config(source='photos', folds=3, **kw)) as run: pass
        right = np.random.default_rng(1).random(120) < skill
        said = np.where(right, np.arange(120) % 4, (np.arange(120) + 1) % 4)
        p = np.random.default_rng(2).dirichlet([1]*4, 120)*.4; p[np.arange(120), said] += .6
        its[['id', 'fold']].assign(**dict(zip(run.prob_cols, p.T.astype('float32')))).to_parquet(run.path/'oof.parquet')
        pd.DataFrame([dict(fold=k, epoch=e, phase='one', train_loss=1/(e + 1), valid_loss=1.1/(e + 1), accuracy=.5 + .1*e, lr=.1, seconds=3.) for k in range(3) for e in range(3)]).to_csv(run.path/'metrics.csv', index=False)
        for k in range(3): (run.path/'models'/f'fold{k}.safetensors').touch()
    return d

@pytest.fixture(scope='module')
def pages(world):
    return dict(run=write_report(Run(world/'runs/base')), comparison=write_comparison(world/'runs/base', world/'runs/strong', out=world/'comparison.html'))

PROBE = '''<!DOCTYPE html><html><body><iframe id="f" src="/page.html" width="%d" height="900"></iframe><pre id="found"></pre><script>
document.getElementById('f').onload = e => { const d = e.target.contentDocument, root = d.documentElement, img = [...d.images];
  document.getElementById('found').textContent = JSON.stringify({title: d.title, wide: root.scrollWidth, inner: root.clientWidth, high: root.scrollHeight, images: img.length, broken: img.filter(o => !o.naturalWidth).map(o => o.alt),
    text: d.body.innerText.length, off: [...d.querySelectorAll('h1,h2,h3,p,figure,.card,.plots img')].filter(o => o.getBoundingClientRect().right > root.clientWidth + 1).map(o => o.tagName + ' ' + (o.id || o.textContent.slice(0, 40)))}) }
</script></body></html>'''

@pytest.mark.skipif(not BROWSER, reason='no Chromium here')
@pytest.mark.parametrize('width', [360, 1200])
@pytest.mark.parametrize('page', ['run', 'comparison'])
def test_in_a_browser(pages, page, width, tmp_path):
    asked = []
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = {'/probe.html': (PROBE % width).encode(), '/page.html': pages[page].read_bytes()}.get(self.path)
            self.send_response(200 if body else 404); self.send_header('Content-Type', 'text/html; charset=utf-8'); self.end_headers(); self.wfile.write(body or b'')
        def log_message(self, *args): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        r = subprocess.run([BROWSER, *FLAGS, f'--user-data-dir={tmp_path}', '--window-size=1400,1000', '--virtual-time-budget=8000', '--dump-dom', f'http://127.0.0.1:{server.server_port}/probe.html'], capture_output=True, text=True, timeout=120)
        server.shutdown()
    found = json.loads(re.search('<pre id="found">(.*?)</pre>', r.stdout, re.S)[1].replace('&amp;', '&').replace('&gt;', '>').replace('&lt;', '<'))
    assert set(asked) <= {'/probe.html', '/page.html', '/favicon.ico'}, 'the page asked for something'
    assert found['title'] == dict(run='base', comparison='base · strong')[page]
    assert found['wide'] <= found['inner'], f'wider than the screen: {found["off"]}'
    assert not found['off'] and not found['broken'] and found['images'] > 15 and found['text'] > 1500

def test_small_and_alone(pages):
    for page in pages.values():
        text = page.read_text(encoding='utf-8')
        assert page.stat().st_size < 5e6
        assert not re.search(r'https?://(?!www\.w3\.org)', text) and '<script' not in text and 'url(' not in text and '@import' not in text

def test_many_classes_and_photos_stay_below_five_megabytes(world, tmp_path):
    rng, n = np.random.default_rng(0), 1000
    labels = [f'species {i:03d} of a long list' for i in range(200)]
    photos = []
    for i in range(48):
        Image.fromarray(rng.integers(0, 255, (200, 200, 3), dtype=np.uint8)).save(tmp_path/f'{i}.png')      # noise: what compresses worst
        photos.append(str(tmp_path/f'{i}.png'))
    items = pd.DataFrame(dict(id=[f'{i:04d}' for i in range(n)], path=[photos[i % 48] for i in range(n)], label=[labels[i % 200] for i in range(n)], fold=np.arange(n)//200 % 5))
    with open_run(tmp_path/'run', items, Config(source='photos')) as run: pass
    items[['id', 'fold']].assign(**dict(zip(run.prob_cols, rng.dirichlet([.1]*200, n).T.astype('float32')))).to_parquet(run.path/'oof.parquet')
    assert write_report(run, n_worst=200, draws=10).stat().st_size < 5e6

# -- the command line --------------------------------------------------------------------------------------------------
def test_compare_with_a_page(imgclf, world):
    code, out, err = imgclf('compare', 'runs/base', 'runs/strong', '--report', 'page.html')
    assert code == 0, err
    assert 'strong is better than base' in out and 'to look at: page.html' in out
    assert '<title>base · strong</title>' in (world/'page.html').read_text(encoding='utf-8')
    assert imgclf('report', 'runs/base', 'runs/strong', '--out', 'again.html')[0] == 0
    assert (world/'again.html').read_bytes() == (world/'page.html').read_bytes()

def test_report_of_one(imgclf, world):
    code, out, err = imgclf('report', 'runs/base')
    assert code == 0 and 'Out-of-fold accuracy' in out, err

@pytest.mark.parametrize('args,part', [
    (('report', 'runs/base', '--attribution', 'salience'), 'did you mean saliency'), (('report', 'runs/base', 'runs/strong', '--attribution', 'saliency', '--out', 'x.html'), 'the mistakes of one run'),
    (('report', 'runs/base', '--attribution', 'saliency'), 'a saved model is two files'),
    (('report', 'runs/base', 'runs/strong'), 'no --out: 2 runs share a page'), (('report', 'runs/base', '--out', 'x.html'), '--out is for a comparison'),
    (('compare', 'runs/base', 'runs/other', '--report', 'no.html'), 'are in other folds'), (('compare', 'runs/base', 'runs/strong', '--report', 'nowhere/x.html'), 'no such folder'),
    (('compare', 'runs/base', '--report', 'no.html'), 'alone cannot be compared'), (('compare', 'runs/base', 'runs/strong', '--report', 'runs'), 'is a folder; name a file')])
def test_refused(imgclf, world, args, part):
    code, out, err = imgclf(*args)
    assert code == 2 and part in err and 'Traceback' not in err, err
    assert not (world/'no.html').exists() and not (world/'x.html').exists()
