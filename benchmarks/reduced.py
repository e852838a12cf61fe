"""What decoding at a fraction of the size costs in accuracy: solar cells as JPEG files, read exactly and reduced, and each by models of the other.

    python benchmarks/reduced.py --out runs/reduced [--size 64] [--seeds 1 2] [--threads 1]     # trains; a run that was stopped goes on
    python benchmarks/reduced.py --out runs/reduced --report                                     # tables; writes benchmarks/reduced.csv

ELPV's photos (300 × 300) are written once as JPEG of quality 90. `exact` and `reduced` are the same recipe, folds and seeds with `decoder` alone another;
at 64 pixels `reduced` reads a quarter of the side (75 × 75), at 128 half of it. Crosswise, a fold's model meets its held-out images by the other decoder.
Gains are in points of accuracy over `exact`, in pairs: an image's errors are averaged over the seeds, and images are drawn anew for the interval, which
so speaks of other images, not of other seeds; those are listed one by one.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from imgclf import demo
from imgclf.compose import config_learner
from imgclf.crossval import cross_validate
from imgclf.data.decode import DECODERS
from imgclf.data.fold import make_folds
from imgclf.learner import load_weights
from imgclf.runs import Run

HERE = Path(__file__).parent
RECIPE = dict(arch='tf_efficientnet_lite0', weights='packaged', head='plain', folds=3, schedule='one_cycle', epochs=3, lr=5e-3, lr_mult=5., bs=32, cache='ram', num_workers=0,
              aug=dict(dihedral=True, max_rotate=0., max_warp=0., max_zoom=1., max_lighting=.1, min_scale=1.))

def photos(folder, n=None):
    "ELPV as JPEG files, with folds that are the same in all runs."
    items = demo.elpv()
    if n: items = items.groupby('label').sample(n//2, random_state=0)
    folder.mkdir(parents=True, exist_ok=True)
    def as_jpeg(path):
        out = (folder/Path(path).name).with_suffix('.jpg')
        if not out.exists(): Image.open(path).convert('L').save(out, quality=90)
        return str(out)
    return make_folds(items.assign(path=items.path.map(as_jpeg)).reset_index(drop=True), RECIPE['folds'], seed=42)

def hits(run, ids, decoder):
    "(N,) whether each held-out image is told by its fold's model, when read by `decoder`; kept in the run folder."
    file = run.path/f'by_{decoder}.csv'
    if not file.is_file():
        if decoder == run.config.decoder: found = run.oof.set_index('id')[run.prob_cols]
        else:
            parts, config = [], run.config.set(dict(pretrained=False, weights=None, decoder=decoder))
            for k in range(run.n_splits):
                learn = config_learner(config, run.items, k, progress=False)
                load_weights(learn, run.model_file(k))
                with learn.no_bar(), learn.no_logging(): probs = learn.get_preds(dl=learn.dls.valid)[0]
                parts.append(pd.DataFrame(probs.float().numpy(), index=run.items.id[run.items.fold == k], columns=run.prob_cols))
            found = pd.concat(parts)
        right = np.array(run.vocab)[found.to_numpy().argmax(1)] == run.items.set_index('id').label[found.index].to_numpy()
        pd.Series(right.astype(int), found.index, name='right').to_csv(file)
    return pd.read_csv(file, index_col=0, dtype={'id': str}).right.loc[ids].to_numpy(float)

def gain(a, b, n=10_000):
    "Mean and 95 % interval of b - a in points; both (seeds, N)."
    d, rng = (b - a).mean(0), np.random.default_rng(0)
    draws = np.array([d[rng.integers(0, len(d), len(d))].mean() for _ in range(n)])
    return 100*d.mean(), *(100*np.quantile(draws, (.025, .975)))

def report(root):
    rows = []
    for size in sorted({int(o.name.split('-')[0]) for o in root.glob('*-exact-*')}):
        found = {d: {int(o.name.split('-')[2]): Run(o) for o in root.glob(f'{size}-{d}-*') if (o/'done').is_file()} for d in DECODERS}
        seeds = sorted(set.intersection(*map(set, found.values())))
        if not seeds: continue
        ids = found['exact'][seeds[0]].items.id
        right = {(t, r): np.stack([hits(found[t][s], ids, r) for s in seeds]) for t in DECODERS for r in DECODERS}
        print(f'\n{size} pixels, {len(ids):,} images, seeds {", ".join(map(str, seeds))}\n\n| trained by | read by | accuracy | gain | 95 % | by seed |\n|---|---|---|---|---|---|')
        for (t, r), v in right.items():
            base = right['exact', 'exact']
            g, lo, hi = gain(base, v)
            each = 100*(v - base).mean(1)
            rows.append(dict(size=size, trained=t, read=r, seeds=len(seeds), images=len(ids), accuracy=v.mean(), gain=g, low=lo, high=hi, by_seed=' '.join(f'{o:.3f}' for o in each)))
            print(f'| {t} | {r} | {100*v.mean():.2f} | ' + (' | | |' if v is base else f'{g:+.2f} | {lo:+.2f} to {hi:+.2f} | {", ".join(f"{o:+.2f}" for o in each)} |'))
    pd.DataFrame(rows).to_csv(HERE/'reduced.csv', index=False, float_format='%.5f')

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('runs/reduced')); parser.add_argument('--size', type=int, default=64); parser.add_argument('--seeds', type=int, nargs='+', default=[1, 2])
    parser.add_argument('--threads', type=int); parser.add_argument('--epochs', type=int, default=RECIPE['epochs']); parser.add_argument('--images', type=int, help='so many only, to try it'); parser.add_argument('--report', action='store_true')
    args = parser.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    if not args.report:
        items = photos(args.out/'photos', args.images)
        for seed in args.seeds:
            for decoder in DECODERS:
                out = args.out/f'{args.size}-{decoder}-{seed}'
                if (out/'done').is_file(): continue
                cross_validate(items, RECIPE | dict(size=args.size, seed=seed, decoder=decoder, epochs=args.epochs), out=out, progress=False)
                for d in DECODERS: hits(Run(out), items.id, d)
                (out/'done').touch()
                print(out.name, Run(out).scores().loc['pooled'].round(4).to_dict(), flush=True)
    report(args.out)
