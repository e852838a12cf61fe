"""Wrong labels: what each remedy is worth. Writes a row to noisy_labels.csv for each training that is finished, and skips those that are there.

    python benchmarks/noisy_labels.py --threads 1                  # the whole study
    python benchmarks/noisy_labels.py --sets digits --noises sym42 --methods plain,plc-ratio,clean --seeds 0
    python benchmarks/noisy_labels.py --report                     # tables in Markdown, and noisy_labels.png

Only training labels are spoilt. Test labels are the true ones, the last epoch counts, and nothing is chosen by the test set: settings are the same for all
data sets and kinds of noise. A seed decides split, noise, first weights and order, and is shared by all methods."""
import argparse, csv, os, sys, time, warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')
warnings.filterwarnings('ignore')
from functools import lru_cache
from pathlib import Path

import fastai.callback.all
import numpy as np
import pandas as pd
import torch
from PIL import Image
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict, train_test_split
from torch import nn
from torch.utils.data import TensorDataset

from imgclf.callback.mix import MixUp
from imgclf.callback.plc import ProgressiveLabelCorrection, SoftLabels
from imgclf.callback.seed import SeedEpochs
from imgclf.core import set_ids
from imgclf.demo import elpv, imagenet_model, mnist5k
from imgclf.data.loader import SeededDL
from imgclf.data.soft import soften_labels
from imgclf.losses import SoftTargetCE

HERE = Path(__file__).resolve().parent
CSV, PNG = HERE/'noisy_labels.csv', HERE/'noisy_labels.png'
COLUMNS = ['set', 'noise', 'method', 'seed', 'accuracy', 'given_right', 'right', 'kept', 'seconds']
SETS = {'digits': 'sym20 sym42 feature35', 'mnist5k': 'sym20 sym42 feature35', 'elpv': 'sym20'}
NOISES = {'sym20': 'a fifth of the labels another class, at random', 'sym42': '42 % another class, at random', 'feature35': '35 % the second likeliest class, more often the less clear the image'}
SEEDS = [0, 1, 2]
FOLDS, EARLY = 5, .2     # out-of-fold models train for a fifth of the epochs: as long as label correction warms up

class TensorDL(SeededDL):
    "Batches out of tensors in memory."
    def do_item(self, s): return 0 if s is None else s
    def do_batch(self, b): return self.dataset[torch.tensor(b)]

class Trainer(Learner):
    "The last epoch counts, so none is validated."
    def _do_epoch_validate(self, *_, **__): pass

# ---- data, noise

@lru_cache(None)
def elpv_features():
    "Solar cells as what EfficientNet-Lite0, trained on ImageNet and kept as it is, sees in them at 160 px (N, 1280, 1, 1); 1: defective."
    items, model = elpv(), imagenet_model('tf_efficientnet_lite0').eval()
    def features(paths):
        x = torch.stack([torch.tensor(np.array(Image.open(o).convert('RGB').resize((160, 160), Image.BILINEAR))).permute(2, 0, 1) for o in paths])
        with torch.no_grad(): return model.forward_head(model.forward_features(x/127.5 - 1), pre_logits=True)
    x = torch.cat([features(items.path[i:i + 64]) for i in range(0, len(items), 64)])
    return x[:, :, None, None].numpy(), (items.label == 'defective').astype(int).to_numpy()

def load(name, seed):
    "Training and test images (N, channels, H, W), and true labels; a stratified quarter (digits, ELPV) or fifth is the test set."
    if name == 'digits':
        from sklearn.datasets import load_digits
        d = load_digits(); x, y = d.images/16, d.target
    elif name == 'mnist5k':
        items = mnist5k()
        x, y = np.stack([np.asarray(Image.open(o).convert('L')) for o in items.path])/255, items.label.astype(int).to_numpy()
    else: x, y = elpv_features()
    x = torch.tensor(x, dtype=torch.float32)
    if x.ndim == 3: x = x[:, None]
    train, test = train_test_split(np.arange(len(y)), test_size=.2 if name == 'mnist5k' else .25, stratify=y, random_state=seed)
    return x[train], y[train], x[test], y[test]

def second_likeliest(x, y, seed):
    "For each image the most probable class but its own, and by how much its own leads on the logit scale; out-of-fold, fitted to the true labels."
    p = cross_val_predict(LogisticRegression(C=.1, max_iter=300), x.flatten(1).numpy(), y, cv=StratifiedKFold(FOLDS, shuffle=True, random_state=seed), method='predict_log_proba')
    at, others = np.arange(len(y)), p.copy()
    others[at, y] = -np.inf
    return others.argmax(1), p

