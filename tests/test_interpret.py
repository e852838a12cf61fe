"Attribution: six methods on networks of every kind, on real runs, with nothing left behind."
import base64, shutil, xml.etree.ElementTree as ET
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import ColReader, ColSplitter
from fastai.vision.augment import Resize
from fastai.vision.data import ImageBlock, ImageDataLoaders
from PIL import Image

from imgclf import report
from imgclf.core import InputError
from imgclf.crossval import cross_validate
from imgclf.data.block import fold_dls
from imgclf.data.fold import make_folds
from imgclf.experiment import load_run
from imgclf.interpret import Explainer, attribute, show_attributions
from imgclf.learner import make_learner
from imgclf.models.attribution import METHODS
from imgclf.models.build import build_model
from imgclf.report import write_report
from imgclf.results import worst

pytest.importorskip('captum')
NETS = dict(resnet18={}, mobilenetv1={}, efficientnet_b0={}, vit=dict(embed_dim=48, depth=2, num_heads=3), attention_cnn=dict(widths=[8, 8, 16, 16, 16], dim=8), graph_attention={}, densenet40={},
            squeezenet={}, shufflenetv1={}, convnext_atto={})
PRODUCTS = {'efficientnet_b0', 'vit', 'attention_cnn', 'graph_attention', 'convnext_atto'}   # gates, attention, layer norms: DeepLift has no rule for them
BASE = dict(convnext_atto='blur')   # normalises each position: from an image of one colour, all happens in the first step
QUICK = dict(noise_tunnel=dict(nt_samples=2, n_steps=4), gradient_shap=dict(n_samples=4), occlusion=dict(window=16, stride=16))

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)

def image(seed, hw=(32, 32)): return np.random.default_rng(seed).integers(0, 255, (*hw, 3), dtype=np.uint8)

@pytest.fixture(scope='module', params=NETS)
def explained(request):
    "A network that has seen some batches, so that its normalisation layers say something."
    name = request.param
    model = build_model(name, 3, size=32, head='plain', **NETS[name])
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(20): model.train()(torch.randn(16, 3, 32, 32))
    model.precision = 'bf16'
    return name, model, Explainer(model, stats=([.4, .5, .6], [.2, .25, .3]), size=32, vocab=['a', 'b', 'c'])

@pytest.mark.parametrize('method', METHODS)
def test_methods(explained, method):
    "Every method on every kind of network: shape, finite, repeatable, complete where it says so, the network as it was."
    name, model, explain = explained
    weights, seen = {k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()]
    ask = lambda: explain(image(0), method, 'b', 'auto' if method == 'saliency' else BASE.get(name, 'auto'), **QUICK.get(method, {}))
    a = ask()
    assert a.values.shape == (3, 32, 32) and a.map.shape == (32, 32) and a.values.isfinite().all() and a.values.abs().max() > 0
    if method in ('noise_tunnel', 'gradient_shap', 'deep_lift'): assert torch.equal(a.values, ask().values)
    assert a.target == 'b' and 0 < a.prob < 1
    if method == 'integrated_gradients': assert abs(a.delta) <= .05*abs(a.gap) + .005*a.values.abs().sum(), a   # untrained networks: shares are large and cancel
    if method == 'deep_lift' and name not in PRODUCTS: assert abs(a.delta) <= .01*abs(a.gap) + 2e-3, a
    assert model.precision == 'bf16' and seen == [m.training for m in model.modules()] and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())

def test_attention_beside(explained):
    name, _, explain = explained
    n = dict(attention_cnn=2, graph_attention=1).get(name, 0)
    fig = show_attributions(explain, [image(0), image(1, (40, 50))], ['saliency'])
    assert len(fig.axes) == 2*(2 + n) and [ax.get_title() for ax in fig.axes[2:2 + n]] == [f'attention {i+1}' for i in range(n)]

def test_modes_and_sizes():
    "Any mode and size of picture, square or not; half precision; what does not fit is said."
    net = timm.create_model('resnet10t', num_classes=3).half()
    explain = Explainer(net, stats=([.5]*3, [.25]*3), size=(32, 48))
    for mode in ('L', 'RGB', 'RGBA', 'P', '1', 'CMYK', 'I;16'):
        im = Image.fromarray(image(2, (30, 20))).convert(mode) if mode != 'I;16' else Image.fromarray(np.arange(600, dtype=np.uint16).reshape(30, 20)*100)
        assert explain(im, 'saliency').values.shape == (3, 32, 48)
    assert net.conv1[0].weight.dtype == torch.float16
    assert explain(torch.from_numpy(image(2)).permute(2, 0, 1), 'saliency').values.shape == (3, 32, 32)
    with pytest.raises(InputError, match='normalised by 3 channels|does not take'): explain(torch.rand(1, 32, 32))
    vit = build_model('vit', 3, size=32, **NETS['vit'])
    with pytest.raises(InputError, match='does not take an image of shape'): attribute(vit, torch.rand(3, 48, 48), stats=([.5]*3, [.25]*3))
    with pytest.raises(InputError, match='classifiers'): attribute(torch.nn.Conv2d(3, 4, 3), torch.rand(3, 8, 8), stats=([0]*3, [1]*3))
    grey = timm.create_model('resnet10t', num_classes=3, in_chans=1)
    assert attribute(grey, image(0), 'saliency', stats=([.5], [.25]), size=32).values.shape == (1, 32, 32)

