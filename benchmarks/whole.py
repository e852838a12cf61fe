"""Whole trainings on solar cells, from files to out-of-fold predictions: imgclf, fastai, bare torch, Lightning and timm's parts, by accuracy and seconds.

    python benchmarks/whole.py                        # one fold of 75/25, every side in turn in one process; about 40 minutes of two CPU cores
    python benchmarks/whole.py --sides imgclf fastai  # some of them; rows of other sides in whole.csv stay
    python benchmarks/whole.py --tiny                 # a network so small that loading decides, five folds; --tiny test_resnet: one of some more work
    python benchmarks/whole.py --report               # tables and whole.png from whole.csv, whole_right.csv and whole_tiny.csv

EfficientNet-Lite0 from its packaged weights, 2,624 photos, functional or defective, 128 pixels, six epochs, batches of 32, validation after each epoch.
`fastai`: by hand as its docs show it first: presizing, aug_transforms, fine_tune(5, 3e-3), fp32. `fastai, best`: what its docs offer beyond: to_bf16,
channels last, one cycle over all layers with discriminative rates, flips and quarter turns, label smoothing. `fastai, recipe` is `fastai, best` with
exactly our presizing and rates. `torch`, `lightning`, `timm`: our recipe (AdamW, one cycle or timm's cosine, head at five times the body's rate, eight flips,
light, label smoothing, bf16, channels last) with torchvision v2 or timm's loader in two workers. `imgclf`: the recipe `elpv`, cache filled within.
Seconds count from the table of items to the last validation, filling caches included, imports not. The settings of all sides were fixed before; the
fold that scores chose nothing. `pulse`: milliseconds of a fixed piece of work before each side, to see whether the machine stood still."""
import argparse, json, os, tempfile, time, warnings
from pathlib import Path

warnings.filterwarnings('ignore')
import numpy as np
import pandas as pd
import timm
import torch
from fastai.vision.all import (CategoryBlock, ChannelsLast, ColReader, ColSplitter, DataBlock, ImageBlock, LabelSmoothingCrossEntropyFlat, Learner, Normalize, Resize, Callback,
                               CrossEntropyLossFlat, accuracy, aug_transforms, set_seed, vision_learner)
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from imgclf import demo
from imgclf.config import Config
from imgclf.core import atomic_path
from imgclf.crossval import cross_validate
from imgclf.data.cache import clear_caches
from imgclf.data.fold import make_folds
from imgclf.metrics import paired_gain
from photos import machine

HERE, ARCH = Path(__file__).parent, 'tf_efficientnet_lite0'
SIZE, EPOCHS, BS, LR, WORKERS = 128, 6, 32, 5e-3, 2
VOCAB, MEAN, STD = ['defective', 'functional'], (.5,)*3, (.5,)*3
FEW = None      # --quick: so many images a class

def items_of(folds):
    items = demo.elpv()
    return make_folds(items.groupby('label').head(FEW).reset_index(drop=True) if FEW else items, folds, seed=42)

def pulse():
    "Milliseconds of a fixed piece of work."
    conv, x = nn.Conv2d(64, 64, 3).to(torch.bfloat16), torch.ones(32, 64, 56, 56, dtype=torch.bfloat16)
    took = []
    with torch.no_grad():
        for _ in range(15): t = time.perf_counter(); conv(x); took.append(1e3*(time.perf_counter() - t))
    return float(np.median(took))

# fastai

def fastai_dls(items, fold, presize, tfms, bs=BS):
    block = DataBlock((ImageBlock, CategoryBlock(vocab=VOCAB)), get_x=ColReader('path'), get_y=ColReader('label'), splitter=ColSplitter('held'), item_tfms=Resize(presize),
                      batch_tfms=[*tfms, Normalize.from_stats(MEAN, STD, cuda=False)])
    return block.dataloaders(items.assign(held=items.fold == fold), bs=bs, num_workers=WORKERS, device='cpu')

class Tell(Callback):
    "Accuracy after each epoch."
    order = 100
    def __init__(self, seen): self.seen = seen
    def after_epoch(self): self.seen(self.learn.recorder.values[-1][-1])

