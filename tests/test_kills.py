"Twenty kills at moments that chance chooses: the run that was killed ends in what one that was left alone found."
import os, random, signal, subprocess, sys

import pandas as pd
import pytest

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
root, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
items = items_from_folder(root/'images')
config = dict(arch='test_resnet', pretrained=False, folds=3, bs=6, schedule='one_cycle', stages=[dict(size=16, epochs=2), dict(size=24, epochs=2, bs=4)], label_smoothing=.1, mix='mixup', mix_off_last=1,
              plc='margin', plc_warmup=1, plc_theta=[0., 0.], plc_scoring='clean', accumulate=2, average='ema', ema_decay=.9, clip=.5, num_workers=0, precision='fp32', duplicates=False)

def attempt(out, seconds=None):
    "Train in a fork of this process, and kill it so long after it began its work; whether it was killed."
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
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

@pytest.mark.parametrize('seed', [0])
def test_twenty_kills(tmp_path, seed):
    import json
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    for k, label in enumerate(('blue', 'green', 'red')):
        (tmp_path/'images'/label).mkdir(parents=True)
        for i in range(12):
            px = rng.integers(0, 200, (28, 28, 3), dtype=np.uint8); px[..., 2 - k] += 55
            Image.fromarray(px).save(tmp_path/'images'/label/f'{i}.png')
    p = subprocess.run([sys.executable, '-c', SCRIPT, str(tmp_path), str(seed), '20'], capture_output=True, text=True, timeout=900, env=os.environ | dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    assert p.returncode == 0, p.stdout + p.stderr
    found = json.loads(p.stdout.splitlines()[-1])
    assert len(found['moments']) == 20 and len(set(found['moments'])) >= 5, found       # kills fell into different epochs, and not all before the first
    whole = tmp_path/'whole'
    for o in found['done']:
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path/o/'oof.parquet'), pd.read_parquet(whole/'oof.parquet'))          # to the last bit
        for f in ('metrics.csv', 'ledger.csv'):
            one, other = (pd.read_csv(d/f).drop(columns='seconds', errors='ignore') for d in (tmp_path/o, whole))
            pd.testing.assert_frame_equal(one, other)
        assert not any((tmp_path/o/'state').iterdir())
