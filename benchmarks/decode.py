"""From JPEG files to batches of uint8 pixels of one size: fastai's item path, torch and torchvision's, and ours.

    python benchmarks/decode.py [--images 200] [--threads 2] [--rounds 5] [--clock wall|cpu] [--json OUT]

All sides read the same files in order, in one process without workers, through a DataLoader of their library, and end with
uint8 (64, 3, size, size) and labels. fastai: ImageBlock and Resize(size, 'squish'), as its docs say. torchvision: a Dataset that opens a file by
PIL and resizes it by v2.Resize with antialiasing (`torchvision`), or decodes by its own decoder (`torchvision, its decoder`). imgclf: the loaders of
fold_dls without a cache, exact and reduced. `file` is the step from the file to pixels alone, without any loader. The differences are means over all pixels, in levels of
255, to PIL's full decode and antialiased resize.
"""
import tempfile, warnings

import numpy as np
import torch
from fastai.vision.all import CategoryBlock, ColReader, ColSplitter, DataBlock, ImageBlock, PILImage, Resize
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from imgclf.data.block import fold_dls
from imgclf.data.decode import load_image, presized
from photos import arguments, finish, in_turn, jpegs

warnings.filterwarnings('ignore')

class Photos(torch.utils.data.Dataset):
    def __init__(self, paths, read, size): self.paths, self.read, self.resize = paths, read, v2.Resize((size, size), antialias=True)
    def __len__(self): return len(self.paths)
    def __getitem__(self, i): return v2.functional.pil_to_tensor(self.resize(self.read(self.paths[i]))) if self.read is by_pil else self.resize(self.read(self.paths[i]))

def by_pil(path): return Image.open(path).convert('RGB')
def by_torchvision(path): return decode_image(path, mode=ImageReadMode.RGB)

def epoch(dl): return lambda: sum(len(b[0] if isinstance(b, (tuple, list)) else b) for b in dl)

def main():
    a, rows = arguments(__doc__, images=200), []
    with tempfile.TemporaryDirectory() as folder:
        for wh, sizes in (((640, 480), (192, 480)), ((2560, 1920), (224,))):
            n = a.images if wh[0] == 640 else max(10, a.images//10)
            items = jpegs(f'{folder}/{wh[0]}', n, wh)
            weight = np.mean([len(open(p, 'rb').read()) for p in items.path])/1e3
            for size in sizes:
                block = DataBlock((ImageBlock, CategoryBlock), get_x=ColReader('path'), get_y=ColReader('label'), splitter=ColSplitter('held'), item_tfms=Resize(size, 'squish'))
                theirs = block.dataloaders(items.assign(held=items.fold == 0), bs=64, num_workers=0, device='cpu').train.new(**(bare := dict(after_batch=[], shuffle=False, drop_last=False)))
                ours = {d: fold_dls(items, 0, size=size, decoder=d, bs=64, num_workers=0, device='cpu').train.new(**bare) for d in ('exact', 'reduced')}
                assert theirs.n == ours['exact'].n and [o.dtype for o in next(iter(theirs))] == [o.dtype for o in next(iter(ours['exact']))]
                plain = {k: torch.utils.data.DataLoader(Photos(items.path[items.fold != 0].tolist(), read, size), 64) for k, read in (('torchvision', by_pil), ('torchvision, its decoder', by_torchvision))}
                t = in_turn({'fastai': epoch(theirs), **{k: epoch(v) for k, v in plain.items()}, **{f'imgclf {k}': epoch(v) for k, v in ours.items()}}, a.rounds, a.time)
                resize = Resize(size, 'squish')
                t |= in_turn({'file: fastai': lambda: [np.asarray(resize(PILImage.create(p), split_idx=1)) for p in items.path],
                              **{f'file: imgclf {d}': lambda d=d: [presized(p, (size, size), decoder=d) for p in items.path] for d in ('exact', 'reduced')}}, a.rounds, a.time)
                want = [np.asarray(load_image(p).resize((size, size), Image.Resampling.BILINEAR)).astype(int) for p in items.path[:40]]
                off = {d: np.mean([np.abs(presized(p, (size, size), decoder=d).permute(1, 2, 0).numpy() - w).mean() for p, w in zip(items.path, want)]) for d in ('exact', 'reduced')}
                print(f'{wh[0]} × {wh[1]} ({weight:.0f} KB) to {size}')
                for k, v in t.items():
                    base = t['file: fastai' if k.startswith('file') else 'fastai']
                    o, each = off.get(k.split()[-1]), 1e3*v/(n if k.startswith('file') else theirs.n)
                    rows.append(dict(source=wh, size=size, side=k, ms=round(each, 3), ratio=round(base/v, 2), difference=None if o is None else round(float(o), 4)))
                    print(f'  {k:26} {each:7.2f} ms an image   {base/v:5.2f} ×' + ('' if o is None else f'   difference {o:.4f}'), flush=True)
    finish(a, rows)

if __name__ == '__main__': main()
