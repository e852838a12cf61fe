"What the benchmarks of the pipeline share: sample photos as JPEG files, the machine in words, and sides that run in turn."
import json, platform, statistics, time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

def jpegs(
    folder,           # Where; files that are there already are kept
    n,                # How many
    size=(640, 480),  # Width and height
    quality=88,       # About 70 KB at 640 × 480
    folds=5,
)->pd.DataFrame:      # Items: id, path, label, fold
    "Real pixels: crops of scikit-learn's two photos (and scikit-image's, where it is installed), each another one."
    from sklearn.datasets import load_sample_images
    whole = [Image.fromarray(o) for o in load_sample_images().images]
    try:
        from skimage import data
        whole += [Image.fromarray(o) for o in (data.astronaut(), data.coffee(), data.chelsea())]
    except Exception: pass       # not installed, or it would download
    folder, rng, rows = Path(folder), np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        im, path = whole[i % len(whole)], folder/f'{i:06}.jpg'
        w = rng.uniform(.7, 1) * min(im.width, im.height*size[0]/size[1])
        h, x, y, flip = w*size[1]/size[0], *rng.uniform(0, 1, 2), rng.random() < .5
        box = (x*(im.width - w), y*(im.height - h), x*(im.width - w) + w, y*(im.height - h) + h)
        if not path.exists():
            im = im.resize(size, Image.Resampling.BICUBIC, box=box)
            (im.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else im).save(path, quality=quality)
        rows.append(dict(id=path.name, path=str(path), label='ab'[i % 2], fold=i % folds))
    return pd.DataFrame(rows)

def machine():
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor()) if platform.system() == 'Linux' else platform.processor()
    gpu = f', {torch.cuda.get_device_name()}' if torch.cuda.is_available() else ''
    return f'{cpu}{gpu}, {torch.get_num_threads()} threads, torch {torch.__version__}'

def in_turn(
    sides,     # {name: function}; each does the same work
    rounds=5,  # Timed, after one that is not
    clock=time.perf_counter,
)->dict:       # {name: median seconds}
    "Run the sides in turn, several times, each round beginning with another: what one leaves in memory and caches, the next finds."
    spent, order = {k: [] for k in sides}, list(sides.items())
    for r in range(rounds + 1):
        at = r % len(order)
        for k, f in order[at:] + order[:at]:
            t = clock(); f(); t = clock() - t
            if r: spent[k].append(t)
    return {k: statistics.median(v) for k, v in spent.items()}

def arguments(doc, rounds=5, **defaults):
    "The options that all of them have."
    import argparse
    a = argparse.ArgumentParser(description=doc.splitlines()[0])
    a.add_argument('--threads', type=int, default=2); a.add_argument('--rounds', type=int, default=rounds)
    a.add_argument('--clock', choices=('wall', 'cpu'), default='wall', help='cpu: processor time, which a machine that others share still measures')
    a.add_argument('--json', help='write the rows here too')
    for k, v in defaults.items(): a.add_argument(f'--{k}', type=type(v), default=v)
    a = a.parse_args()
    torch.set_num_threads(a.threads)
    a.time = time.perf_counter if a.clock == 'wall' else time.process_time
    return a

def finish(a, rows):
    print(f'{a.clock} time, {machine()}')
    if a.json: Path(a.json).write_text(json.dumps(dict(machine=machine(), clock=a.clock, rows=rows), indent=1))
