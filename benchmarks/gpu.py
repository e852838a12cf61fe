"""A training step on a GPU: precision, memory layout, and what repeatable kernels cost.

    python benchmarks/gpu.py                     # every combination, median of 20 steps after a warm-up
    python benchmarks/gpu.py --arch resnet26d --size 224"""
import argparse, statistics, time

import torch
from torch.nn.functional import cross_entropy

from imgclf.callback.seed import deterministic
from imgclf.models.build import build_model

def step_ms(arch, size, bs, precision, channels_last, steps=20):
    "Median milliseconds of a whole step, with nothing left to do on the GPU at its end."
    model = build_model(arch, 2, size=(size, size), pretrained=False, head='plain').cuda().train()
    model.precision, model.channels_last = precision, channels_last
    if channels_last: model.to(memory_format=torch.channels_last)
    opt, scaler = torch.optim.AdamW(model.parameters(), 1e-4, fused=True), torch.amp.GradScaler(enabled=precision == 'fp16')
    x, y = torch.randn(bs, 3, size, size, device='cuda'), torch.randint(0, 2, (bs,), device='cuda')
    took = []
    for i in range(steps + 4):
        torch.cuda.synchronize(); start = time.perf_counter()
        scaler.scale(cross_entropy(model(x), y)).backward(); scaler.step(opt); scaler.update(); opt.zero_grad()
        torch.cuda.synchronize()
        if i >= 4: took.append(1000*(time.perf_counter() - start))
    return statistics.median(took)

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--arch', default='tf_efficientnet_lite2'); p.add_argument('--size', type=int, default=300); p.add_argument('--bs', type=int, default=64)
    a = p.parse_args()
    if not torch.cuda.is_available(): raise SystemExit('this benchmark needs a GPU')
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}; {a.arch}, {a.size} px, batch of {a.bs}\n\n| precision | channels last | ms a step | images/s | ms with repeatable kernels |\n|---|---|---|---|---|')
    for precision in ('bf16', 'fp16', 'fp32'):
        for cl in (True, False):
            free = step_ms(a.arch, a.size, a.bs, precision, cl)
            with deterministic(): same = step_ms(a.arch, a.size, a.bs, precision, cl)
            print(f"| {precision} | {'yes' if cl else 'no'} | {free:.1f} | {1000*a.bs/free:.0f} | {same:.1f} |", flush=True)
