"A compiled run: progressive stages, a stop and a resume, weights under plain names, a plain learner afterwards. Under a minute on one core."
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from timm.models import register_model
from torch import nn

from imgclf.callback.compile import Compile, check_compile
from imgclf.config import Config
from imgclf.core import InputError
from imgclf.crossval import cross_validate
from imgclf.data.source import items_from_folder
from imgclf.experiment import load_run
from imgclf.learner import make_learner

class Tiny(nn.Module):
    num_features, pretrained_cfg = 4, {}
    def __init__(self, in_chans): super().__init__(); self.conv, self.bn = nn.Conv2d(in_chans, 4, 3, 2), nn.BatchNorm2d(4)
    def forward(self, x): return self.bn(self.conv(x)).relu().mean((2, 3))

@register_model
def imgclf_tiny(pretrained=False, num_classes=0, in_chans=3, **kw): return Tiny(in_chans)

@pytest.fixture(scope='module')
def items(tmp_path_factory):
    d, rng = tmp_path_factory.mktemp('compile'), np.random.default_rng(0)
    for i in range(24):
        px = rng.integers(0, 150, (24, 24, 3), dtype=np.uint8); px[..., i % 2] += 90
        (d/'ab'[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(px).save(d/'ab'[i % 2]/f'{i}.png')
    return items_from_folder(d)

SETTINGS = dict(arch='imgclf_tiny', pretrained=False, head='plain', arch_args=dict(ps=0.), folds=2, bs=4, schedule='one_cycle', lr=.05, num_workers=0, precision='fp32', duplicates=False,
                stages=[dict(size=16, epochs=1), dict(size=24, epochs=1)])

def names(path):
    with safe_open(path, 'pt') as f: return set(f.keys())

def test_compiled_run(items, tmp_path):
    try: check_compile('cpu')
    except InputError as e: pytest.skip(str(e))
    plain = cross_validate(items, Config(**SETTINGS), out=tmp_path/'plain')
    config = Config(**SETTINGS, compile=True)
    def stop(fold, row): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): cross_validate(items, config, out=tmp_path/'fast', on_epoch=stop)
    state = names(tmp_path/'fast'/'state'/'fold0.safetensors')
    assert not [o for o in state if '_orig_mod' in o] and 'model.0.model.conv.weight' in state
    fast = cross_validate(items, config, out=tmp_path/'fast')               # the second stage has another size
    assert names(tmp_path/'fast'/'models'/'fold0.safetensors') == names(tmp_path/'plain'/'models'/'fold0.safetensors')
    probs = [o for o in plain.oof if o.startswith('p_')]
    np.testing.assert_allclose(plain.oof[probs], fast.oof[probs], atol=1e-4)    # the same training, but for rounding: without dropout, which draws other numbers
    run = load_run(tmp_path/'fast')
    learn = run.learner(0)
    assert not any(isinstance(o, Compile) for o in learn.cbs)               # predictions need no compiler
    with learn.no_bar(): preds = learn.get_preds()[0]
    held = fast.oof[fast.oof.fold == 0].set_index('id').loc[learn.dls.valid.items.id, probs]
    np.testing.assert_allclose(preds, held, atol=1e-5)

def test_no_compiler(items, monkeypatch):
    import torch._inductor.config as inductor
    check_compile.cache_clear()
    torch.compiler.reset()
    with inductor.patch({'cpp.cxx': ('/nowhere/g++',), 'force_disable_caches': True}), pytest.raises(InputError, match='needs a C\\+\\+ compiler'):
        cross_validate(items, Config(**SETTINGS, compile=True), out='/nowhere/run')
