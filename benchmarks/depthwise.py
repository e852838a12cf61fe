"""A training step with torch's own bf16 gradient of depthwise convolutions and with imgclf's: `python benchmarks/depthwise.py [--size 128 --bs 32]`.

Both sides in turn in one process, after a warm-up; medians, their ratio, and the machine."""
import argparse, copy, json, platform, statistics, time

import timm, torch

from imgclf.models.build import choose_precision
from imgclf.models.depthwise import fast_depthwise

ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
ap.add_argument('--archs', nargs='+', default=['tf_efficientnet_lite0', 'mobilenetv3_large_100', 'mobilenetv2_100', 'resnet18'])
ap.add_argument('--size', type=int, default=128)
ap.add_argument('--bs', type=int, default=32)
ap.add_argument('--rounds', type=int, default=7)
ap.add_argument('--json', help='write the figures here')
args = ap.parse_args()
if choose_precision('auto') != 'bf16': raise SystemExit('this CPU has no bf16 units: imgclf trains in float32 here, and nothing changes')

x = torch.randn(args.bs, 3, args.size, args.size).contiguous(memory_format=torch.channels_last)
y = torch.randint(0, 10, (args.bs,))

def step(model):
    start = time.perf_counter()
    with torch.autocast('cpu', torch.bfloat16): out = model(x)
    torch.nn.functional.cross_entropy(out.float(), y).backward()
    for p in model.parameters(): p.grad = None
    return time.perf_counter() - start

rows = []
for arch in args.archs:
    plain = timm.create_model(arch, num_classes=10).to(memory_format=torch.channels_last)
    both = plain, fast_depthwise(copy.deepcopy(plain))
    for m in both: step(m)
    times = list(zip(*[[step(m) for m in both] for _ in range(args.rounds)]))
    a, b = map(statistics.median, times)
    rows.append(dict(arch=arch, plain_img_s=round(args.bs/a, 1), imgclf_img_s=round(args.bs/b, 1), ratio=round(a/b, 2)))
    print(f'{arch:24} plain {args.bs/a:6.1f} img/s   imgclf {args.bs/b:6.1f} img/s   ratio {a/b:.2f}', flush=True)
machine = f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.size} px, batch {args.bs}'
print(machine)
if args.json: open(args.json, 'w').write(json.dumps(dict(machine=machine, rows=rows), indent=1))
