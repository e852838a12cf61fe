"The zoo: every network by the same questions, the published sizes, and every recipe for a step of training."
import warnings

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from imgclf.compose import config_learner, fit_phases, phases
from imgclf.config import Config
from imgclf.core import InputError
from imgclf.data.fold import make_folds
from imgclf.models.build import HEADS, build_model
from imgclf.models.zoo import create_model, list_zoo, paper_recipe, zoo_table

NAMES = [*list_zoo(), 'nin_cifar', 'googlenet_aux', 'inception_v3_aux']
SIZE = dict(alexnet=67, nin=67, inception_v3=75, inception_v3_aux=75, xception=40)                        # the smallest that passes, or near it; 32 for others
SMALL = dict(vgg=dict(width=.125), vit=dict(embed_dim=48, depth=2, num_heads=3), attention_cnn=dict(widths=[8, 8, 16, 16, 16], dim=8)) # of the same kind, in less memory
CONTRACT = ('alexnet vgg nin resnet18 densenet40 mobilenetv1 mobilenetv2 googlenet inception_v3 darknet53 xception resnext senet18 squeezenet shufflenetv1 '
            'efficientnet_b0 vit mlp_mixer resmlp attention_cnn graph_attention').split()

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def side(name): return SIZE.get(name, 32)
def make(name, **kw): return timm.create_model(name, **SMALL.get(name, {}), **({'img_size': kw.pop('size')} if 'size' in kw else {}), **kw)
def sized(name, size):
    cfg = timm.get_pretrained_cfg(name)
    return dict(size=size) if cfg is not None and cfg.fixed_input_size else {}

def test_names(): assert list_zoo() == CONTRACT

@pytest.mark.parametrize('name', NAMES)
def test_network(name):
    "Shapes for colour and grey, a gradient for every parameter, one image as well as many, another head, features, several sizes."
    torch.manual_seed(0)
    s = side(name)
    net = make(name, num_classes=5, in_chans=1, **sized(name, s))
    x = torch.rand(2, 1, s, s)
    y = net.train()(x)
    if name.endswith('_aux'): assert all(o.shape == (2, 5) for o in y); y = sum(y)
    assert y.shape == (2, 5)
    y.square().sum().backward()
    lost = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not lost
    net.eval()
    with torch.no_grad():
        both = net(x)
        off = lambda a, b: ((a - b).abs().max()/both.abs().max().clamp_min(1e-6)).item()           # a head may start at zero
        assert both.shape == (2, 5) and off(net(x[:1]), both[:1]) < 1e-4
        assert off(net.forward_head(net.forward_features(x)), both) < 1e-5
        net.reset_classifier(3)
        assert net(x).shape == (2, 3) and net.get_classifier() is not None
        for p, q in net.named_parameters(): assert q.isfinite().all(), p

@pytest.mark.parametrize('name', [o for o in NAMES if not o.endswith('_aux')])
@pytest.mark.parametrize('head', HEADS)
def test_build_model(name, head):
    "Body and head by `build_model`, at a size that is not square where the architecture allows it."
    s = side(name) + 32
    hw = (s, s + 16) if s % 16 == 0 else (s, s)
    net = build_model(name, 4, size=hw, head=head, **SMALL.get(name, {})).eval()
    with torch.no_grad(): assert net(torch.rand(1, 3, *hw)).shape == (1, 4)
    assert net.info['arch'] == name

def test_published_sizes():
    "Ten classes at 224 pixels, as a public benchmark has them (millions of parameters; thousand millions of multiply-adds)."
    published = dict(vgg=(128.81, 7.63), resnet18=(11.18, 1.82), mobilenetv1=(3.22, None), mobilenetv2=(2.24, None), googlenet=(5.98, 1.59), darknet53=(None, 7.14), xception=(20.83, None),
                     senet18=(11.23, 1.82), efficientnet_b0=(4.02, None), resmlp=(14.97, None), alexnet=(58.32, None), nin=(2.02, .833), densenet40=(.176, None))
    table = zoo_table({k: (k, dict(alexnet=dict(groups=1), nin=dict(last=False)).get(k, {})) for k in published}, num_classes=10)
    for name, (params, gmacs) in published.items():
        if params: assert table.params[name] == pytest.approx(params, rel=.01), name
        if gmacs: assert table.gmacs[name] == pytest.approx(gmacs, rel=.01), name
    assert (table.gflops == 2*table.gmacs).all()

