"Several labels an image, from a table to a submission, by the command line."
import numpy as np
import pandas as pd
import pytest
from PIL import Image

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Squares with a red half, a blue half, both or neither; their labels in one cell."
    root, rng, rows = tmp_path_factory.mktemp('multi'), np.random.default_rng(0), []
    for folder, n in (('train', 48), ('test', 6)):
        (root/folder).mkdir()
        for i in range(n):
            px = rng.integers(0, 120, (24, 24, 3), dtype=np.uint8)
            if i % 4 in (0, 2): px[:12, :, 0] += 120
            if i % 4 in (1, 2): px[12:, :, 2] += 120
            Image.fromarray(px).save(root/folder/f'{i:03d}.png')
            if folder == 'train': rows.append(dict(image=f'{i:03d}', tags={0: 'red', 1: 'blue', 2: 'blue red', 3: 'none'}[i % 4], camera=i // 2))
    pd.DataFrame(rows).to_csv(root/'train.csv', index=False)
    pd.DataFrame(dict(image=[f'{i:03d}' for i in range(6)], tags='')).to_csv(root/'sample.csv', index=False)
    return root

def test_from_table_to_submission(sh, script, world):
    run = lambda *args: sh(script('imgclf'), *args, cwd=world)
    code, out, err, _ = run('fit', 'train', '--labels', 'train.csv', '--id-col', 'image', '--label-col', 'tags', '--label-delim', ' ', '--suffix', '.png', '--group-col', 'camera',
                            '--arch', 'test_resnet', '--no-pretrained', '--size', '24', '--epochs', '3', '--folds', '2', '--bs', '8', '--lr', '1e-2', '--set', 'schedule=one_cycle',
                            '--set', 'metric=macro_f1', '--set', 'num_workers=0', '--out', 'run')
    assert code == 0, err
    assert 'macro f1' in out
    items, oof = pd.read_csv(world/'run/items.csv', dtype=str), pd.read_parquet(world/'run/oof.parquet')
    assert list(oof.columns) == ['id', 'fold', 'p_blue', 'p_none', 'p_red'] and oof.notna().all(axis=None)
    assert items.id.str.fullmatch(r'\d{3}').all() and items.groupby('camera').fold.nunique().max() == 1
    assert run('predict', 'run', 'test', '--out', 'preds.csv')[0] == 0
    preds = pd.read_csv(world/'preds.csv', dtype=dict(id=str), keep_default_na=False)
    assert preds.id.tolist() == [f'{i:03d}' for i in range(6)]
    for _, p in preds.iterrows(): assert p.label == ' '.join(c for c in ('blue', 'none', 'red') if p[f'p_{c}'] > .5)
    assert run('predict', 'run', 'test', '--calibrate', '--out', 'cal.csv')[0] == 0
    cal = pd.read_csv(world/'cal.csv', dtype=dict(id=str), keep_default_na=False)
    assert cal.label.tolist() == preds.label.tolist() and not np.allclose(cal.p_red, preds.p_red, atol=1e-4)
    code, _, err, _ = run('submit', 'run', '--images', 'test', '--sample', 'sample.csv', '--out', 'sub.csv')
    assert code == 0, err
    sub = pd.read_csv(world/'sub.csv', dtype=str, keep_default_na=False)
    assert sub.columns.tolist() == ['image', 'tags'] and sub.tags.tolist() == preds.label.tolist()
