"""Does attention over the last map help? The three ways of putting graph attention behind a body, beside the same body without it.

    python benchmarks/graph_attention.py --out runs/graph            # trains; each run resumes, a finished one is skipped
    python benchmarks/graph_attention.py --out runs/graph --report   # tables from the run folders; writes benchmarks/graph_attention.csv

A ResNet-18 from random weights, plain and with attention trained jointly; then, from the plain one's weights, two epochs more after
one of the new layers alone (`+`), or three of the new layers alone (`frozen`), each plain too: what more epochs do by themselves.
The same from ImageNet weights (EfficientNet-Lite0). Last maps of 3 × 3 and 4 × 4 positions (output strides 16 and 8). Three seeds, each with a
quarter of the images of its own to score; the last epoch counts, nothing is chosen. Pairs are compared image by image over the three."""
import argparse, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from imgclf import demo
from imgclf.config import Config
from imgclf.crossval import cross_validate
from imgclf.data.fold import make_folds
from imgclf.metrics import paired_gain
from imgclf.runs import Run

HERE, SEEDS = Path(__file__).parent, (1, 2, 3)
SETS = dict(elpv=dict(size=48, stride=16, aug=dict(dihedral=True, max_rotate=0., max_warp=0., max_zoom=1., max_lighting=.1, min_scale=1.)),
            fashion=dict(size=32, stride=8, aug=dict(max_rotate=5., max_warp=.1, max_lighting=.1, min_scale=.8)))
LATER = dict(schedule='fine_tune', freeze_epochs=1, epochs=2, lr=2e-3, lr_mult=5.)
FROZEN = dict(schedule='frozen', epochs=3, lr=3e-3)
PAIRS = {'scratch': ('scratch graph', 'scratch dot'), '+ plain': ('+ graph', '+ dot'), 'frozen plain': ('frozen graph',), 'imagenet plain': ('imagenet graph', 'imagenet dot'), 'imagenet frozen plain': ('imagenet frozen graph',)}

def ways(data, folder):
    "Name: settings, in the order in which they are trained."
    stride = dict(output_stride=SETS[data]['stride'])
    net = lambda kind, body='resnet18': dict(arch=body, arch_args=stride) if kind == 'plain' else dict(arch='graph_attention', arch_args=dict(body=body, attention=kind, **stride))
    scratch, own = dict(pretrained=False, schedule='one_cycle', epochs=5, lr=2e-3), dict(weights=str(folder/'scratch'/'models'/'fold0.safetensors'))
    lite = lambda kind: dict(net(kind, 'tf_efficientnet_lite0'), weights='packaged')
    res = {'scratch': net('plain') | scratch, 'scratch graph': net('graph') | scratch,
           **{f'+ {k}': net(k) | own | LATER for k in ('plain', 'graph')}, **{f'frozen {k}': net(k) | own | FROZEN for k in ('plain', 'graph')}}
    if data == 'elpv': res |= {**{f'imagenet {k}': lite(k) | LATER for k in ('plain', 'graph')}, **{f'imagenet frozen {k}': lite(k) | FROZEN for k in ('plain', 'graph')}}
    return res | {'scratch dot': net('dot') | scratch, '+ dot': net('dot') | own | LATER}

def items_of(data, seed):
    items = demo.elpv() if data == 'elpv' else demo.fashion_mnist()
    if data == 'fashion': items = items[items.split == 'train'].groupby('label').sample(120, random_state=seed).sort_index().reset_index(drop=True)
    return make_folds(items, 4, seed=seed)

def train(out, data, seed, only=None):
    items, folder = items_of(data, seed), out/data/str(seed)
    for name, settings in ways(data, folder).items():
        if (folder/name/'seconds.txt').is_file() or only and name not in only: continue
        start = time.perf_counter()
        config = Config(head='plain', bs=32, cache='ram', folds=4, seed=seed, size=SETS[data]['size'], aug=SETS[data]['aug'], **settings)
        res = cross_validate(items, config, out=folder/name, only=[0], progress=False)
        (folder/name/'seconds.txt').write_text(f'{time.perf_counter() - start:.0f}')
        print(f'{data} {seed} {name}: {res.metrics.accuracy.iloc[-1]:.4f} in {time.perf_counter() - start:.0f} s', flush=True)

def predictions(out, data, name):
    "(N, C) probabilities and (N,) targets of a way, over all seeds that it is finished for; by seed and image."
    probs, targs = {}, {}
    for seed in SEEDS:
        if not (out/data/str(seed)/name/'seconds.txt').is_file(): continue
        run = Run(out/data/str(seed)/name)
        rows = run.items[run.items.fold == 0]
        probs[seed] = run.partial_oof().set_index('id').loc[rows.id, run.prob_cols].to_numpy(dtype=float); targs[seed] = run.targets(rows)
    return probs, targs

def report(out):
    table = []
    for data in SETS:
        for plain, others in PAIRS.items():
            base, targs = predictions(out, data, plain)
            if not base: continue
            table.append(dict(data=data, way=plain, seeds=len(base), accuracy=np.mean([(p.argmax(1) == targs[s]).mean() for s, p in base.items()]), sd=np.std([(p.argmax(1) == targs[s]).mean() for s, p in base.items()], ddof=1) if len(base) > 1 else np.nan))
            for name in others:
                probs, _ = predictions(out, data, name)
                both = sorted(set(probs) & set(base))
                if not both: continue
                gain = paired_gain({plain: np.concatenate([base[s] for s in both]), name: np.concatenate([probs[s] for s in both])}, np.concatenate([targs[s] for s in both]), 'accuracy').loc[name]
                each = [(probs[s].argmax(1) == targs[s]).mean() - (base[s].argmax(1) == targs[s]).mean() for s in both]
                table.append(dict(data=data, way=name, seeds=len(both), accuracy=np.mean([(probs[s].argmax(1) == targs[s]).mean() for s in both]), sd=np.std([(probs[s].argmax(1) == targs[s]).mean() for s in both], ddof=1) if len(both) > 1 else np.nan,
                                  gain=gain.gain, low=gain.low, high=gain.high, by_seed=' '.join(f'{100*o:+.1f}' for o in each), verdict=gain.verdict))
    table = pd.DataFrame(table)
    table.to_csv(HERE/'graph_attention.csv', index=False, float_format='%.5f')
    for data, rows in table.groupby('data', sort=False):
        print(f'\n### {data}\n\n| way | seeds | accuracy | sd | gain over plain | 95 % | by seed | |\n|---|---|---|---|---|---|---|---|')
        for r in rows.itertuples():
            gain = f'{100*r.gain:+.1f} | {100*r.low:+.1f} to {100*r.high:+.1f} | {r.by_seed} | {r.verdict}' if r.gain == r.gain else '| | |'
            print(f'| {r.way} | {r.seeds} | {100*r.accuracy:.1f} | ' + (f'{100*r.sd:.1f}' if r.sd == r.sd else '') + f' | {gain} |')

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('runs/graph')); parser.add_argument('--threads', type=int); parser.add_argument('--report', action='store_true')
    parser.add_argument('--data', nargs='*', default=list(SETS)); parser.add_argument('--only', nargs='*')
    args = parser.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    if args.report: report(args.out)
    else:
        core = ['scratch', 'scratch graph', '+ plain', '+ graph', 'frozen plain', 'frozen graph']
        for names in [args.only] if args.only else [core, None]:           # the rest once these are there for all seeds
            for seed in SEEDS:
                for data in args.data: train(args.out, data, seed, names)
