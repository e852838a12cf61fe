"""A step of Adam: fastai's functions against torch's fused kernel behind the same arguments (imgclf.optim).

    python benchmarks/optim.py [--threads 2] [--device cuda]

Both sides in turn on the same gradients, medians. `step`: the optimiser alone; `all`: forward, backward and step for a batch of 20 images of 64 pixels."""
import argparse, platform, time

import fastai.optimizer
import numpy as np
import torch

from imgclf.models.zoo import create_model
from imgclf.optim import Adam

def measure(name, device, rounds=7, bs=20, size=64):
    sides = {}
    for side, make in (('fastai', fastai.optimizer.Adam), ('imgclf', Adam)):
        torch.manual_seed(0)
        net = create_model(name, 10, size=size).to(device, memory_format=torch.channels_last).train()
        sides[side] = (net, make(list(net.parameters()), 1e-4))
    x = torch.rand(bs, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    sync = torch.cuda.synchronize if device == 'cuda' else lambda: None
    times = {side: [] for side in sides}
    for _ in range(rounds + 1):
        for side, (net, opt) in sides.items():
            sync(); start = time.perf_counter()
            with torch.autocast(device, torch.bfloat16): y = net(x)
            y.float().logsumexp(1).mean().backward()
            sync(); before = time.perf_counter(); opt.step(); sync(); step = time.perf_counter() - before
            opt.zero_grad(); sync()
            times[side].append((step, time.perf_counter() - start))
    same = max((p - q).abs().max().item() for p, q in zip(sides['fastai'][0].parameters(), sides['imgclf'][0].parameters()))
    return {k: np.median(v[1:], axis=0)*1e3 for k, v in times.items()}, same

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--threads', type=int); parser.add_argument('--device', default='cpu')
    parser.add_argument('names', nargs='*', default=['mobilenetv2', 'resnet18', 'alexnet', 'vgg', 'vit'])
    args = parser.parse_args()
    if args.threads: torch.set_num_threads(args.threads)
    print(f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.device}\n\n| network | ms step, fastai | imgclf | ratio | ms all, fastai | imgclf | ratio | largest difference |\n|---|' + '---:|'*7)
    for name in args.names:
        t, same = measure(name, args.device)
        (a, c), (b, d) = t['fastai'], t['imgclf']
        print(f'| {name} | {a:.1f} | {b:.1f} | {a/b:.1f} | {c:.0f} | {d:.0f} | {c/d:.2f} | {same:.0e} |', flush=True)
