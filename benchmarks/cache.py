"""Images decoded once: an epoch's loading, five folds, and test-time augmentation, against fastai's item path.

    python benchmarks/cache.py [--images 600] [--threads 2] [--rounds 3] [--json OUT]

`epoch`: 640 × 480 JPEGs to batches of uint8 (64, 3, size, size), shuffled, before any batch transform. fastai: ImageBlock,
Resize(size, 'squish'), its DataLoader. imgclf: fold_dls without a cache, and with one that is filled already (its filling is timed once
and stated). `folds`: one such epoch of training and validation in each of five folds; the cache is filled within. `tta`: four augmented
copies and the plain image through a tiny network, images of 192 pixels to 128: fastai's Learner.tta with aug_transforms; ours with the
same transforms (decoding once, alone); ours with presize_tfms; the same out of a cache. Wall clock, since workers are processes.
"""
import os, tempfile, time, warnings

warnings.filterwarnings('ignore')
import torch
from fastai.vision.all import CategoryBlock, ColReader, ColSplitter, CrossEntropyLossFlat, DataBlock, ImageBlock, Learner, Normalize, Resize, aug_transforms, nn

from imgclf.data.block import IMAGENET, fold_dls
from imgclf.data.cache import clear_caches
from imgclf.tta import tta
from photos import arguments, finish, in_turn, jpegs

def fastai_dls(items, fold, size, workers=0, **kw):
    block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('path'), get_y=ColReader('label'), splitter=ColSplitter('held'), item_tfms=Resize(size, 'squish'), **kw)
    return block.dataloaders(items.assign(held=items.fold == fold), bs=64, num_workers=workers, device='cpu', drop_last=False)

def bare(dl): return dl.new(after_batch=[])
def passes(*dls): return sum(len(b[0]) for dl in dls for b in dl)

def net(): return nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

def main():
    a, rows = arguments(__doc__, rounds=3, images=600), []
    def say(what, t, n):
        base = next(iter(t.values()))
        print(what, flush=True)
        for k, v in t.items():
            rows.append(dict(what=what, side=k, seconds=round(v, 3), ms_an_image=round(v/n*1e3, 3), ratio=round(base/v, 2)))
            print(f'  {k:40} {v:8.2f} s {v/n*1e3:8.3f} ms an image {base/v:7.2f} ×', flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ['XDG_CACHE_HOME'] = f'{folder}/home'
        items = jpegs(f'{folder}/photos', a.images)
        for size in (192, 480):
            start = time.perf_counter(); fold_dls(items, 0, size=size, bs=64, cache='disk', progress=False)
            print(f'the cache at {size}: filled in {time.perf_counter() - start:.1f} s, {os.cpu_count()} cores')
            for workers in (0, 2):
                ours = lambda **kw: bare(fold_dls(items, 0, size=size, bs=64, device='cpu', **kw).train)
                sides = {'fastai': bare(fastai_dls(items, 0, size, workers).train), 'imgclf, no cache': ours(num_workers=workers), 'imgclf, cached': ours(cache='disk')}
                say(f'epoch at {size}, {workers} workers', in_turn({k: lambda dl=dl: passes(dl) for k, dl in sides.items()}, a.rounds), sides['fastai'].n)
        def folds(make): return lambda: sum(passes(*map(bare, make(k).loaders)) for k in range(5))
        def ours(cache):
            def run():
                clear_caches()
                return folds(lambda k: fold_dls(items, k, size=192, bs=64, device='cpu', cache=cache, progress=False))()
            return run
        say('folds: five, one epoch each, at 192', in_turn({'fastai': folds(lambda k: fastai_dls(items, k, 192)), 'imgclf, disk': ours('disk'), 'imgclf, ram': ours('ram')}, a.rounds), 5*len(items))
        loss = CrossEntropyLossFlat()
        plain = Learner(fastai_dls(items, 0, 192, batch_tfms=[*aug_transforms(size=128, min_scale=.75), Normalize.from_stats(*IMAGENET, cuda=False)]), net(), loss_func=loss)
        fused, cached = (Learner(fold_dls(items, 0, size=128, presize=192, bs=64, device='cpu', num_workers=0, cache=o), net(), loss_func=loss) for o in (None, 'disk'))
        for o in (plain, fused, cached): o.remove_cb(o.progress)
        say('tta: four copies', in_turn({'fastai': lambda: plain.tta(n=4), 'imgclf, the same transforms': lambda: tta(plain, n=4), 'imgclf, fused': lambda: tta(fused, n=4), 'imgclf, fused and cached': lambda: tta(cached, n=4)}, a.rounds), len(plain.dls.valid_ds))
    finish(a, rows)

if __name__ == '__main__': main()
