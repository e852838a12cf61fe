"""The zoo's table beside the published one.

    imgclf bench --config benchmarks/zoo.yaml --out runs/zoo         # trains, resumes; writes runs/zoo/table.csv and pictures
    python benchmarks/zoo.py runs/zoo                                # prints the tables below; writes benchmarks/zoo.csv and zoo.png

`published`: a benchmark of nineteen architectures, accuracy on CIFAR-10 at 224 pixels after ten epochs of Adam at 1e-3 (for ResNet the value its author
put in place of a first one), by a training that stayed in evaluation mode after its first epoch and chose its best epoch on the test set."""
import argparse
from pathlib import Path

import pandas as pd
from scipy.stats import spearmanr

from imgclf.bench import plot_bench

HERE = Path(__file__).parent
PUBLISHED = dict(alexnet=71.27, vgg=75.93, nin=71.03, resnet18=74.9, densenet40=68.25, mobilenetv1=81.72, mobilenetv2=83.99, googlenet=80.28, xception=85.9, senet18=78.10, squeezenet=62.2, mlp_mixer=68.52, resmlp=65.5, vit=55.34)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path)
    args = parser.parse_args()
    table = pd.read_csv(args.run/'table.csv', index_col=0).join(pd.Series(PUBLISHED, name='published'))
    table.drop(columns=[o for o in ('minutes', 'sd', 'gflops') if o in table]).to_csv(HERE/'zoo.csv', float_format='%.5g')
    plot_bench(table).savefig(HERE/'zoo.png', dpi=110)
    table['rank'], table['published rank'] = table.score.rank(ascending=False), table.published.rank(ascending=False)
    print('| network | px | M params | G multiply-adds | M activations | ms forward | ms training step | rate chosen | accuracy | 95 % | rank | published | its rank |\n|---|' + '---:|'*12)
    for r in table.dropna(subset=['score']).sort_values('score', ascending=False).itertuples():
        timed = f'{r.forward_ms:.1f} | {r.train_ms:.1f}' if hasattr(r, 'train_ms') else ' | '
        seen = f'{r.published:.1f} | {r[-1]:.0f}' if r.published == r.published else '– | –'
        print(f'| {r.Index} | {r.size} | {r.params:.2f} | {r.gmacs:.3f} | {r.activations:.2f} | {timed} | {str(r.chosen).removeprefix("lr=")} | {100*r.score:.1f} | {100*r.low:.1f} to {100*r.high:.1f} | {table["rank"][r.Index]:.0f} | {seen} |')
    both = table.dropna(subset=['score', 'published'])
    for name, other in (('published accuracy', both.published), ('multiply-adds', both.gmacs), ('parameters', both.params)):
        res = spearmanr(both.score, other)
        print(f'\nRank correlation of our accuracy with the {name}, {len(both)} networks: {res.statistic:.2f} (p = {res.pvalue:.2f})')
