"Properties that hold for any table: folds partition the rows and never cut a group, sampling keeps what it must keep, losses agree on hard and soft targets."
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.model_selection import StratifiedKFold

from imgclf.core import InputError, batch_ids, set_ids
from imgclf.data.fold import make_folds, split_fold
from imgclf.data.loader import SeededDL
from imgclf.data.sample import class_weights, epoch_coverage, one_vs_rest, oversample, sample_weights, undersample
from imgclf.losses import FocalLoss, SoftTargetBCE, SoftTargetCE
from imgclf.one_vs_rest import combine_scores

fast = settings(max_examples=60, deadline=None, derandomize=True)

@st.composite
def tables(draw, groups=False, multi=False):
    "(items, n_splits): any class mix with enough rows and groups for the folds."
    n_splits, classes = draw(st.integers(2, 5)), 'abcde'[:draw(st.integers(1, 5))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    label = np.concatenate([np.repeat(list(classes), n_splits), rng.choice(list(classes), draw(st.integers(0, 150)))])
    items = pd.DataFrame(dict(id=rng.permutation(10**4)[:len(label)].astype(str), label=rng.permutation(label)))
    if multi: items['label'] = [tuple(sorted({o, *rng.choice(list(classes), rng.integers(0, 3))})) for o in items.label]
    if groups: items['site'] = np.concatenate([np.arange(n_splits), rng.integers(0, draw(st.integers(n_splits, 60)), len(items) - n_splits)])
    return items, n_splits

def folds_of(items, n_splits, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return make_folds(items, n_splits, **kw)

@fast
@given(tables(), st.integers(0, 99))
def test_folds_are_as_even_as_can_be(table, seed):
    items, k = table
    out = make_folds(items, k, seed=seed)
    n = pd.crosstab(out.label, out.fold).reindex(columns=range(k), fill_value=0)
    assert (n.max(axis=1) - n.min(axis=1)).max() <= 1 and n.sum().max() - n.sum().min() <= 1
    theirs = [len(v) for _, v in StratifiedKFold(k, shuffle=True, random_state=seed).split(items, items.label)]
    assert n.sum().max() - n.sum().min() <= max(theirs) - min(theirs)
    pd.testing.assert_frame_equal(out[items.columns], items)

@fast
@given(tables(groups=True), st.integers(0, 99), st.booleans())
def test_groups_are_never_cut_and_order_does_not_matter(table, seed, multi):
    items, k = table
    if multi: items = items.assign(label=[(o,) if i % 2 else (o, 'z') for i, o in enumerate(items.label)])
    try: out = folds_of(items, k, group_col='site', seed=seed)
    except InputError as e:
        assert multi and 'z' in str(e)
        return
    assert (out.groupby('site').fold.nunique() == 1).all() and set(out.fold) <= set(range(k))
    other = folds_of(items.sample(frac=1, random_state=seed), k, group_col='site', seed=seed)
    assert (other.fold.sort_index() == out.fold).all()
    for f in sorted(set(out.fold)):
        train, valid = split_fold(out, f)
        assert not set(train.id) & set(valid.id) and not set(train.site) & set(valid.site) and len(train) + len(valid) == len(items)
        assert train.attrs['fold'] == valid.attrs['fold'] == f

@fast
@given(tables(multi=True))
def test_several_labels(table):
    items, k = table
    out = make_folds(items, k)
    assert set(out.fold) == set(range(k))
    assert out.fold.tolist() == make_folds(items[::-1], k).fold[::-1].tolist()

@fast
@given(tables(), st.floats(1, 6), st.integers(0, 99))
def test_sampling_keeps_what_it_must(table, k, seed):
    items, n_splits = table
    train, valid = split_fold(make_folds(items, n_splits), 0)
    n, rare = train.label.value_counts(), train.label.value_counts().index[-1]
    more = oversample(train, {rare: k}, seed=seed)
    m = more.label.value_counts()
    assert m[rare] == round(k * n[rare]) and m.drop(rare).to_dict() == n.drop(rare).to_dict() and set(more.id) == set(train.id)
    assert more.id.tolist() == oversample(train[::-1], {rare: k}, seed=seed).id.tolist()
    assert more[more.label == rare].id.value_counts().pipe(lambda o: o.max() - o.min()) <= 1
    assert oversample(train, 'balance').label.value_counts().nunique() == 1
    assert undersample(train, seed=seed).label.value_counts().nunique() == 1 and undersample(train, seed=seed).id.is_unique
    assert np.isclose(train.label.map(class_weights(train)).sum(), len(train))
    for f in (oversample, undersample):
        with pytest.raises(InputError, match='held-out fold 0'): f(pd.concat([train, valid]), {rare: 1})

@fast
@given(tables(), st.floats(.01, 1), st.integers(0, 99))
def test_one_vs_rest_keeps_every_class_of_the_rest(table, take, seed):
    items, _ = table
    label = items.label.iloc[0]
    if items.label.nunique() == 1:
        with pytest.raises(InputError, match='no rest'): one_vs_rest(items, label, take, seed)
        return
    out = one_vs_rest(items, label, take, seed)
    was, n = items.label[out.index], items.label.value_counts()
    assert (out.label == label).sum() == n[label] and set(was) == set(items.label)
    for o, m in was[was != label].value_counts().items(): assert abs(m - take * n[o]) <= 1

@fast
@given(tables(multi=True), tables(), st.floats(0, 1), st.integers(1, 500))
def test_weighted_rows_and_what_an_epoch_sees(tagged, table, power, n):
    items, _ = table
    w, count = sample_weights(items, power), items.label.value_counts()
    share = w.groupby(items.label).sum()
    assert np.allclose(share, (count**(1 - power)/(count**(1 - power)).sum())[share.index])
    assert (w.index == items.index).all() and (w.groupby(items.label).nunique() == 1).all()
    seen, even = epoch_coverage(w, n), epoch_coverage(np.ones(len(w)), n)
    assert 0 < seen <= even + 1e-9 and np.isclose(epoch_coverage(w, 1), 1/len(w)) and seen*len(w) <= n + 1e-6
    assert np.isclose((epoch_coverage(w, n, by=items.label)*count).sum()/len(w), seen)
    tags = sample_weights(tagged[0], power)
    assert np.isclose(tags.sum(), 1) and (tags > 0).all()

@fast
@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**63), st.integers(0, 99), st.data())
def test_a_weighted_order_is_a_function_of_seed_and_epoch(size, n, seed, epoch, data):
    w = np.array(data.draw(st.lists(st.sampled_from([0, 0, .5, 1, 7]), min_size=size, max_size=size).filter(any)))
    def order(**kw): return SeededDL(list(range(size)), bs=4, num_workers=0, weights=w, n=n, **{**dict(seed=seed, epoch=epoch), **kw}).get_idxs()
    assert len(order()) == n and order() == order() and not set(order()) & set(np.flatnonzero(w == 0))
    if n > 60 and (w > 0).sum() > 5: assert order() != order(epoch=epoch + 1) != order(seed=seed + 1)