@pytest.fixture(scope='module')
def items(tmp_path_factory):
    d, rows = tmp_path_factory.mktemp('pictures'), []
    for i in range(24):
        Image.fromarray(image(i, (40, 36))//(1 + i % 2)).save(d/f'{i}.png')
        rows.append(dict(id=f'im{i}', path=str(d/f'{i}.png'), label=['light', 'dark'][i % 2]))
    return make_folds(pd.DataFrame(rows), 2, duplicates=False)

CONFIG = dict(arch='resnet10t', pretrained=False, size=32, presize=40, epochs=1, schedule='one_cycle', bs=8, folds=2, num_workers=0, precision='bf16')

@pytest.fixture(scope='module')
def run(items, tmp_path_factory): return cross_validate(items, CONFIG, out=tmp_path_factory.mktemp('runs')/'run', progress=False).run

def test_run(run, items, tmp_path):
    "A run's models together and one at a time; the probability is that of `predict`, up to the precision of its arithmetic."
    pred = run.predict(items[:1].drop(columns=['label', 'fold']), progress=False).iloc[0]
    both = attribute(run, 'im0', n_steps=16)
    assert both.target == pred.label and abs(both.prob - pred.confidence) < .02
    each = [attribute(load_run(run.path), items.path[0], target=both.target, fold=k, n_steps=16) for k in range(2)]
    assert torch.allclose(both.values, (each[0].values + each[1].values)/2, atol=1e-5*both.values.abs().max().item())
    assert torch.allclose(both.spread, (each[0].map - each[1].map).abs()/2, atol=1e-4*both.map.abs().max().item())
    assert each[0].spread is None and len(both.show().axes) == 3
    with pytest.raises(InputError, match="image='im99': no such file, and none of the 24 ids"): attribute(run, 'im99')
    with pytest.raises(InputError, match='there are folds 0 to 1'): attribute(run, 'im0', fold=2)
    with pytest.raises(InputError, match='did you mean light'): attribute(run, 'im0', target='ligt')

def test_run_without_models(items, tmp_path):
    run = cross_validate(items, CONFIG, out=tmp_path/'run', progress=False).run
    run.model_file(1).unlink()
    with pytest.raises(InputError, match='lacks fold1.safetensors; put the files back, or resume the run'): attribute(run, 'im0')

# -- the report ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def erring(items, tmp_path_factory):
    "A run that is wrong about every image, whatever its models learned."
    run = cross_validate(items, CONFIG, out=tmp_path_factory.mktemp('runs')/'erring', progress=False).run
    oof = run.oof.assign(p_light=[float(o == 'dark') for o in items.label], p_dark=[float(o == 'light') for o in items.label])
    oof.astype({c: 'float32' for c in run.prob_cols}).to_parquet(run.path/'oof.parquet')
    return load_run(run.path)

def tiles(page):
    "The explained tiles of a page: id and fold, names of the classes explained, bytes of the pictures."
    for fig in ET.fromstring(page.read_text(encoding='utf-8')).iter('figure'):
        if (maps := fig.find("div[@class='maps']")) is not None: yield fig.find('figcaption')[-1].tail, [o.text for o in maps.iter('span')], [base64.b64decode(o.get('src').split(',')[1]) for o in maps.iter('img')]

@pytest.mark.parametrize('method', METHODS)
def test_report_explains(erring, method):
    "Each of the surest mistakes beside its attribution by the model that had held it out: the pixels are those that `attribute` gives by hand."
    page = write_report(erring, attribution=method, n_worst=3, draws=10)
    found = list(tiles(page))
    assert len(found) == 3 and 'the one that had held it out' in page.read_text(encoding='utf-8')
    name, classes, pictures = found[0]
    row = erring.items.set_index('id').loc[name.split(',')[0]]
    assert name.endswith(f'fold {row.fold}') and classes == [f'for {dict(light="dark", dark="light")[row.label]}', f'for {row.label}'] and len(pictures) == 3
    by_hand = [(255*attribute(erring, row.name, method, row.label, fold=k).blend().clip(0, 1)).round().astype(np.uint8) for k in range(2)]
    assert np.array_equal(np.array(Image.open(BytesIO(pictures[2])).convert('RGB')), by_hand[row.fold]) and not np.array_equal(*by_hand)

def test_report_looks_once(erring, monkeypatch):
    "Mistakes are looked for once, and each image is opened once."
    asked, files = [], []
    monkeypatch.setattr('imgclf.report.worst', lambda run, n, real=report.worst: asked.append(n) or real(run, n))
    monkeypatch.setattr('PIL.Image.open', lambda *a, real=Image.open, **kw: files.append(a) or real(*a, **kw))
    write_report(erring, attribution='saliency', n_worst=24, draws=10)
    assert len(asked) == 1 and len(files) == 24

def test_report_without_pictures(erring, items, tmp_path):
    "One image gone: its tile says why. All gone: one message, and the page that was there stays."
    shutil.copytree(erring.path, tmp_path/'run')
    run, gone = load_run(tmp_path/'run'), tmp_path/'gone'
    at = worst(run, 2).id.iloc[0]
    run.items.loc[run.items.id == at, 'path'] = str(gone)
    assert [pictures and len(pictures) for _, _, pictures in tiles(write_report(run, attribution='saliency', n_worst=2, draws=10))] == [3]
    assert 'no such file' in (run.path/'report.html').read_text(encoding='utf-8')
    before = (run.path/'report.html').read_bytes()
    run.items['path'] = str(gone)
    with pytest.raises(InputError, match='none of the 2 images can be opened .*gone: no such file.*; put them back, or leave the attribution out'): write_report(run, attribution='saliency', n_worst=2)
    assert (run.path/'report.html').read_bytes() == before

def test_report_of_several_labels(items, tmp_path):
    "The label that was furthest off is the one explained."
    tags = items.assign(label=[('light', 'odd') if o == 'light' else () for o in items.label])
    run = cross_validate(tags, CONFIG | dict(loss='bce'), out=tmp_path/'run', progress=False).run
    run.oof.assign(p_light=np.float32(.9), p_odd=np.float32(.2)).to_parquet(run.path/'oof.parquet')
    said = {o[0].split(',')[0]: o[1] for o in tiles(write_report(load_run(run.path), attribution='saliency', draws=10))}
    assert said == {r.id: ['for odd' if r.label else 'for light'] for r in tags.itertuples()}

def test_own_learners(items, tmp_path):
    "A run of a user's own learners."
    make = lambda items, fold: make_learner(fold_dls(items, fold, size=32, bs=8, num_workers=0, cache='ram'), 'resnet10t', pretrained=False)
    run = cross_validate(items, None, make=make, out=tmp_path/'run', progress=False).run
    a = attribute(run, 'im3', 'saliency')
    assert a.spread is not None and abs(a.prob - run.predict(items[3:4], progress=False).confidence.iloc[0]) < .02
    for f in (lambda: attribute(load_run(run.path), 'im3'), lambda: write_report(load_run(run.path), attribution='saliency')):
        with pytest.raises(InputError, match=r'was trained with make=.* open it by load_run\(path, make=...\)'): f()
    assert list(tiles(write_report(load_run(run.path, make), attribution='saliency', draws=10)))

def test_model_without_gradients(items):
    "One message that names the method that needs none."
    class Numpy(torch.nn.Module):
        def forward(self, x): return torch.from_numpy(np.stack([x.detach().mean((1, 2, 3)).numpy()]*2, 1)) + 0*torch.arange(2.)
    net, kw = Numpy(), dict(stats=([.5]*3, [.25]*3), size=16)
    for method in METHODS:
        if method != 'occlusion':
            with pytest.raises(InputError, match="gives no gradient .*method='occlusion' needs none"): attribute(net, image(0), method, **kw)
    assert attribute(net, image(0), 'occlusion', window=8, stride=8, **kw).values.shape == (3, 16, 16)

def test_fastai_loaders(items):
    "DataLoaders of fastai's own: the same pixels as in validation, by path and as a picture."
    dls = ImageDataLoaders.from_df(items.assign(is_valid=items.fold == 0), fn_col='path', label_col='label', path='/', valid_col='is_valid', bs=12, num_workers=0, item_tfms=Resize(32))
    learn = make_learner(dls, 'resnet10t', pretrained=False, precision='fp32')
    probs, path = learn.get_preds()[0], dls.valid_ds.items.path.iloc[5]
    for o in (path, Image.open(path)): assert abs(attribute(learn, o, 'saliency').prob - probs[5].max().item()) < 1e-4
    assert torch.equal(attribute(learn, 'im3', 'saliency').values, attribute(learn, items.path[3], 'saliency').values)
    own = DataBlock((ImageBlock, CategoryBlock), get_x=lambda r: r['path'], get_y=ColReader('label'), splitter=ColSplitter('is_valid'), item_tfms=Resize(32)).dataloaders(items.assign(is_valid=items.fold == 0), bs=12, num_workers=0)
    with pytest.raises(InputError, match='in a way of their own'): attribute(make_learner(own, 'resnet10t', pretrained=False), path)
