"Folds trained by several processes end in what one process would have found, also where all of them are killed on the way."
import os, signal, subprocess, sys, time

import numpy as np
import pandas as pd
import pytest
from PIL import Image

COMMON = ['--arch', 'test_resnet', '--no-pretrained', '--size', '32', '--bs', '8', '--folds', '3', '--epochs', '3', '--set', 'num_workers=0', '--set', 'precision=fp32']

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    d, rng = tmp_path_factory.mktemp('jobs'), np.random.default_rng(0)
    for label in ('blue', 'red'):
        (d/'images'/label).mkdir(parents=True)
        for i in range(18):
            px = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8); px[..., 0 if label == 'red' else 2] //= 2
            Image.fromarray(px).save(d/'images'/label/f'{i}.png')
    return d

def start(world, out, jobs):
    return subprocess.Popen([sys.executable, '-W', 'ignore', '-m', 'imgclf.cli', 'fit', 'images', *COMMON, '--out', str(out), '--jobs', str(jobs)], cwd=world, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),      # ignored where the tests run in the background of a shell
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))

def finish(world, out, jobs):
    p = start(world, out, jobs)
    said, _ = p.communicate(timeout=400)
    assert p.returncode == 0, said
    return said, pd.read_parquet(out/'oof.parquet'), pd.read_csv(out/'metrics.csv').drop(columns='seconds')

@pytest.fixture(scope='module')
def one(world): return finish(world, world/'one', 1)

def family(pid):
    "Processes of the session `pid` leads."
    return [int(o) for o in subprocess.run(['ps', '-o', 'pid=', '--sid', str(pid)], capture_output=True, text=True).stdout.split()]

def all_gone(pid):
    "Whether no process of the session is left, after a moment."
    deadline = time.time() + 20
    while family(pid) and time.time() < deadline: time.sleep(.05)
    return not family(pid)

def wait_for_epochs(p, out, n):
    deadline = time.time() + 200
    while time.time() < deadline and p.poll() is None:
        if (out/'metrics.csv').is_file() and len(pd.read_csv(out/'metrics.csv')) >= n: return
        time.sleep(.01)
    raise AssertionError(f'it ended, or took too long: {p.stdout.read()}')

def test_same_as_one_process(world, one):
    said, oof, metrics = finish(world, world/'two', 2)
    pd.testing.assert_frame_equal(oof, one[1]); pd.testing.assert_frame_equal(metrics, one[2])
    assert all(f'fold {k}/3  epoch 4/4' in said for k in (1, 2, 3)), said     # lines of all processes reach the terminal

def test_parent_killed(world, one):
    "Only the parent is killed: the processes it started end by themselves, and the same command goes on."
    out = world/'killed'
    p = start(world, out, 2)
    wait_for_epochs(p, out, 2)
    assert len(family(p.pid)) >= 3
    os.kill(p.pid, signal.SIGKILL); p.wait()
    assert all_gone(p.pid)
    before = pd.read_csv(out/'metrics.csv')
    _, oof, metrics = finish(world, out, 2)
    pd.testing.assert_frame_equal(oof, one[1]); pd.testing.assert_frame_equal(metrics, one[2])
    kept = pd.read_csv(out/'metrics.csv').merge(before, on=['fold', 'epoch'])
    assert len(kept) == len(before) and (kept.seconds_x == kept.seconds_y).all()      # no finished epoch was trained again

def test_process_killed(world, one):
    "One of the processes is killed: one message, and one process can go on where several stopped."
    out = world/'one-killed'
    p = start(world, out, 3)
    wait_for_epochs(p, out, 3)
    child = max(o for o in family(p.pid) if o != p.pid and 'spawn_main' in open(f'/proc/{o}/cmdline').read())
    os.kill(child, signal.SIGKILL)
    said, _ = p.communicate(timeout=100)
    assert p.returncode == 2 and 'ended before its work was done (exit code -9)' in said and 'Traceback' not in said, said
    assert all_gone(p.pid)
    pd.testing.assert_frame_equal(finish(world, out, 1)[1], one[1])

def test_ctrl_c(world, one):
    out = world/'interrupted'
    p = start(world, out, 2)
    wait_for_epochs(p, out, 1)
    os.killpg(p.pid, signal.SIGINT)
    said, _ = p.communicate(timeout=100)
    assert p.returncode == 130 and 'Traceback' not in said, said
    pd.testing.assert_frame_equal(finish(world, out, 3)[1], one[1])
