"""A training step, loading included: a bare torch loop, imgclf's Learner with its callbacks, plain fastai's, and imgclf compiled.

    python benchmarks/step.py [--size 128] [--bs 32] [--batches 12] [--threads 2] [--rounds 5] [--compile 1] [--device cpu] [--networks A,B] [--json OUT]

All sides train one network from the same weights, on the same DataLoaders (out of a filled presize cache, augmented), in the same precision and
memory layout, by fused AdamW. `bare`: what a short script would do, with torch's optimiser and one-cycle schedule, no metrics, no validation.
`imgclf`: `make_learner` with its callbacks and a run's seeded epochs. `fastai`: the same model in a
plain Learner with fastai's own Adam, Recorder and callbacks. `imgclf, compiled` is what `compile: true` trains, after an epoch that compiles; that
epoch is timed once and stated. The goal is imgclf / bare ≤ 1.05. The tiny network shows the loop itself.
"""
import copy, tempfile, time, warnings

warnings.filterwarnings('ignore')
import fastai.optimizer
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import *
from fastai.learner import Learner
from fastcore.imports import noop
from timm.models import register_model
from torch import nn

from imgclf.callback.seed import SeedEpochs
from imgclf.data.block import fold_dls
from imgclf.learner import make_learner
from photos import arguments, finish, in_turn, jpegs

class Tiny(nn.Module):
    num_features, pretrained_cfg = 16, {}
    def __init__(self, in_chans): super().__init__(); self.net = nn.Sequential(nn.Conv2d(in_chans, 16, 3, 4), nn.BatchNorm2d(16), nn.ReLU())
    def forward(self, x): return self.net(x).mean((2, 3))

@register_model
def step_tiny(pretrained=False, num_classes=0, in_chans=3, **kw): return Tiny(in_chans)

def sync(device):
    if device == 'cuda': torch.cuda.synchronize()

def bare(dl, model, epochs=1):
    "A loop as one would write it."
    opt = torch.optim.AdamW(model.parameters(), 1e-3, betas=(.9, .99), eps=1e-5, weight_decay=.01, fused=True)
    sched, loss_func = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-3, total_steps=len(dl)*epochs), nn.CrossEntropyLoss()
    scaler = torch.amp.GradScaler('cuda') if model.precision == 'fp16' else None
    model.train()
    def run():
        for x, y in dl:
            loss = loss_func(model(x.as_subclass(torch.Tensor)), y.as_subclass(torch.Tensor))
            if scaler is None: loss.backward(); opt.step()
            else: scaler.scale(loss).backward(); scaler.step(opt); scaler.update()
            sched.step() if sched.last_epoch + 1 < sched.total_steps else None
            opt.zero_grad()
    return run

class TrainOnly(Callback):
    def before_validate(self): raise CancelValidException

def learner(learn):
    "An epoch of training without validation or bars."
    learn.remove_cb(learn.progress); learn.logger = noop; learn.add_cb(TrainOnly())
    return lambda: learn.fit_one_cycle(1, 1e-3)

def sides(dls, arch, size, compiled):
    ours = lambda **kw: make_learner(dls, arch, pretrained=False, head='plain', cbs=[SeedEpochs(1)], metrics='auto', **kw)
    first = ours()
    plain = Learner(dls, copy.deepcopy(first.model), loss_func=nn.CrossEntropyLoss(), opt_func=fastai.optimizer.Adam, metrics=first.metrics, cbs=[MixedPrecision()] if first.model.precision == 'fp16' else None)
    res = {'bare torch': bare(dls.train, copy.deepcopy(first.model), 10_000), 'imgclf': learner(first), 'fastai': learner(plain)}
    if compiled: res['imgclf, compiled'] = learner(ours(compile=True))
    return res, first.model

def main():
    a, rows = arguments(__doc__, rounds=5, size=128, presize=160, bs=32, batches=12, compile=1, device='cpu', networks='tf_efficientnet_lite0,step_tiny'), []
    with tempfile.TemporaryDirectory() as folder:
        items = jpegs(f'{folder}/photos', a.bs*a.batches + 8, folds=10**6)
        items['fold'] = [int(i >= a.bs*a.batches) for i in range(len(items))]
        dls = fold_dls(items, 1, size=a.size, presize=a.presize, bs=a.bs, cache='ram', num_workers=0, device=a.device, drop_last=True, progress=False)
        for arch in a.networks.split(','):
            torch.manual_seed(0)
            runs, model = sides(dls, arch, a.size, a.compile)
            for k, f in runs.items():
                start = time.perf_counter(); f(); sync(a.device)
                if 'compiled' in k: print(f'{arch}: the first compiled epoch took {time.perf_counter() - start:.0f} s')
            timed = in_turn({k: lambda f=f: (f(), sync(a.device)) for k, f in runs.items()}, a.rounds, a.time)
            print(f'{arch}, {a.size} px, batches of {a.bs}, {model.precision}{", channels last" if model.channels_last else ""}', flush=True)
            for k, v in timed.items():
                rows.append(dict(network=arch, side=k, size=a.size, bs=a.bs, precision=model.precision, ms_a_step=round(v/a.batches*1e3, 2), ratio=round(v/timed['bare torch'], 3)))
                print(f'  {k:18} {rows[-1]["ms_a_step"]:9.2f} ms a step {rows[-1]["ratio"]:7.3f} of bare', flush=True)
    finish(a, rows)

if __name__ == '__main__': main()