def fastai_learner(dls, **kw):
    learn = vision_learner(dls, ARCH, pretrained=False, metrics=accuracy, **kw)
    learn.model[0].model.load_state_dict({k: v for k, v in demo.imagenet_model(ARCH).state_dict().items() if not k.startswith('classifier')})
    return learn

def fastai_end(learn, items):
    learn.remove_cbs(Tell)
    with learn.no_bar(), learn.no_logging(): return items.id[items.fold == 0], learn.get_preds()[0].numpy()

def fastai_hand(items, seen):
    learn = fastai_learner(fastai_dls(items, 0, 192, aug_transforms(size=SIZE, min_scale=.75)), cbs=Tell(seen))
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(EPOCHS - 1, 3e-3)
    return fastai_end(learn, items)

def _fastai_best(items, seen, tfms, rates):
    learn = fastai_learner(fastai_dls(items, 0, SIZE, tfms), cbs=[Tell(seen), ChannelsLast()], loss_func=LabelSmoothingCrossEntropyFlat(eps=.1)).to_bf16()
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(EPOCHS, rates)
    return fastai_end(learn, items)

def fastai_best(items, seen): return _fastai_best(items, seen, aug_transforms(size=SIZE, flip_vert=True, max_rotate=0., max_warp=0., max_zoom=1., max_lighting=.1), slice(3e-3/10, 3e-3))
def fastai_recipe(items, seen): return _fastai_best(items, seen, aug_transforms(size=SIZE, flip_vert=True, max_rotate=0., max_warp=0., max_zoom=1., max_lighting=.1), slice(LR/5, LR))

# torch, Lightning, timm

class Cells(torch.utils.data.Dataset):
    def __init__(self, rows, tfm): self.paths, self.y, self.tfm = rows.path.tolist(), rows.label.map(VOCAB.index).tolist(), tfm
    def __len__(self): return len(self.paths)
    def __getitem__(self, i): return self.tfm(Image.open(self.paths[i]).convert('RGB')), self.y[i]

class QuarterTurn(nn.Module):
    def forward(self, x): return x.transpose(-2, -1) if torch.rand(()) < .5 else x

def v2_tfms(train, tiny=False):
    to, end = [v2.PILToTensor()], [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    if tiny: mid = [v2.RandomResizedCrop(SIZE, (.56, 1), antialias=True), v2.RandomHorizontalFlip(), v2.RandomAffine(10), v2.ColorJitter(.2, .2)] if train else [v2.Resize((SIZE, SIZE), antialias=True)]
    else: mid = [v2.Resize((SIZE, SIZE), antialias=True)] + ([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), QuarterTurn(), v2.ColorJitter(.1, .1)] if train else [])
    return v2.Compose([*to, *mid, *end])

def sets(items, fold=0, tiny=False): return [Cells(items[(items.fold == fold) == held], v2_tfms(not held, tiny)) for held in (False, True)]

def torch_loaders(items, fold=0, tiny=False, bs=BS):
    return [torch.utils.data.DataLoader(ds, bs, shuffle=i == 0, drop_last=i == 0, num_workers=WORKERS, persistent_workers=True) for i, ds in enumerate(sets(items, fold, tiny))]

def groups(model, scaled=False):
    "Body and head; timm takes the rate of the body as a share of the head's."
    head = list(model.get_classifier().parameters())
    body = [p for p in model.parameters() if all(p is not o for o in head)]
    return [dict(params=body, lr_scale=.2), dict(params=head, lr_scale=1.)] if scaled else [dict(params=body, lr=LR/5), dict(params=head, lr=LR)]

def network(): return demo.imagenet_model(ARCH, num_classes=2).train().to(memory_format=torch.channels_last)

def one_cycle(opt, steps): return torch.optim.lr_scheduler.OneCycleLR(opt, [o['lr'] for o in opt.param_groups], total_steps=steps, pct_start=.25)

def predict(model, dl, bf16=True):
    model.eval()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=bf16): return torch.cat([model(x.to(memory_format=torch.channels_last)).float().softmax(1) for x, _ in dl]).numpy()

