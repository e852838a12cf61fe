"""How time and memory grow with the number of images: 1,000, 10,000, 100,000.

    python benchmarks/growth.py [--sizes 1000,10000,100000] [--only 'scan;folds'] [--folder DIR]
    python benchmarks/growth.py --report

Each step is run in a process of its own (a fork), after a warm-up on a hundred images. Time is processor time of the process and its children,
which other work on the machine hardly changes; memory is the highest resident set over that before the step began, without the
processes it starts. The exponent is the slope of log time over log images between the two largest sizes: 1 is linear.

Images are hard links to 400 JPEGs of 160 × 120, so that a hundred thousand of them take no disk. To the library each name is a file of
its own: it is listed, opened, hashed and decoded by itself. What is keyed by content collapses: `duplicates` finds 400 groups whatever
the number of images, and folds that keep copies together would deal 400 groups, so `folds` and `folds, groups` have
duplicates=False. The presize cache is keyed by path: it holds every link's pixels, at 64 × 64. An epoch reads them from a mapped file, whose
pages (12,288 bytes an image) count as memory here, though the system takes them back when it needs them.
"""
import argparse, gc, json, os, resource, sys, tempfile, warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
LINKS, CLASSES, SIZE = 400, 10, 64

def rss(key): return next(int(l.split()[1])*1024 for l in open('/proc/self/status') if l.startswith(f'{key}:'))

