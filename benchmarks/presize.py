"""Fused presizing against fastai's aug_transforms: the batch step alone, both sides in turn in one process, medians.

    python benchmarks/presize.py [--bs 64] [--threads 2] [--rounds 7] [--clock wall|cpu] [--json OUT]

--clock cpu counts processor time instead of the clock on the wall: what a machine that others share still measures.
Both sides start from the same uint8 batch and end with float pixels in [0, 1]. fastai as its docs advise for presizing:
IntToFloatTensor, then aug_transforms(size=..., min_scale=.75) with default ranges.
"""
import statistics

import numpy as np
import torch
from fastai.vision.all import Image, IntToFloatTensor, Pipeline, TensorImage, aug_transforms
from imgclf.data.augment import presize_tfms
from photos import arguments, finish

def photos(n, size):
    "Real pixels: crops of scikit-learn's two sample photos."
    from sklearn.datasets import load_sample_images
    imgs = [Image.fromarray(o) for o in load_sample_images().images]
    rng = np.random.default_rng(0)
    def one(i):
        img, (x, y) = imgs[i % 2], rng.integers(0, 100, 2)
        return np.array(img.crop((x, y, x + 427, y + 327)).resize((size, size), Image.BILINEAR))
    return TensorImage(torch.from_numpy(np.stack([one(i) for i in range(n)])).permute(0, 3, 1, 2).contiguous())

def seconds(f, x, clock):
    x = x.clone(); t = clock(); f(x); return clock() - t

def main():
    a, rows = arguments(__doc__, rounds=7, bs=64), []
    for src, size in ((480, 128), (480, 224), (300, 160), (192, 128), (128, 128)):
        x = photos(a.bs, src)
        for part, split in (('training', 0), ('validation', 1)):
            theirs = Pipeline([IntToFloatTensor(), *aug_transforms(size=size, min_scale=.75)], split_idx=split)
            ours = Pipeline(presize_tfms(size), split_idx=split)
            times = np.array([(seconds(theirs, x, a.time), seconds(ours, x, a.time)) for _ in range(a.rounds + 2)][2:])
            t, o = np.median(times, 0)
            rows.append(dict(source=src, size=size, part=part, fastai_ms=round(t*1e3, 1), imgclf_ms=round(o*1e3, 1), ratio=round(statistics.median(times[:, 0]/times[:, 1]), 2)))
            print(f'{src:>4} → {size:<4} {part:10}  fastai {t*1e3:7.1f} ms   imgclf {o*1e3:6.1f} ms   ratio {rows[-1]["ratio"]:5.1f}', flush=True)
    print(f'batch of {a.bs}')
    finish(a, rows)

if __name__ == '__main__': main()
