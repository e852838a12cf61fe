"""Run the experiments' notebooks from top to bottom without their data: small stand-ins in folders as Kaggle lays them out, and one epoch of everything.

    python tests/standins.py                          # all notebooks in nbs/experiments
    python tests/standins.py paddy --keep /tmp/paddy  # one of them; keeps folders, the notebook as it was run, and its log
    python tests/standins.py --make /tmp/standins     # the stand-ins alone, to try things out
    python tests/standins.py --install                # the install cell without internet: from a folder of wheels, torch and pandas left alone

`tests/kaggle_paths.py` does the whole way of a user, from an environment without imgclf to a submission.

What is shown: the calls fit together, the folders are read as they are on Kaggle, and a submission has the right rows. The scores mean nothing.
Pictures are handwriting and solar cells; weights come from a package. Nothing is downloaded, and nothing is written into the repository."""
import argparse, json, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from imgclf.demo import elpv, mnist5k

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT/'nbs'/'experiments'

def coloured(path, size, rng, **kw):
    "A picture as RGB of (width, height), in a colour of its own, so that no two are copies."
    image = np.asarray(Image.open(path).convert('L').resize(size, Image.BICUBIC), dtype=float)
    return Image.fromarray((image[..., None]*rng.uniform(.6, 1, 3) + rng.uniform(0, 40, 3)).clip(0, 255).astype(np.uint8))

