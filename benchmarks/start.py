"""What starting costs: `import imgclf`, `imgclf --help`, and the star import beside fastai's own, each in a fresh process.

    python benchmarks/start.py [--rounds 7] [--json OUT]

`python` is an interpreter that does nothing; the seconds of the others hold it too, their difference to it is what they cost. Processor time."""
import resource, statistics, subprocess, sys
from pathlib import Path

from photos import arguments, finish

SIDES = {'python': ['-c', ''], 'import imgclf': ['-c', 'import imgclf'], 'imgclf --help': [str(Path(sys.executable).parent/'imgclf'), '--help'],
         'imgclf fit --help': [str(Path(sys.executable).parent/'imgclf'), 'fit', '--help'],
         'from fastai.vision.all import *': ['-c', 'from fastai.vision.all import *'], 'from imgclf.all import *': ['-c', 'from imgclf.all import *']}

def seconds(args):
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    start = used()
    subprocess.run([sys.executable, *args], check=True, stdout=subprocess.DEVNULL)
    return used() - start

def main():
    a = arguments(__doc__, rounds=7)
    spent = {k: [] for k in SIDES}
    for r in range(a.rounds + 1):                          # the first reads from the disk
        for k, args in SIDES.items():
            t = seconds(args)
            if r: spent[k].append(t)
    t = {k: statistics.median(v) for k, v in spent.items()}
    rows = [dict(side=k, seconds=round(v, 3), more=round(v - t['python'], 3)) for k, v in t.items()]
    for r in rows: print(f"  {r['side']:32} {r['seconds']:6.3f} s   {r['more']:+.3f} over python")
    a.clock = 'cpu'
    finish(a, rows)

if __name__ == '__main__': main()