def used(): return sum(sum(resource.getrusage(o)[:2]) for o in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

def make_images(folder, n):
    "A folder of class folders with n links."
    from photos import jpegs
    folder, photos = Path(folder), jpegs(Path(folder)/'photos', LINKS, size=(160, 120), quality=80).path
    root = folder/f'{n}'
    if root.exists(): return root
    for c in range(CLASSES): (root/f'class{c}').mkdir(parents=True)
    for i in range(n): os.link(photos[i % LINKS], root/f'class{i*7 % CLASSES}'/f'{i:07}.jpg')
    return root

def table(root):
    "The same items as `items_from_folder`, without looking at the disk."
    import pandas as pd
    n = int(root.name)
    ids = sorted(f'class{i*7 % CLASSES}/{i:07}.jpg' for i in range(n))
    return pd.DataFrame(dict(id=ids, path=[f'{root}/{o}' for o in ids], label=[o.partition('/')[0] for o in ids]))

def predictions(n):
    import numpy as np
    return np.random.default_rng(0).dirichlet(np.full(CLASSES, .5), n).astype(np.float32)

def a_run(root, filled=True):
    import numpy as np
    from imgclf.config import Config
    from imgclf.runs import open_run
    items = table(root)
    items['fold'] = np.arange(len(items)) % 5
    out = Path(tempfile.mkdtemp(dir=root.parent))/'run'
    with open_run(out, items, Config(folds=5)) as run: pass
    if filled: run.put_oof(items.id.to_numpy(object), predictions(len(items)))
    return run

# What is measured: name -> f(root) that prepares and returns what is timed
def listing(root):
    from imgclf.data.source import items_from_folder
    return lambda: items_from_folder(root)

def scan(root):
    from imgclf.data.scan import scan_images
    items = table(root)
    return lambda: scan_images(items, n_workers=0, progress=False)

def duplicates(root):
    from imgclf.data.scan import find_duplicates
    items = table(root)
    return lambda: find_duplicates(items)

def look_alikes(root):
    "As many different hashes as images."
    import numpy as np, pandas as pd
    from imgclf.data.scan import find_duplicates
    items = table(root)
    h = np.random.default_rng(0).integers(0, 2**63, len(items), dtype=np.uint64)
    found = pd.DataFrame(dict(phash=[f'{o:016x}' for o in h], sha1=[f'{o:040x}' for o in h]), index=pd.Index(items.id, name='id'))
    return lambda: find_duplicates(items, 4, scan=found)

def folds(root):
    from imgclf.data.fold import make_folds
    items = table(root)
    return lambda: make_folds(items, duplicates=False)

def folds_groups(root):
    import numpy as np
    from imgclf.data.fold import make_folds
    items = table(root)
    items['patient'] = np.random.default_rng(0).integers(0, max(len(items)//4, 10), len(items))
    return lambda: make_folds(items, group_col='patient', duplicates=False)

def cache(root):
    from imgclf.data.cache import fill_cache
    paths = table(root).path.tolist()
    return lambda: fill_cache(paths, (SIZE, SIZE), cache='disk', progress=False)

def epoch(root):
    import numpy as np
    from imgclf.data.block import fold_dls
    items = table(root)
    items['fold'] = np.arange(len(items)) % 5
    fold_dls(items, 0, size=SIZE, bs=64, cache='disk', device='cpu', progress=False)
    def run():
        dl = fold_dls(items, 0, size=SIZE, bs=64, cache='disk', device='cpu', num_workers=0, progress=False).train
        for _ in dl.new(after_batch=[]): pass
    return run

def oof_write(root):
    run, probs = a_run(root, False), predictions(int(root.name))
    at = [(run.items.id[run.items.fold == k].to_numpy(object), probs[(run.items.fold == k).to_numpy()]) for k in range(5)]
    def write():
        for o in at: run.put_oof(*o)
    return write

def oof_read(root): run = a_run(root); return lambda: run.oof

def oof_score(root): run = a_run(root); return lambda: run.scores()

def open_a_run(root):
    from imgclf.runs import Run
    path = a_run(root).path
    return lambda: Run(path)

def mistakes(root):
    from imgclf.results import confusion, per_image
    run = a_run(root)
    return lambda: (per_image(run), confusion(run))

STEPS = {'listing': listing, 'scan': scan, 'duplicates': duplicates, 'look-alikes': look_alikes, 'folds': folds, 'folds, groups': folds_groups, 'cache, filled': cache, 'cache, an epoch': epoch,
         'run, opened': open_a_run, 'OOF, written': oof_write, 'OOF, read': oof_read, 'OOF, scored': oof_score, 'OOF, image by image': mistakes}

def measure(step, root, warm):
    "Seconds and bytes, in a fork of this process, which has imported everything."
    read, write = os.pipe()
    if not (pid := os.fork()):
        try:
            STEPS[step](warm)()
            f = STEPS[step](root)
            gc.collect()
            open('/proc/self/clear_refs', 'w').write('5')        # the highest value is counted from here
            before, start = rss('VmRSS'), used()
            f()
            os.write(write, json.dumps(dict(seconds=used() - start, memory=max(0, rss('VmHWM') - before))).encode())
            os._exit(0)
        except BaseException as e:
            print(f'{step}, {root.name} images: {e!r}', file=sys.stderr, flush=True)
            os._exit(1)
    os.close(write)
    if os.waitpid(pid, 0)[1]: sys.exit(1)
    with open(read) as f: return json.load(f)

def run(a):
    import pandas as pd, torch
    import imgclf.results, imgclf.data.block, imgclf.data.scan      # once; the processes are forks
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        warm, sizes = make_images(folder, 100), [int(o) for o in a.sizes.split(',')]
        for n in sizes:
            root = make_images(folder, n)
            for step in STEPS:
                if a.only and step not in a.only.split(';'): continue
                os.environ['XDG_CACHE_HOME'] = f'{folder}/home{n}'
                rows.append(dict(step=step, images=n, **measure(step, root, warm)))
                print(f'{n:9,} {step:22} {rows[-1]["seconds"]:9.3f} s {rows[-1]["memory"]/1e6:9.1f} MB', flush=True)
                pd.DataFrame(rows).round(4).to_csv(a.csv, index=False)       # as far as it is

def exponents(t):
    "Slopes between the two largest sizes, of time and of memory."
    import numpy as np, pandas as pd
    found = {}
    for step, g in t.groupby('step', sort=False):
        g = g.sort_values('images').tail(2)
        if len(g) < 2: continue
        up = np.log(g.images.iloc[1]/g.images.iloc[0])
        found[step] = dict(time=np.log(g.seconds.iloc[1]/max(g.seconds.iloc[0], 1e-4))/up, seconds=g.seconds.iloc[1], ms=g.seconds.iloc[1]/g.images.iloc[1]*1e3, bytes=(g.memory.iloc[1] - g.memory.iloc[0])/(g.images.iloc[1] - g.images.iloc[0]), memory=g.memory.iloc[1]/1e6)
    return pd.DataFrame.from_dict(found, orient='index')

def report(a):
    import pandas as pd
    from matplotlib import pyplot as plt
    from photos import machine
    t = pd.read_csv(a.csv)
    print(f'{machine()}\n\n| step | ms an image | exponent | seconds at {t.images.max():,} | MB | bytes more an image |\n|---|' + '---:|'*5)
    for step, r in exponents(t).iterrows(): print(f'| {step} | {r.ms:.3f} | {r.time:.2f} | {r.seconds:.2f} | {r.memory:.0f} | {max(r.bytes, 0):,.0f} |')
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout='constrained')
    for i, (step, g) in enumerate(t.groupby('step', sort=False)):
        kw = dict(marker='os^vDPX'[i % 7], ms=4, lw=1.2, color=f'C{i % 10}', ls='-' if i < 10 else '--', label=step)
        axes[0].loglog(g.images, g.seconds/g.images*1e3, **kw); axes[1].loglog(g.images, (g.memory/g.images).clip(lower=10), **kw)
    for ax, what in zip(axes, ('processor time an image, ms', 'peak memory an image, bytes')):
        ax.set(xlabel='images', ylabel=what); ax.grid(alpha=.3); ax.spines[['top', 'right']].set_visible(False)
    fig.legend(*axes[0].get_legend_handles_labels(), loc='outside right center', frameon=False, fontsize=8)
    fig.savefig(a.csv.with_suffix('.png'), dpi=80)

if __name__ == '__main__':
    sys.path.insert(0, str(HERE))
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--sizes', default='1000,10000,100000'); p.add_argument('--only', help='steps, separated by ;'); p.add_argument('--folder', help='where links may be made')
    p.add_argument('--csv', type=Path, default=HERE/'growth.csv'); p.add_argument('--report', action='store_true')
    a = p.parse_args()
    if not a.report: run(a)
    report(a)