@fast
@given(st.integers(1, 20), st.integers(2, 9), st.floats(0, .9), st.floats(0, 5), st.booleans(), st.floats(.1, 300), st.integers(0, 2**32 - 1))
def test_losses_agree_on_hard_and_soft_targets(n, c, eps, gamma, weighted, scale, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = (scale*torch.randn(n, c, generator=g)).double().requires_grad_(), torch.randint(c, (n,), generator=g)
    soft, other = (torch.rand(n, c, generator=g).double().softmax(1) for _ in range(2))
    w = torch.rand(c, generator=g) + .1 if weighted else None
    onehot = torch.nn.functional.one_hot(y, c)
    for make in (lambda r, w=w: SoftTargetCE(w, eps, r), lambda r, w=w: FocalLoss(gamma, w, eps, r), lambda r, w=w: SoftTargetBCE(w, None, eps, r)):
        for r in ('mean', 'sum', 'none'): torch.testing.assert_close(make(r)(x, y), make(r)(x, onehot))
        torch.testing.assert_close(make('sum')(x, soft), make('none')(x, soft).sum())
        torch.testing.assert_close(make('none')(x, .3*soft + .7*other), .3*make('none')(x, soft) + .7*make('none')(x, other))
        if weighted: torch.testing.assert_close(make('mean')(x, soft), make('mean', 8*w)(x, soft))
        value = make('mean')(x, soft)
        slope, = torch.autograd.grad(value, x)
        assert value.isfinite() and slope.isfinite().all() and value >= 0
        assert torch.allclose(make('mean').activation(x).sum(1), torch.ones(n).double())
    for targ in (y, soft): assert torch.equal(FocalLoss(0, w, eps)(x, targ), SoftTargetCE(w, eps)(x, targ))
    assert (FocalLoss(gamma, w, eps, 'none')(x, soft) <= SoftTargetCE(w, eps, 'none')(x, soft) + 1e-9).all()

@fast
@given(st.integers(1, 30), st.integers(2, 9), st.floats(.01, 1), st.integers(0, 2**32 - 1))
def test_scores_of_thinned_tasks_come_back_as_probabilities(n, c, take, seed):
    p = np.random.default_rng(seed).dirichlet(np.full(c, .5), n).clip(1e-6, 1 - 1e-6)
    p /= p.sum(1, keepdims=True)
    thin = p/(p + take*(1 - p))
    assert np.allclose(combine_scores(thin, take), p)
    assert (combine_scores(thin, take).argmax(1) == combine_scores(thin).argmax(1)).all()

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(1, 9), st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_every_batch_knows_its_images(n, bs, repeated, weighted, drop_last, seeded, seed):
    "Whatever the order, repeated rows, dropped and odd last batches: each image of a batch carries the id that `batch_ids` names, in training and in validation."
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders, TfmdDL
    from fastai.learner import Learner
    from fastai.losses import MSELossFlat
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, n, 2*n) if repeated else rng.permutation(n)      # the image's mark: its number
    kw = dict(bs=bs, num_workers=0)
    data = lambda rows: torch.utils.data.TensorDataset(torch.tensor(rows).float()[:, None], torch.zeros(len(rows), 1))
    ds = data(rows)
    train = SeededDL(ds, seed=seed, drop_last=drop_last, **kw, **(dict(weights=rng.random(len(ds)) + .1, n=n + 3) if weighted else dict(shuffle=True))) if seeded else \
            TfmdDL(ds, shuffle=True, drop_last=drop_last, **kw)
    valid = (SeededDL if seeded else TfmdDL)(data(rows[:n]), **kw)
    for dl, ids in ((train, rows), (valid, rows[:n])): set_ids(dl, [f'image {o}' for o in ids])
    seen = []
    class Look(Callback):
        def before_batch(self): seen.append((batch_ids(self.learn).tolist(), [f'image {int(o)}' for o in self.xb[0][:, 0]]))
    learn = Learner(DataLoaders(train, valid), torch.nn.Linear(1, 1), loss_func=MSELossFlat(), cbs=Look(), lr=0., wd=0.)
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert all(said == true for said, true in seen)
    wanted = 2*(len(train)*bs if drop_last else train.n) + 2*n
    assert sum(len(said) for said, _ in seen) == wanted