def loop(model, dls, opt, epochs, loss, on_step, seen=None, bf16=True):
    "The loop that everybody writes."
    train, valid = dls
    truth = np.array(valid.dataset.y)
    for _ in range(epochs):
        model.train()
        for x, y in train:
            with torch.autocast('cpu', torch.bfloat16, enabled=bf16): out = model(x.to(memory_format=torch.channels_last))
            loss(out.float(), y).backward()
            opt.step(); opt.zero_grad(); on_step()
        probs = predict(model, valid, bf16)
        if seen: seen((probs.argmax(1) == truth).mean())
    return probs

def by_torch(items, seen):
    model, dls = network(), torch_loaders(items)
    opt = torch.optim.AdamW(groups(model), betas=(.9, .99), weight_decay=.01, fused=True)
    probs = loop(model, dls, opt, EPOCHS, nn.CrossEntropyLoss(label_smoothing=.1), one_cycle(opt, EPOCHS*len(dls[0])).step, seen)
    return items.id[items.fold == 0], probs

def by_timm(items, seen):
    from timm.data import create_loader
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    train, valid = [Cells(items[(items.fold == 0) == held], None) for held in (False, True)]
    kw = dict(input_size=(3, SIZE, SIZE), batch_size=BS, use_prefetcher=False, interpolation='bilinear', mean=MEAN, std=STD, num_workers=WORKERS, persistent_workers=True)
    dls = [create_loader(train, is_training=True, scale=(1., 1.), ratio=(1., 1.), hflip=.5, vflip=.5, color_jitter=.1, **kw), create_loader(valid, is_training=False, crop_pct=1., **kw)]
    train.tfm, valid.tfm = train.transform, valid.transform
    model = network()
    opt = create_optimizer_v2(groups(model, scaled=True), opt='adamw', lr=LR, weight_decay=.01, betas=(.9, .99))
    sched, _ = create_scheduler_v2(opt, 'cosine', num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=LR/25, min_lr=1e-6, step_on_epochs=False, updates_per_epoch=len(dls[0]))
    steps = iter(range(1, 10**9))
    probs = loop(model, dls, opt, EPOCHS, LabelSmoothingCrossEntropy(.1), lambda: sched.step_update(next(steps)), seen)
    return items.id[items.fold == 0], probs

def by_lightning(items, seen):
    import lightning, logging
    logging.getLogger('lightning.pytorch').setLevel(logging.ERROR)
    dls, loss, total, truth = torch_loaders(items), nn.CrossEntropyLoss(label_smoothing=.1), EPOCHS, None
    class Module(lightning.LightningModule):
        def __init__(self): super().__init__(); self.net, self.hit = network(), []
        def training_step(self, b, i): return loss(self.net(b[0].to(memory_format=torch.channels_last)).float(), b[1])
        def validation_step(self, b, i): self.hit.append((self.net(b[0].to(memory_format=torch.channels_last)).argmax(1) == b[1]).float())
        def on_validation_epoch_end(self): seen(torch.cat(self.hit).mean()); self.hit = []
        def configure_optimizers(self):
            opt = torch.optim.AdamW(groups(self.net), betas=(.9, .99), weight_decay=.01, fused=True)
            return dict(optimizer=opt, lr_scheduler=dict(scheduler=one_cycle(opt, EPOCHS*len(dls[0])), interval='step'))
    module = Module()
    lightning.Trainer(accelerator='cpu', max_epochs=EPOCHS, precision='bf16-mixed', logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      num_sanity_val_steps=0).fit(module, *dls)
    return items.id[items.fold == 0], predict(module.net, dls[1])

# imgclf

def by_imgclf(items, seen, **settings):
    clear_caches()
    with tempfile.TemporaryDirectory() as out:
        config = Config.load('elpv', **dict(folds=4, size=SIZE, epochs=EPOCHS, bs=BS, lr=LR) | settings)
        oof = cross_validate(items, config, out=f'{out}/run', only=[0], progress=False, on_epoch=lambda fold, row: seen(row['accuracy'])).oof
    rows = oof[oof.fold == 0]
    return rows.id, rows[[f'p_{o}' for o in VOCAB]].to_numpy()

def by_imgclf_small(items, seen): return by_imgclf(items, seen, size=96)

SIDES = {'imgclf': by_imgclf, 'fastai': fastai_hand, 'fastai, best': fastai_best, 'fastai, recipe': fastai_recipe, 'torch': by_torch, 'lightning': by_lightning, 'timm': by_timm, 'imgclf, 96 px': by_imgclf_small}

