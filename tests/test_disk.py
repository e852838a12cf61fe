"A disk that fills up, or that cannot be written, ends a run in one message; the last epoch's state stays whole, and the run goes on when there is space."
import os, subprocess

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from imgclf.core import InputError
from imgclf.crossval import cross_validate
from imgclf.runs import load_tensors

SETTINGS = dict(arch='test_resnet', pretrained=False, size=32, bs=8, folds=2, schedule='one_cycle', epochs=2, duplicates=False, num_workers=0, precision='fp32')

@pytest.fixture
def items(tmp_path):
    rows, rng = [], np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path/f'{i}.png')
        rows.append(dict(id=str(i), path=str(tmp_path/f'{i}.png'), label='ab'[i % 2], fold=i // 2 % 2))
    return pd.DataFrame(rows)

@pytest.fixture
def small_disk(tmp_path):
    "A disk of 8 MB: a state of this model is about 5."
    disk = tmp_path/'disk'
    disk.mkdir()
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', disk], capture_output=True).returncode: pytest.skip('a small disk cannot be mounted here (needs root)')
    yield disk
    subprocess.run(['umount', '-l', disk], check=True)

def test_full_disk(items, small_disk, tmp_path):
    whole = cross_validate(items, SETTINGS, out=tmp_path/'whole', progress=False).oof
    ballast = small_disk/'ballast'
    def run(): return cross_validate(items, SETTINGS, out=small_disk/'run', progress=False)
    with pytest.raises(InputError, match='no space left') as e: run()
    assert '\n' not in str(e.value)
    state = small_disk/'run'/'state'/'fold0.safetensors'
    assert load_tensors(state)[1]['epoch'] == 1
    assert not list((small_disk/'run').rglob('*.tmp*'))
    subprocess.run(['mount', '-o', 'remount,size=64m', small_disk], check=True)
    pd.testing.assert_frame_equal(run().oof, whole)

@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_read_only_folder(items, tmp_path):
    place = tmp_path/'locked'
    place.mkdir(mode=0o500)
    with pytest.raises(InputError, match='cannot be'): cross_validate(items, SETTINGS, out=place/'run', progress=False)