def spoil(x, y, noise, seed):
    "The labels to train on."
    rng = np.random.default_rng([seed, 1])
    kind, rate = noise[:-2], int(noise[-2:])/100
    if kind == 'sym':       # exactly so many, so that seeds do not differ in the share
        flip = rng.permutation(len(y)) < round(rate*len(y))
        c = y.max() + 1
        return np.where(flip, (y + rng.integers(1, c, len(y))) % c, y)
    # Zhang et al. 2021, type I: flip to the second likeliest class s with probability ½ − ½ (η_y − η_s)²; a temperature of η gives the wanted rate
    second, logp = second_likeliest(x, y, seed)
    at = np.arange(len(y))
    def tau(t):
        eta = np.exp(logp/t - (logp/t).max(1, keepdims=True)); eta /= eta.sum(1, keepdims=True)
        return .5 - .5*np.clip(eta[at, y] - eta[at, second], 0, 1)**2
    low, high = .1, 100.
    for _ in range(60):
        t = (low*high)**.5
        low, high = (t, high) if tau(t).mean() < rate else (low, t)
    return np.where(rng.random(len(y)) < tau(t), second, y)

# ---- training

def model_for(name, seed):
    "A network that learns the wrong labels by heart in the given epochs, and how it is trained: epochs, learning rate, batch size."
    torch.manual_seed(seed)
    if name == 'digits':
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)), 60, 2e-3, 64
    if name == 'elpv':
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(1280), nn.Linear(1280, 256), nn.ReLU(), nn.Linear(256, 2)), 30, 1e-3, 64
    def conv(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(conv(1, 16), conv(16, 32), nn.Flatten(), nn.Linear(32*49, 128), nn.ReLU(), nn.Linear(128, 10)), 12, 2e-3, 64

def train(name, x, y, seed, *cbs, smoothing=0., early=False, table=None):
    "A trained Learner; `table`: soft targets (N, C)."
    model, epochs, lr, bs = model_for(name, seed)
    ids = np.arange(len(y))
    dl = TensorDL(TensorDataset(x, torch.tensor(y)), bs=bs, shuffle=True, seed=seed, num_workers=0, drop_last=False)
    dls = DataLoaders(dl, dl.new(shuffle=False), device='cpu')
    dls.vocab = [str(i) for i in range(y.max() + 1)]
    set_ids(dls, [ids, ids])
    if table is not None: cbs = [*cbs, SoftLabels(as_table(table))]
    learn = Trainer(dls, model, loss_func=SoftTargetCE(label_smoothing=smoothing), cbs=[SeedEpochs(seed), *cbs])
    learn.remove_cbs([o for o in learn.cbs if type(o).__name__ in ('ProgressCallback', 'Recorder')])
    learn.fit(max(1, round(epochs*EARLY)) if early else epochs, lr)
    return learn

def predict(learn, x):
    learn.model.eval()
    with torch.no_grad(): return learn.model(x).softmax(1).numpy()

def as_table(probs): return pd.DataFrame(probs, columns=[f'p_{i}' for i in range(probs.shape[1])]).assign(id=np.arange(len(probs)))

class Case:
    "One data set, noise and seed: what the methods share."
    def __init__(self, name, noise, seed):
        self.name, self.seed = name, seed
        self.x, self.truth, self.test_x, self.test_y = load(name, seed)
        self.given = spoil(self.x, self.truth, noise, seed)

    def fit(self, *cbs, y=None, keep=slice(None), **kw): return train(self.name, self.x[keep], (self.given if y is None else y)[keep], self.seed, *cbs, **kw)

    @lru_cache(None)
    def oof(self, rounds=1):
        "Out-of-fold probabilities (N, C) of models that train for a short time; in the second round on the soft labels of the first."
        table, probs = self.soft(rounds - 1) if rounds > 1 else None, np.zeros((len(self.given), self.truth.max() + 1))
        for k, (a, b) in enumerate(StratifiedKFold(FOLDS, shuffle=True, random_state=self.seed + rounds).split(self.given, self.given)):
            learn = train(self.name, self.x[a], self.given[a], 1000*self.seed + 10*rounds + k, early=True, table=None if table is None else table[a])
            probs[b] = predict(learn, self.x[b])
        return probs

    def soft(self, rounds=1, **kw): return soften_labels(self.given, self.oof(rounds), **kw)

    def accuracy(self, learn): return (predict(learn, self.test_x).argmax(1) == self.test_y).mean()

# ---- methods: case -> trained learner, targets in use ((N,) or (N, C)), images trained on (None: all)

def corrected(case, *cbs, soft=False, **kw):
    own = dict(smoothing=kw.pop('smoothing', 0.))
    plc = ProgressiveLabelCorrection(**kw, table=as_table(case.soft()) if soft else None)
    return case.fit(plc, *cbs, **own), plc.labels.astype(int).to_numpy(), None

def softened(case, rounds=1, **kw):
    table = case.soft(rounds, **kw)
    return case.fit(table=table), table, None

def pruned(case):
    from cleanlab.filter import find_label_issues
    keep = ~find_label_issues(case.given, case.oof(), n_jobs=1)
    return case.fit(keep=keep), case.given, keep

def mixed(case, **kw): return corrected(case, MixUp(), scoring='clean', **kw)

METHODS = {
    'clean': lambda c: (c.fit(y=c.truth), c.truth, None),
    'plain': lambda c: (c.fit(), c.given, None),
    'plc-ratio': corrected,
    'mixup+plc-margin': lambda c: mixed(c, rule='margin'),
    'plc-margin': lambda c: corrected(c, rule='margin'),
    'mixup+plc-ratio': mixed,
    'mixup': lambda c: (c.fit(MixUp()), c.given, None),
    'smoothing': lambda c: (c.fit(smoothing=.1), c.given, None),
    'soft-hard': softened,
    'soft-proba': lambda c: softened(c, when='always', use='proba'),
    'cleanlab': pruned,
    'mixup+soft+plc-margin': lambda c: mixed(c, rule='margin', soft=True),
    'soft+plc-margin': lambda c: corrected(c, rule='margin', soft=True),
    'soft+plc-ratio': lambda c: corrected(c, soft=True),
    'smoothing+plc-ratio': lambda c: corrected(c, smoothing=.1),
    'soft-twice': lambda c: softened(c, rounds=2),
}
ABOUT = {
    'clean': 'true labels: the upper bound', 'plain': 'labels as given', 'smoothing': 'label smoothing .1', 'mixup': 'MixUp, α = .4',
    'soft-hard': 'a = .5 where out-of-fold models disagree, their class', 'soft-proba': 'a = .5 for all, their probabilities', 'soft-twice': 'soft-hard, by models that were themselves trained on soft-hard',
    'cleanlab': "cleanlab's confident learning on the same predictions, prune and retrain", 'plc-ratio': "label correction, the paper's rule", 'plc-margin': 'label correction, margin rule',
    'smoothing+plc-ratio': 'both', 'soft+plc-ratio': 'correction that starts from soft-hard', 'soft+plc-margin': 'the same, margin rule',
    'mixup+plc-ratio': 'MixUp, and correction by a clean pass', 'mixup+plc-margin': 'the same, margin rule', 'mixup+soft+plc-margin': 'all three',
}

def share_right(targets, truth):
    "Share of images whose likeliest target is the truth; of n that tie, each counts 1/n."
    if targets.ndim == 1: return (targets == truth).mean()
    top = targets >= targets.max(1, keepdims=True) - 1e-6
    return (top[np.arange(len(truth)), truth]/top.sum(1)).mean()

def one(case, noise, method):
    start = time.perf_counter()
    learn, targets, keep = METHODS[method](case)
    keep = np.full(len(case.truth), True) if keep is None else keep
    return dict(set=case.name, noise=noise, method=method, seed=case.seed, accuracy=round(case.accuracy(learn), 5), given_right=round((case.given == case.truth).mean(), 5),
                right=round(share_right(targets[keep], case.truth[keep]), 5), kept=round(keep.mean(), 5), seconds=round(time.perf_counter() - start, 2))

def run(sets, noises, methods, seeds):
    "Train what is not there yet; a shared first opinion counts in the seconds of the method that asks for it first."
    there = read() if CSV.exists() else pd.DataFrame(columns=COLUMNS)
    there = set(map(tuple, there[['set', 'noise', 'method', 'seed']].to_numpy()))
    for seed in seeds:
        for name in sets:
            for noise in [o for o in noises if o in SETS[name].split()]:
                todo = [m for m in methods if (name, noise, m, seed) not in there]
                if not todo: continue
                case = Case(name, noise, seed)
                for method in todo:
                    row = one(case, noise, method)
                    new = not CSV.exists()
                    with open(CSV, 'a', newline='') as f:
                        out = csv.DictWriter(f, COLUMNS)
                        if new: out.writeheader()
                        out.writerow(row)
                    print(' '.join(str(o) for o in row.values()), flush=True)

# ---- report

def read():
    "The rows found, as a table."
    return pd.read_csv(CSV, dtype=dict(seed=int))

def recovered(found):
    "The same rows with `gap`: (accuracy − plain)/(clean − plain), and `ahead`: accuracy − that of the paper's rule, both of the same set, noise and seed."
    wide = found.pivot_table(index=['set', 'noise', 'seed'], columns='method', values='accuracy')
    at = pd.MultiIndex.from_frame(found[['set', 'noise', 'seed']])
    plain, clean, paper = (wide.reindex(columns=['plain', 'clean', 'plc-ratio'])[k].reindex(at).to_numpy() for k in ('plain', 'clean', 'plc-ratio'))
    return found.assign(gap=(found['accuracy'] - plain)/(clean - plain), ahead=found['accuracy'] - paper)

def tables(found, column):
    "Mean ± sd over the seeds of one column: methods down, sets and noises across; and the number of seeds."
    by = recovered(found).groupby(['method', 'set', 'noise'])[column]
    cells = by.mean().map(('{:+.3f}' if column == 'ahead' else '{:.3f}').format) + by.std().map(lambda o: '' if pd.isna(o) else f' ± {o:.3f}')
    order = [m for m in ABOUT if m in set(found['method'])]
    return cells.unstack(['set', 'noise']).reindex(order).sort_index(axis=1).fillna('')

def markdown(table):
    names = [' '.join(o) for o in table.columns]
    lines = [f'| method | {" | ".join(names)} |', '|---'*(len(names) + 1) + '|']
    return '\n'.join(lines + [f'| {m} | {" | ".join(row)} |' for m, row in zip(table.index, table.to_numpy())])

def plot(found):
    "Share of the gap recovered, a panel a set."
    import matplotlib; matplotlib.use('agg')
    from matplotlib import pyplot as plt
    gaps = recovered(found)
    gaps = gaps[~gaps['method'].isin(['clean', 'plain'])]
    names = list(dict.fromkeys(found['set']))
    order = gaps.groupby('method')['gap'].mean().sort_values().index
    fig, axs = plt.subplots(1, len(names), figsize=(3.6*len(names) + 1.4, .26*len(order) + .9), sharey=True, squeeze=False, layout='constrained')
    for ax, name in zip(axs[0], names):
        for i, noise in enumerate(NOISES):
            part = gaps[(gaps['set'] == name) & (gaps['noise'] == noise)]
            if not len(part): continue
            by = part.groupby('method')['gap']
            ax.errorbar(by.mean().reindex(order), np.arange(len(order)) + (i - 1)*.2, xerr=by.std().reindex(order), fmt='o', ms=3, lw=1, c=f'C{i}', label=noise)
        ax.set(title=name, xlabel='share of the gap recovered', yticks=range(len(order)), yticklabels=order); ax.axvline(0, c='gray', lw=.5); ax.axvline(1, c='gray', lw=.5); ax.grid(axis='y', lw=.3)
    axs[0, 0].legend(fontsize=7, loc='lower right')
    fig.savefig(PNG, dpi=80); plt.close(fig)

def report():
    found = read()
    seeds = found.groupby(['set', 'noise'])['seed'].nunique()
    print(f'{len(found)} trainings; seeds: ' + ', '.join(f'{" ".join(k)} {n}' for k, n in seeds.items()))
    for title, column in (('Accuracy on true test labels', 'accuracy'), ('Share of the gap between plain and clean that is recovered', 'gap'), ("Ahead of the paper's rule in accuracy, paired by seed", 'ahead'), ('Share of right labels among those in use at the end', 'right')):
        print(f'\n### {title}\n\n{markdown(tables(found, column))}')
    plot(found)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choose = lambda known, kind=str: (lambda text: [kind(o) for o in text.split(',')] if not known or set(text.split(',')) <= set(known) else parser.error(f'{text}: some of {", ".join(known)}'))
    parser.add_argument('--sets', type=choose(SETS), default=list(SETS))
    parser.add_argument('--noises', type=choose(NOISES), default=list(NOISES))
    parser.add_argument('--methods', type=choose(METHODS), default=list(METHODS))
    parser.add_argument('--seeds', type=choose(None, int), default=SEEDS)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--report', action='store_true', help='tables and plot of what is there')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report() if args.report else run(args.sets, args.noises, args.methods, args.seeds)

if __name__ == '__main__': main()
