"""Solar cells, as well as the packaged weights allow: from the demo's recipe through one change after another to an ensemble.

    python benchmarks/elpv.py --out runs/elpv                 # train what is missing; everything resumes (12 minutes of an H100, many hours of two CPU cores)
    python benchmarks/elpv.py --out runs/elpv --only plain    # some of it
    python benchmarks/elpv.py --out runs/elpv --keep          # writes benchmarks/elpv/ (predictions, settings and curves, no images, no labels)
    python benchmarks/elpv.py --picture                       # the front page's picture, from those

Four folds hold the 75/25 proportion of the published figures, stratified by the experts' four grades of doubt. The settings were not chosen by these
folds' scores: each step's reason stands beside it. A score is over all 2,624 images, each predicted by the model that did not train on it; the blend's
weights are fitted on other folds than it is scored on."""
import argparse, shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from imgclf import demo
from imgclf.config import Config
from imgclf.core import atomic_path
from imgclf.crossval import cross_validate
from imgclf.data.fold import make_folds
from imgclf.experiment import load_run
from imgclf.metrics import accuracy_interval
from imgclf.tta import tta

HERE = Path(__file__).parent/'elpv'
VIEWS = 8                                     # augmented copies an image: as many as there are flips and quarter turns
FULL = dict(arch='tf_efficientnet_lite2', size=300, epochs=16, bs=64, average='ema', ema_decay=.99)     # the photos' own size; an average that forgets after a hundred steps
VOTES = dict(label_smoothing=0., soft_when='always', soft_use='proba', soft_a=0.)

def steps(out):
    "Name: (classes, settings over the recipe `elpv`)."
    votes = VOTES | dict(soft_labels=str(out/'votes.csv'))
    return {
        'demo':   (2, {}),                                                      # the recipe of `imgclf demo`: 128 px, six epochs
        'larger': (2, dict(size=224, epochs=10, bs=64)),                        # cracks are a pixel wide: nearer to the photos' own size, and longer
        'plain':  (2, FULL),                                                    # the larger network at the photos' own size, its weights averaged
        'votes':  (2, FULL | votes),                                            # trained on the experts' doubt (0, 1/3, 2/3, 1) in place of yes or no
        'votes 2': (2, FULL | votes | dict(seed=1)),                            # the same with another seed: what luck does, and a second opinion
        'votes 1': (2, FULL | votes | dict(arch='tf_efficientnet_lite1', size=260)),   # another network
        'four':   (4, FULL),                                                    # the four grades as classes
        'four 2': (4, FULL | dict(arch='tf_efficientnet_lite1', size=260, seed=1)),
    }

def items_of(classes):
    "Both tasks have the same folds."
    items = make_folds(demo.elpv(classes=4), 4, seed=42)
    return items if classes == 4 else items.assign(label=np.where(items.prob >= .5, 'defective', 'functional'))

def train(out, only):
    items = items_of(2)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out/'votes.csv') as tmp: pd.DataFrame(dict(id=items.id, p_defective=items.prob, p_functional=1 - items.prob)).to_csv(tmp, index=False)
    for name, (classes, settings) in steps(out).items():
        if only and name not in only: continue
        folder = out/name.replace(' ', '-')
        run = cross_validate(items_of(classes), Config.load('elpv', folds=4, **settings), out=folder).run
        if not (folder/'tta.parquet').is_file():
            views = [tta(run.learner(k), n=VIEWS) for k in range(4)]
            oof = pd.concat([pd.DataFrame(v.preds.numpy(), columns=run.prob_cols).assign(id=v.ids) for v in views]).set_index('id').loc[run.oof.id].reset_index()
            with atomic_path(folder/'tta.parquet') as tmp: oof.assign(fold=run.oof.fold.to_numpy())[['id', 'fold', *run.prob_cols]].to_parquet(tmp)
        print(f'{name}\n{run.scores().round(4)}\n', flush=True)

def keep(out):
    "What the guide reads: predictions, settings, curves."
    HERE.mkdir(exist_ok=True)
    for name in steps(out):
        folder, to = out/name.replace(' ', '-'), HERE/name.replace(' ', '-')
        if not (folder/'tta.parquet').is_file(): continue
        to.mkdir(exist_ok=True)
        for o in ('run.json', 'config.yaml', 'oof.parquet', 'tta.parquet', 'metrics.csv'): shutil.copy(folder/o, to/o)

def picture():
    "The ladder, from what was kept: the picture of the front page."
    items, rows = items_of(2).set_index('id'), {}
    for name, file, label in (('demo', 'oof', 'the demo: 128 px, 6 epochs'), ('larger', 'oof', '224 px, 10 epochs'), ('plain', 'oof', '300 px, larger network,\naveraged weights'), ('plain', 'tta', '… and eight more looks\nat each cell')):
        p = pd.read_parquet(HERE/name/f'{file}.parquet').set_index('id')
        right = int((np.where(p.p_defective > p.p_functional, 'defective', 'functional') == items.label[p.index]).sum())
        rows[label] = 100*right/len(p), *(100*o for o in accuracy_interval(right, len(p)))
    fig, ax = plt.subplots(figsize=(7, 2.6), layout='constrained')
    for i, (value, low, high) in enumerate(rows.values()):
        ax.errorbar(value, -i, xerr=[[value - low], [high - value]], fmt='o', capsize=4, color='tab:blue', lw=2); ax.text(value, -i + .12, f'{value:.1f} %', ha='center', va='bottom')
    ax.axvline(88.42, color='gray', ls='--', lw=1); ax.text(88.5, .4, 'published, 88.42 %', ha='left', color='gray', size=9)
    ax.set(yticks=[-i for i in range(len(rows))], yticklabels=rows, xlabel='accuracy % on 2,624 solar cells, out-of-fold, with 95 % interval', ylim=(-len(rows) + .5, .8), xlim=(84.5, 92.5))
    ax.spines[['top', 'right']].set_visible(False)
    fig.savefig(HERE.parents[1]/'nbs'/'images'/'solar_cells.png', dpi=110, facecolor='white', metadata={'Software': None})

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--out', type=Path, default=Path('runs/elpv')); p.add_argument('--only', nargs='*', default=()); p.add_argument('--keep', action='store_true'); p.add_argument('--picture', action='store_true')
    a = p.parse_args()
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads', flush=True)
    picture() if a.picture else keep(a.out) if a.keep else train(a.out, a.only)