def digits_of(names, per, seed):
    "Rows of digits by class name: `per` of each to train on, and half as many to predict."
    rows = mnist5k().groupby('label').sample(per + per//2, random_state=seed)
    rows['kind'] = rows.label.astype(int).map(dict(enumerate(names)))
    rows = rows.dropna(subset='kind')
    held = rows.groupby('label').cumcount() >= per
    return rows[~held], rows[held]

def write(rows, file_of, size, rng):
    for i, o in enumerate(rows.itertuples()):
        file = file_of(i, o)
        file.parent.mkdir(parents=True, exist_ok=True)
        coloured(o.path, size, rng).save(file)

def paddy(root, per=8):
    "paddy-disease-classification: class folders, a table beside them, test images without labels."
    names = 'bacterial_leaf_blight bacterial_leaf_streak bacterial_panicle_blight blast brown_spot dead_heart downy_mildew hispa normal tungro'.split()
    out, rng = root/'paddy-disease-classification', np.random.default_rng(0)
    train, test = digits_of(names, per, 0)
    ids = [f'{100001 + i}.jpg' for i in rng.permutation(len(train))]
    write(train, lambda i, o: out/'train_images'/o.kind/ids[i], (120, 160), rng)
    write(test, lambda i, o: out/'test_images'/f'{200001 + i}.jpg', (120, 160), rng)
    pd.DataFrame(dict(image_id=ids, label=train.kind.to_numpy(), variety='ADT45', age=rng.integers(45, 80, len(ids)))).to_csv(out/'train.csv', index=False)
    pd.DataFrame(dict(image_id=[f'{200001 + i}.jpg' for i in rng.permutation(len(test))], label='')).to_csv(out/'sample_submission.csv', index=False)

def plant_pathology(root, n=96):
    "plant-pathology-2020-fgvc7: one folder of Train_*.jpg and Test_*.jpg, one-hot columns, ids without .jpg; one class is rare."
    out, rng = root/'plant-pathology-2020-fgvc7', np.random.default_rng(1)
    cols, share = ['healthy', 'multiple_diseases', 'rust', 'scab'], [.28, .12, .3, .3]
    rows = mnist5k().query("label in ('0', '1', '7', '8')").sample(frac=1, random_state=1)
    rows['kind'] = rows.label.map(dict(zip('0178', cols)))
    take = {k: round(n*s) for k, s in zip(cols, share)}
    at = rows.groupby('kind').cumcount()
    train, test = rows[at < rows.kind.map(take)], rows[at >= 450]
    test = test.head(24)
    write(train, lambda i, o: out/'images'/f'Train_{i}.jpg', (205, 137), rng)
    write(test, lambda i, o: out/'images'/f'Test_{i}.jpg', (205, 137), rng)
    hot = pd.get_dummies(train.kind)[cols].astype(int).reset_index(drop=True)
    ids = pd.Series([f'Train_{i}' for i in range(len(train))], name='image_id')
    pd.concat([ids, hot], axis=1).to_csv(out/'train.csv', index=False)
    tests = pd.DataFrame(dict(image_id=[f'Test_{i}' for i in range(len(test))]))
    tests.to_csv(out/'test.csv', index=False)
    tests.assign(**dict.fromkeys(cols, .25)).to_csv(out/'sample_submission.csv', index=False)

def cifar(root, per=8):
    "cifar10 as fastai unpacks it: train/<class>/*.png and test/<class>/*.png, of 32 × 32 pixels."
    names = 'airplane automobile bird cat deer dog frog horse ship truck'.split()
    rng = np.random.default_rng(2)
    for split, rows in zip(('train', 'test'), digits_of(names, per, 2)):
        write(rows, lambda i, o: root/'cifar10'/split/o.kind/f'{i}_{o.kind}.png', (32, 32), rng)

def sustainability(root, per=16):
    "A folder a class, photos of several sizes: solar cells by kind and soundness."
    rows = elpv().assign(kind=lambda o: o.kind + '_' + o.label).groupby('kind').sample(per, random_state=3)
    rng = np.random.default_rng(3)
    write(rows, lambda i, o: root/'sustainability'/o.kind/f'{i:04d}.jpg', (64, 64), rng)

MAKE = dict(paddy=paddy, plant_pathology=plant_pathology, cifar_tricks=cifar, sustainability=sustainability, zoo=cifar)

def execute(source, out):
    "In a process of its own: run the cells of a notebook until one fails; write what they gave."
    from execnb.shell import CaptureShell
    from fastcore.nbio import read_nb, write_nb
    import torch
    torch.set_num_threads(1)
    nb, shell = read_nb(source), CaptureShell(mpl_format='png')
    for k, cell in enumerate(nb.cells):
        if cell.cell_type != 'code': continue
        began = time.time()
        shell.cell(cell)
        print(f'cell {k}: {time.time() - began:.1f} s', flush=True)
        for o in cell.get('outputs', []):
            if 'text' in o: print(''.join(o['text']), flush=True)
            elif 'data' in o and 'text/plain' in o['data']: print(''.join(o['data']['text/plain']), flush=True)
            if o['output_type'] == 'error':
                write_nb(nb, out)
                sys.exit(f"cell {k}:\n{cell.source}\n\n" + '\n'.join(o['traceback']))
    write_nb(nb, out)

def check(name, here):
    "What the notebook must have left."
    if name in ('paddy', 'plant_pathology'):
        comp = next((here/'input').glob(f"{name.split('_')[0]}*"))
        sample, made = (pd.read_csv(o) for o in (comp/'sample_submission.csv', here/'working'/'submission.csv'))
        assert made.columns.tolist() == sample.columns.tolist() and made.iloc[:, 0].tolist() == sample.iloc[:, 0].tolist(), f'{name}: the submission has other rows than the sample'
        assert made.notna().all(axis=None), f'{name}: the submission has empty cells'
        if name == 'plant_pathology': assert np.allclose(made.iloc[:, 1:].sum(axis=1), 1, atol=1e-3), 'probabilities do not sum to one'
    left = [o for o in (here/'input').rglob('*') if o.is_file() and o.stat().st_mtime > (here/'began').stat().st_mtime]
    assert not left, f'{name} wrote into its input: {left[:3]}'

def rehearse(name, keep=None):
    "Make the stand-in, run the notebook in a folder like Kaggle's working one, check what it left. Raises `SystemExit` with the end of the log."
    here = Path(keep or tempfile.mkdtemp(prefix=f'standin-{name}-'))
    try:
        (here/'input').mkdir(parents=True, exist_ok=True); (here/'working').mkdir(exist_ok=True)
        MAKE[name](here/'input')
        (here/'began').touch()
        env = os.environ | dict(IMGCLF_INPUT=str(here/'input'), IMGCLF_QUICK='1', XDG_CACHE_HOME=str(here/'cache'), KAGGLE_KERNEL_RUN_TYPE='Batch', OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1',
                                WANDB_MODE='offline', MPLBACKEND='module://matplotlib_inline.backend_inline')
        began, log = time.time(), here/'log.txt'
        with log.open('w') as f: code = subprocess.run([sys.executable, __file__, '--execute', EXPERIMENTS/f'{name}.ipynb', here/f'{name}.ipynb'], cwd=here/'working', env=env, stdout=f, stderr=subprocess.STDOUT).returncode
        if code: raise SystemExit(f'{name} failed:\n' + log.read_text()[-4000:])
        check(name, here)
        print(f'{name}: {sum(c["cell_type"] == "code" for c in json.loads((here/f"{name}.ipynb").read_text())["cells"])} cells in {time.time() - began:.0f} s', flush=True)
    finally:
        if not keep: shutil.rmtree(here, ignore_errors=True)

def build_wheel(to, source):
    "The wheel of this tree as git knows it, into the folder `to`; built in a copy, `source`."
    for o in subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split('\0')[:-1]:
        if o.startswith('imgclf/') or '/' not in o: (source/o).parent.mkdir(parents=True, exist_ok=True); shutil.copy(ROOT/o, source/o)
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', to, source], check=True)

def try_install():
    "Run the install cell where everything but imgclf is installed and no package index is asked; the library must be there afterwards, and nothing else changed."
    import sysconfig, venv
    install = ''.join(next(c for c in json.loads((EXPERIMENTS/'paddy.ipynb').read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code')['source'])
    with tempfile.TemporaryDirectory(prefix='standin-install-') as tmp:
        here = Path(tmp)
        build_wheel(here/'input'/'imgclf-wheels', here/'source')
        venv.create(here/'venv', with_pip=False)
        site = Path(subprocess.run([here/'venv'/'bin'/'python', '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'], capture_output=True, text=True, check=True).stdout.strip())
        for o in Path(sysconfig.get_path('purelib')).iterdir():
            if 'imgclf' not in o.name: (site/o.name).symlink_to(o)
        before = {o.name for o in site.iterdir()}
        env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | dict(IMGCLF_INPUT=str(here/'input'), PIP_DISABLE_PIP_VERSION_CHECK='1', http_proxy='http://127.0.0.1:9', https_proxy='http://127.0.0.1:9')
        (here/'working').mkdir()
        run = lambda code: subprocess.run([here/'venv'/'bin'/'python', '-c', code], cwd=here/'working', env=env, check=True, capture_output=True, text=True).stdout.strip()
        run(install)
        where, new = run('import imgclf; print(imgclf.__file__)'), {o.name for o in site.iterdir()} - before
        assert Path(where).resolve().is_relative_to(site.resolve()) and all(o.startswith('imgclf') for o in new), f'installed: {new}, imported from {where}'
        assert all((site/o).is_symlink() for o in before), 'a package that was there was replaced'
        print('the install cell, without an index:', ', '.join(sorted(new)))

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help=f'of {", ".join(MAKE)}; all that are there')
    parser.add_argument('--keep', type=Path, help='a new folder for inputs, outputs and log, a part for each notebook')
    parser.add_argument('--make', type=Path, help='make all stand-ins in this folder and leave')
    parser.add_argument('--install', action='store_true', help='try the install cell without internet and leave')
    parser.add_argument('--execute', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.execute: execute(*args.execute)
    elif args.install: try_install()
    elif args.make:
        for make in (paddy, plant_pathology, cifar, sustainability): make(args.make)
    else:
        if odd := [o for o in args.names if o not in MAKE]: parser.error(f'no stand-in for {odd[0]}; there are {", ".join(MAKE)}')
        for name in args.names or [o for o in MAKE if (EXPERIMENTS/f'{o}.ipynb').is_file()]: rehearse(name, args.keep and args.keep/name)
