"""What each technique gains over the same plain recipe, on the same out-of-fold images, with paired intervals.

    python benchmarks/techniques.py elpv --out runs/techniques            # train (each run resumes; a finished one is skipped)
    python benchmarks/techniques.py imbalance ratios --out runs/techniques
    python benchmarks/techniques.py elpv --only mixup cutmix              # some of them, as in a second process
    python benchmarks/techniques.py elpv imbalance ratios --report        # tables from the run folders; writes benchmarks/techniques.csv

Studies: `elpv`, solar cells in two classes; `imbalance`, the same photos in four classes, two of them rare;
`ratios`, four look-alike classes of Fashion-MNIST (or mnist5k's digits where it is not installed) in the proportions of Plant Pathology 2020."""
import argparse, contextlib, time
from pathlib import Path

import pandas as pd
import torch

from imgclf import demo
from imgclf.compare import compare_runs
from imgclf.config import Config
from imgclf.core import InputError
from imgclf.crossval import cross_validate
from imgclf.data.fold import make_folds
from imgclf.runs import Run

HERE = Path(__file__).parent
PHOTOS = dict(arch='tf_efficientnet_lite0', weights='packaged', head='plain', size=64, folds=3, schedule='one_cycle', epochs=4, lr=5e-3, lr_mult=5., bs=32, cache='ram',
              aug=dict(dihedral=True, max_rotate=0., max_warp=0., max_zoom=1., max_lighting=.1, min_scale=1.))
SMALL = dict(arch='resnet10t', pretrained=False, head='plain', size=32, folds=3, schedule='one_cycle', epochs=8, lr=5e-3, bs=32, cache='ram',
             aug=dict(max_rotate=5., max_warp=.1, max_lighting=.1, min_scale=.8), metric='macro_f1')
STAGES = [dict(size=48, epochs=3), dict(size=64, epochs=2)]     # 3·(48/64)² + 2 = 3.7 epochs' worth of pixels: about the same minutes
RARE = dict(PHOTOS, metric='macro_f1')

def elpv(out):
    "Name: settings over PHOTOS. `plain` first; `again` and `once more` are it with other seeds: what luck alone does."
    return {'plain': {}, 'again': dict(seed=1), 'soft labels': dict(soft_labels=str(out/'plain')), 'label smoothing': dict(label_smoothing=.1), 'mixup': dict(mix='mixup'), 'cutmix': dict(mix='cutmix'),
            'progressive': dict(stages=STAGES), 'ema': dict(average='ema', ema_decay=.99), 'class weights': dict(class_weights='balance'), 'oversample': dict(oversample='balance'),
            'plc ratio': dict(plc='ratio', plc_warmup=2, plc_window=2), 'plc margin': dict(plc='margin', plc_warmup=2, plc_window=2),
            'smoothing, stages, ema': dict(label_smoothing=.1, stages=STAGES, average='ema', ema_decay=.99), 'swa': dict(average='swa', swa_start=.5),
            'the three and mixup': dict(label_smoothing=.1, stages=STAGES, average='ema', ema_decay=.99, mix='mixup', mix_off_last=2), 'once more': dict(seed=2), 'focal': dict(loss='focal')}

def rare(out):
    "The ways to meet imbalance. `both`: half of it by repeating rows, the rest by weights."
    return {'plain': {}, 'again': dict(seed=1), 'oversample': dict(oversample='balance'), 'class weights': dict(class_weights='balance'), 'both': dict(oversample=_half(out), class_weights='balance'),
            'sampler': dict(sampler='weighted'), 'focal': dict(loss='focal'), 'undersample': dict(undersample='min')}

def _half(out):
    counts = _items(out.name).label.value_counts()
    return {k: round(float((counts.max()/v)**.5), 2) for k, v in counts.items()}

PP = dict(healthy=516, multiple_diseases=91, rust=622, scab=592)     # rows a class in Plant Pathology 2020's training table

def _items(study):
    if study == 'elpv': items = demo.elpv()
    elif study == 'imbalance': items = demo.elpv(classes=4)
    else:
        try: items, of = demo.fashion_mnist(), dict(zip(PP, ['coat', 'shirt', 'pullover', 't-shirt/top']))
        except InputError: items, of = demo.mnist5k(), dict(zip(PP, '3589'))
        names = {o.lower(): o for o in items.label.unique()}
        share = min(1., min((items.label == names[of[k]]).sum()/v for k, v in PP.items()))
        items = pd.concat([items[items.label == names[of[k]]].sample(int(v*share), random_state=0).assign(label=k) for k, v in PP.items()], ignore_index=True)
    return make_folds(items, 3, seed=42)                              # the same folds for all runs, whatever their seed

STUDIES = dict(elpv=(PHOTOS, elpv), imbalance=(RARE, rare), ratios=(SMALL, rare))

def train(study, root, only):
    base, table = STUDIES[study]
    items = _items(study)
    for name, settings in table(root/study).items():
        if only and name not in only: continue
        folder, start = root/study/name, time.perf_counter()
        if (folder/'seconds.txt').is_file(): continue
        config = Config.layered(base, settings)
        cross_validate(items, config, out=folder, progress=False)
        (folder/'seconds.txt').write_text(f'{time.perf_counter() - start:.0f}')
        print(f'{study} / {name}: {Run(folder).scores().loc["pooled"].round(4).to_dict()} in {time.perf_counter() - start:.0f} s', flush=True)

def report(study, root):
    names = [o for o in STUDIES[study][1](root/study) if (root/study/o/'seconds.txt').is_file()]
    runs = [Run(root/study/o) for o in names]
    found = compare_runs(*runs)
    table = found.table
    if study == 'elpv' and runs[0].config.aug is not False:
        import imgclf.experiment                                      # gives runs their predictions
        with contextlib.suppress(FileNotFoundError):
            file = root/study/'plain'/'tta.csv'
            if not file.is_file(): runs[0].tta_gain(4, progress=False)
            tta = pd.read_csv(file, index_col=0).drop('plain')
            table = pd.concat([table, tta.set_axis([f'plain, 4 copies, {o}' for o in tta.index])])
    metric = found.table.index.name
    print(f'\n### {study}: {metric} over {len(runs[0].items)} images, 3 folds\n\n| | {metric} | gain | 95 % | |\n|---|---|---|---|---|')
    for name, r in table.iterrows():
        gain = '' if name == names[0] else f'{100*r.gain:+.1f} | {100*r.low:+.1f} to {100*r.high:+.1f} | {r.verdict}'
        print(f'| {name} | {100*r.score:.1f} | {gain or " | | "} |')
    return table.rename_axis('run').reset_index().assign(study=study, metric=metric), found

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('studies', nargs='+', choices=list(STUDIES)); parser.add_argument('--out', type=Path, default=Path('runs/techniques'))
    parser.add_argument('--only', nargs='*'); parser.add_argument('--threads', type=int); parser.add_argument('--report', action='store_true')
    args = parser.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    if not args.report:
        for study in args.studies: train(study, args.out, args.only)
    else:
        tables = []
        for study in args.studies:
            table, found = report(study, args.out)
            tables.append(table)
            per = found.per_class
            print('\nRecall of each class:\n\n| class | images | ' + ' | '.join(found.table.index) + ' |\n|' + '---|'*(len(found.table) + 2))
            for cls, r in per.iterrows(): print(f'| {cls} | {r.images:.0f} | ' + ' | '.join(f'{100*r[o]:.0f}' for o in found.table.index) + ' |')
        pd.concat(tables).to_csv(HERE/'techniques.csv', index=False, float_format='%.5f')
