"A run folder that was cut off, edited or lost a part: one message that names the file and the remedy, or the run mends itself."
import json, shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from imgclf.core import InputError
from imgclf.experiment import Experiment, load_run

def cut(name): return lambda d: (d/name).write_bytes((d/name).read_bytes()[:(d/name).stat().st_size//2])
def write(name, text): return lambda d: (d/name).write_text(text)
def remove(name): return lambda d: (d/name).unlink()
def table(name, change):
    read, to = (pd.read_csv, 'to_csv') if name.endswith('.csv') else (pd.read_parquet, 'to_parquet')
    return lambda d: getattr(change(read(d/name)), to)(d/name, index=False)
def info(d, **kw): (d/'run.json').write_text(json.dumps({k: v for k, v in {**json.loads((d/'run.json').read_text()), **kw}.items() if v is not ...}))
def replace(name, a, b): return lambda d: (d/name).write_text((d/name).read_text().replace(a, b))

scores = lambda d, again: load_run(d).scores()
metrics = lambda d, again: load_run(d).metrics
predict = lambda d, again: load_run(d).predict(d.parent/'images'/'a', progress=False)
resume = lambda d, again: again(d)

REFUSED = dict(
    run_cut=(cut('run.json'), scores, 'run.json is not readable JSON'), run_newer=(lambda d: info(d, format=99), scores, 'in format 99; this version reads format 1'), run_lacks=(lambda d: info(d, vocab=...), scores, 'does not tell vocab; restore it'),
    config_cut=(write('config.yaml', 'a: [1,'), scores, 'config.yaml is not valid YAML'), config_typo=(write('config.yaml', 'sizee: 3'), scores, 'unknown setting sizee; did you mean size'),
    config_edited=(replace('config.yaml', 'epochs: 1 ', 'epochs: 9 '), resume, 'epochs is 9 there and 1 now'),
    items_gone=(remove('items.csv'), scores, 'items.csv: no such file'), items_cut=(cut('items.csv'), scores, 'items.csv was changed since the run began'), items_binary=(lambda d: (d/'items.csv').write_bytes(b'\xff\xfe\x00,\n"'), scores, 'items.csv is no table any more'),
    items_column=(table('items.csv', lambda t: t.drop(columns='label')), scores, 'items.csv has no column label; restore it'), items_label=(table('items.csv', lambda t: t.assign(label='b')), predict, 'imgclf fit --corrections'),
    oof_cut=(cut('oof.parquet'), scores, 'oof.parquet is damaged'), oof_column=(table('oof.parquet', lambda t: t.rename(columns=dict(p_a='p_q'))), scores, 'it has no column p_a); remove it and resume'), oof_rows=(table('oof.parquet', lambda t: t[:5]), scores, 'its images are others'),
    oof_gone=(remove('oof.parquet'), scores, 'resume the run to fill them'), metrics_binary=(lambda d: (d/'metrics.csv').write_bytes(b'\x00\x01,,\n"'), metrics, 'metrics.csv is damaged'), metrics_empty=(write('metrics.csv', ''), metrics, 'metrics.csv is damaged'),
    model_cut=(cut('models/fold0.safetensors'), predict, 'fold0.safetensors: damaged'), model_gone=(remove('models/fold1.safetensors'), predict, 'lacks fold1.safetensors; put the files back, or resume the run'), model_json=(cut('models/fold0.json'), predict, 'fold0.json is not readable JSON'))

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    d, rng = tmp_path_factory.mktemp('damaged'), np.random.default_rng(0)
    for label in 'ab':
        (d/'images'/label).mkdir(parents=True)
        for i in range(8): Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(d/'images'/label/f'{i}.png')
    again(d/'run')
    return d/'run'

def again(out): return Experiment(source=str(out.parent/'images'), arch='test_resnet', pretrained=False, size=24, folds=2, epochs=1, freeze_epochs=0, bs=4, num_workers=0, precision='fp32').run(out, progress=False)

@pytest.fixture
def copy(run):
    d = run.parent/'copy'
    shutil.copytree(run, d)
    yield d
    shutil.rmtree(d)

def files(d): return {o.relative_to(d).as_posix(): o.read_bytes() for o in d.rglob('*') if o.is_file() and o.suffix != '.lock'}

@pytest.mark.parametrize('name', REFUSED)
def test_refused(copy, name):
    edit, use, part = REFUSED[name]
    edit(copy)
    before = files(copy)
    with pytest.raises(InputError) as e: use(copy, again)
    assert part in str(e.value), str(e.value)
    assert files(copy) == before                                  # nothing was touched

@pytest.mark.parametrize('name', ['oof.parquet', 'models/fold1.safetensors'])
def test_mends_itself(run, copy, name):
    "Lost predictions are made again by the models that are there, a lost model is trained again; both end where the run was."
    (copy/name).unlink()
    kept = (copy/'models'/'fold0.safetensors').stat().st_mtime_ns
    again(copy)
    pd.testing.assert_frame_equal(load_run(copy).oof, load_run(run).oof)
    assert (copy/'models'/'fold0.safetensors').stat().st_mtime_ns == kept
    assert (copy/'models'/'fold1.safetensors').read_bytes() == (run/'models'/'fold1.safetensors').read_bytes()