@pytest.mark.parametrize('name', ['mobilenetv1', 'shufflenetv1', 'googlenet', 'nin_cifar', 'densenet40', 'squeezenet'])
def test_maps(name):
    "`features_only` gives maps of the widths and reductions that it announces."
    net = timm.create_model(name, features_only=True, in_chans=1)
    for o, c, r in zip(net(torch.rand(1, 1, 64, 64)), net.feature_info.channels(), net.feature_info.reduction()):
        assert o.shape[1] == c and abs(o.shape[-1] - 64/r) <= 3            # convolutions without padding lose a border

@pytest.mark.parametrize('name', ['nin', 'googlenet', 'shufflenetv1', 'densenet40', 'mobilenetv1', 'squeezenet'])
def test_weights_travel(name, tmp_path):
    "A body's weights come back from a file, its head left out; those of another network are refused by name."
    s = side(name)
    net = make(name, num_classes=7)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path/'net.safetensors')
    body = build_model(name, 4, size=s + 32, weights=tmp_path/'net.safetensors')
    own = net.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in body[0].model.state_dict().items())
    with pytest.raises(InputError, match='do not fit resnet18'): build_model('resnet18', 4, size=32, weights=tmp_path/'net.safetensors')

@pytest.mark.parametrize('call, message', [
    (lambda: create_model('shufflenet_v1', 3), 'did you mean shufflenetv1'), (lambda: create_model('vgg', 0), 'num_classes=0'), (lambda: create_model('vgg', 2.5), 'num_classes=2.5'),
    (lambda: create_model('nin', 3, size=32), 'nin does not take images of 32 × 32'), (lambda: create_model('resmlp', 3, size=50), 'not a multiple; use 48'),
    (lambda: create_model('densenet40', 3, depth=12), 'depth=12'), (lambda: create_model('shufflenetv1', 3, groups=7), 'groups=7'), (lambda: create_model('mobilenetv2', 3, width='x'), "width='x'"),
    (lambda: zoo_table(['resnet18', 'nope']), "unknown model 'nope'")])
def test_refused(call, message):
    with pytest.raises(InputError, match=message): call()

def test_names_stay_timms():
    "Importing the zoo changes nothing that timm knows, but for a name that timm has given up."
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert type(timm.create_model('resnet18')).__module__ == 'timm.models.resnet'
    for name in ('resnet18', 'inception_v3', 'efficientnet_b0', 'darknet53'): assert timm.model_entrypoint(name).__module__.startswith('timm.')

# Recipes

@pytest.fixture(scope='module')
def items(tmp_path_factory):
    d, rng, rows = tmp_path_factory.mktemp('zoo'), np.random.default_rng(0), []
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(d/f'{i}.png')
        rows.append(dict(id=str(i), path=str(d/f'{i}.png'), label='ab'[i % 2]))
    return make_folds(pd.DataFrame(rows), 2, duplicates=False)

@pytest.mark.parametrize('recipe', [*list_zoo(), 'zoo_base'])
def test_recipe_step(recipe, items):
    "Each recipe with everything but size and length as its authors had it: two steps, finite numbers, weights that moved."
    path = recipe if recipe == 'zoo_base' else paper_recipe(recipe)
    c = Config.load(path)
    s = side(c.arch)
    c = Config.load(path, size=s, presize=s + 8 if c.presize else None, bs=4, epochs=2, precision='fp32', num_workers=0, folds=2, arch_args=c.arch_args | SMALL.get(c.arch, {}),
                    **(dict(arch='senet18') if recipe == 'zoo_base' else {}))
    learn = config_learner(c, items, 0)
    before = [p.detach().clone() for p in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging(): fit_phases(learn, phases(c))
    after = list(learn.model.parameters())
    assert all(p.isfinite().all() for p in after) and any(not torch.equal(p, q) for p, q in zip(before, after))
    assert len(learn.recorder.losses) == 2      # a warm-up starts from nothing: the second step is the first that counts