def replace(path, rows, key):
    "Put rows into a table in place of those of the same key."
    if path.is_file(): rows = pd.concat([(old := pd.read_csv(path, dtype={'id': str}))[~old[key].isin(set(rows[key]))], rows])
    with atomic_path(path) as tmp: rows.to_csv(tmp, index=False)

def run(sides):
    items = items_of(4)
    truth = items.set_index('id').label
    for name in sides:
        if name == 'lightning': import lightning     # importing is not training
        set_seed(42, reproducible=False)
        rows, beat = [], pulse()
        start = time.perf_counter()
        def seen(acc):
            rows.append(dict(side=name, epoch=len(rows) + 1, seconds=round(time.perf_counter() - start, 1), accuracy=round(float(acc), 4), pulse_ms=round(beat, 2)))
            print(f'{name:15} epoch {len(rows)}  {rows[-1]["seconds"]:6.0f} s  {acc:.4f}', flush=True)
        ids, probs = SIDES[name](items, seen)
        replace(HERE/'whole.csv', pd.DataFrame(rows), 'side')
        right = np.array(VOCAB)[probs.argmax(1)] == truth[ids].to_numpy()
        replace(HERE/'whole_right.csv', pd.DataFrame(dict(side=name, id=list(ids), right=right.astype(int))), 'side')
    print(machine())

# Loading decides: a tiny network, five folds, two epochs each

class Tiny(nn.Module):
    num_features, pretrained_cfg = 32, {}
    def __init__(self, in_chans, num_classes):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(in_chans, 16, 3, 4), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(32, num_classes) if num_classes else nn.Identity()
    def forward(self, x): return self.head(self.net(x))

@timm.models.register_model
def whole_tiny(pretrained=False, num_classes=0, in_chans=3, **kw): return Tiny(in_chans, num_classes)

def tiny_fastai(items, net):
    for k in range(5):
        learn = Learner(fastai_dls(items, k, 192, aug_transforms(size=SIZE, min_scale=.75), 64), timm.create_model(net, num_classes=2), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 3e-3)

def tiny_torch(items, net):
    for k in range(5):
        model, dls = timm.create_model(net, num_classes=2).to(memory_format=torch.channels_last), torch_loaders(items, k, True, 64)
        opt = torch.optim.AdamW(model.parameters(), 3e-3, fused=True)
        loop(model, dls, opt, 2, nn.CrossEntropyLoss(), torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, total_steps=2*len(dls[0])).step, bf16=False)

def tiny_imgclf(items, net):
    clear_caches()
    with tempfile.TemporaryDirectory() as out:
        cross_validate(items, dict(arch=net, pretrained=False, head='plain', size=SIZE, presize=192, folds=5, schedule='one_cycle', epochs=2, lr=3e-3, bs=64, precision='fp32', cache='auto'), out=f'{out}/run', progress=False)

def tiny(net):
    items, rows = items_of(5), []
    for name, f in (('fastai', tiny_fastai), ('torch', tiny_torch), ('imgclf', tiny_imgclf)):
        beat, start = pulse(), time.perf_counter()
        f(items, net)
        rows.append(dict(network=net, side=name, seconds=round(time.perf_counter() - start, 1), pulse_ms=round(beat, 2)))
        print(rows[-1], flush=True)
    replace(HERE/'whole_tiny.csv', pd.DataFrame(rows), 'network')

# What it says

def figures():
    "Each side's figures, and ours beside it."
    table, right = pd.read_csv(HERE/'whole.csv'), pd.read_csv(HERE/'whole_right.csv', dtype={'id': str}).pivot(index='id', columns='side', values='right')
    last = table.groupby('side').last()
    last['accuracy'] = right.mean()[last.index]
    as_probs = lambda hit: np.stack([hit, 1 - hit], 1).astype(float)
    goal = last.accuracy['fastai']
    rows = {}
    for side in [o for o in SIDES if o in last.index]:
        reached = table[(table.side == side) & (table.accuracy >= goal)].seconds
        row = dict(seconds=last.seconds[side], times=last.seconds[side]/last.seconds['imgclf'], accuracy=100*last.accuracy[side], reached=reached.iloc[0] if len(reached) else np.nan, pulse_ms=last.pulse_ms[side])
        if side != 'imgclf':
            g = paired_gain({side: as_probs(right[side]), 'imgclf': as_probs(right['imgclf'])}, np.zeros(len(right), int), 'accuracy').iloc[1]
            row |= dict(gain=100*g.gain, low=100*g.low, high=100*g.high)
        rows[side] = row
    return pd.DataFrame(rows).T, goal

def report(to=None):
    table, goal = figures()
    rows = [dict(side=side, **{k: round(float(v), 3) for k, v in r.items() if pd.notna(v)}) for side, r in table.iterrows()]
    rows[0]['sooner'] = round(table.seconds['fastai']/table.reached['imgclf'], 2)
    print(f'| side | seconds | against imgclf | accuracy % | imgclf less it, points (95 %) | first past {100*goal:.1f} % after | pulse ms |\n|---|---|---|---|---|---|---|')
    for side, r in table.iterrows():
        gain = '' if pd.isna(r.get('gain')) else f'{r.gain:+.1f} ({r.low:+.1f} to {r.high:+.1f})'
        print(f"| {side} | {r.seconds:.0f} | {r.times:.2f} | {r.accuracy:.1f} | {gain} | {'–' if pd.isna(r.reached) else f'{r.reached:.0f} s'} | {r.pulse_ms:.1f} |")
    if (HERE/'whole_tiny.csv').is_file():
        print('\n| five folds, network | side | seconds | against imgclf |\n|---|---|---|---|')
        for net, t in pd.read_csv(HERE/'whole_tiny.csv').groupby('network', sort=False):
            t = t.set_index('side').seconds
            for o in t.index: print(f"| {net} | {o} | {t[o]:.0f} | {t[o]/t['imgclf']:.1f} |")
            rows += [dict(side=f'{net}: {o}', seconds=t[o], times=round(t[o]/t['imgclf'], 2)) for o in t.index]
    if to: Path(to).write_text(json.dumps(dict(machine=machine(), clock='wall', rows=rows), indent=1))
    picture(goal)

def picture(goal):
    import matplotlib.pyplot as plt
    table = pd.read_csv(HERE/'whole.csv')
    fig, ax = plt.subplots(figsize=(7, 4), layout='constrained')
    for i, side in enumerate(o for o in SIDES if o in set(table.side)):
        t, own = table[table.side == side], side.startswith('imgclf')
        ax.plot(t.seconds, 100*t.accuracy, '-o' if own else '--o', color=f'C{i}', lw=2.2 if own else 1.2, ms=4, label=side)
    ax.axhline(100*goal, color='gray', lw=.8, ls=':')
    ax.annotate('where fastai by hand ends', (ax.get_xlim()[1], 100*goal), ha='right', va='bottom', fontsize=8, color='gray')
    ax.set(xlabel='seconds from files, two CPU cores', ylabel='accuracy on 656 held-out cells, %')
    ax.legend(frameon=False, fontsize=8); ax.spines[['top', 'right']].set_visible(False); ax.grid(alpha=.25)
    with atomic_path(HERE/'whole.png') as tmp: fig.savefig(tmp, format='png', dpi=110)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--sides', nargs='*', choices=SIDES, default=[o for o in SIDES if o != 'fastai, recipe'], metavar='SIDE', help=', '.join(SIDES))
    p.add_argument('--tiny', nargs='?', const='whole_tiny', metavar='NET'); p.add_argument('--report', action='store_true'); p.add_argument('--threads', type=int, default=2); p.add_argument('--json', help='with --report: write the figures here too')
    p.add_argument('--quick', action='store_true', help='few images, small and for two epochs, to see that all sides run; the figures are not kept')
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as home:
        os.environ['XDG_CACHE_HOME'], old = home, os.environ.get('XDG_CACHE_HOME')     # an empty cache
        demo.packaged_weights(ARCH)
        if a.quick: SIZE, EPOCHS, HERE, FEW = 64, 2, Path(home), 80
        if a.report: report(a.json)
        elif a.tiny: tiny(a.tiny)
        else: run(a.sides)
        if a.quick and not a.tiny: report()
