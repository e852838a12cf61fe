"MixUp and CutMix against timm's `Mixup`, and properties that hold for any batch, targets and draws."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from timm.data.mixup import Mixup, rand_bbox
from torch.nn import functional as F

from imgclf.callback.mix import CutMix, CutMixUp, MixUp, cut_boxes, mix, outside
from imgclf.core import batch_key
from imgclf.losses import SoftTargetCE

fast = settings(max_examples=60, deadline=None, derandomize=True)

@st.composite
def batches(draw):
    "(images, targets, classes): 1 to 9 images of any size, targets as class numbers or as probabilities."
    n, c, h, w = draw(st.integers(1, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 17)), draw(st.integers(1, 17))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    y = torch.randint(c, (n,), generator=g)
    return torch.randn(n, draw(st.integers(1, 3)), h, w, generator=g), y if draw(st.booleans()) else torch.rand(n, c, generator=g).softmax(1), c

alphas = st.floats(.05, 5)
def mixers(alpha, beta, per): return MixUp(alpha, per=per), CutMix(beta, per=per), CutMixUp(alpha, beta, per=per)
pers = st.sampled_from(['image', 'batch'])

def mixed(cb, batch, seed, epoch=0):
    x, y, c = batch
    with batch_key(seed, epoch, np.arange(len(x))): (out,), targs = cb.mix_batch((x,), y, c)
    return out, targs

@fast
@given(batches(), alphas, alphas, pers, st.integers(0, 99))
def test_targets_are_probabilities_and_pixels_are_the_pairs(batch, alpha, beta, per, seed):
    x, y, c = batch
    soft = F.one_hot(y, c).float() if y.ndim == 1 else y
    kept = x.clone()
    for cb in mixers(alpha, beta, per):
        out, targs = mixed(cb, batch, seed)
        lam = cb.lam.float()[:, None]
        torch.testing.assert_close(targs.sum(1), torch.ones(len(x)))
        torch.testing.assert_close(targs, lam*soft + (1 - lam)*soft[cb.partner])
        assert sorted(cb.partner.tolist()) == list(range(len(x))) and (0 <= lam).all() and (lam <= 1).all() and len(out) == len(x)
        low, high = torch.minimum(x, x[cb.partner]), torch.maximum(x, x[cb.partner])
        assert (out >= low - 1e-5).all() and (out <= high + 1e-5).all()
        assert x.equal(kept)                                     # the batch itself is not written to
        if per == 'batch' and not isinstance(cb, CutMixUp): assert len(lam.unique()) == 1

@fast
@given(batches(), alphas, st.integers(0, 99))
def test_draws_depend_on_the_key_alone(batch, alpha, seed):
    for make in (MixUp, CutMix, CutMixUp):
        first, again, later = mixed(make(alpha), batch, seed), mixed(make(alpha), batch, seed), mixed(make(alpha), batch, seed, epoch=1)
        assert all(a.equal(b) for a, b in zip(first, again))
        if len(batch[0]) > 6 and make is MixUp: assert not first[0].equal(later[0])

@fast
@given(batches(), st.integers(0, 99), st.booleans(), st.sampled_from([0., .1]))
def test_share_one_is_the_image_whatever_the_weights(batch, seed, weighted, eps):
    x, y, c = batch
    g = torch.Generator().manual_seed(seed)
    soft, partner, ones = F.one_hot(y, c).float() if y.ndim == 1 else y, torch.randperm(len(x), generator=g), torch.ones(len(x))
    assert mix(x, partner, ones).equal(x) and mix(soft, partner, ones).equal(soft)
    assert mix(x, partner, ones*0).equal(x[partner]) and mix(x, torch.arange(len(x)), torch.rand(len(x), generator=g)).allclose(x)
    loss, logits = SoftTargetCE(torch.rand(c, generator=g) + .1 if weighted else None, eps), torch.randn(len(x), c, generator=g)
    torch.testing.assert_close(loss(logits, mix(soft, partner, ones)), loss(logits, y))

@fast
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_lam_is_what_the_clipped_box_leaves(h, w, seed):
    lam, cy, cx = np.random.default_rng(seed).random((3, 20))
    boxes, left = cut_boxes(lam, cy, cx, (h, w))
    top, bottom, l, r = boxes.T
    assert (0 <= top).all() and (top <= bottom).all() and (bottom <= h).all() and (0 <= l).all() and (l <= r).all() and (r <= w).all()
    own = outside(torch.from_numpy(boxes), (h, w))
    np.testing.assert_allclose(own.double().mean((1, 2, 3)).numpy(), left, atol=1e-12)
    for b, o in zip(boxes, own[:, 0]): assert not o[b[0]:b[1], b[2]:b[3]].any()

@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
@pytest.mark.parametrize('mode', ['elem', 'batch'])
@pytest.mark.parametrize('n', [2, 8])
def test_equals_timm(kind, mode, n):
    "timm pairs image i with image n-1-i; given its λ and its boxes, pixels and targets are the same."
    torch.manual_seed(0); np.random.seed(0)
    theirs, seen = Mixup(*((.4, 0.) if kind == 'mixup' else (0., 1.)), mode=mode, num_classes=5, label_smoothing=0.), []
    import timm.data.mixup as module
    def noted(*args, **kw): seen.append(rand_bbox(*args, **kw)); return seen[-1]
    x, y = torch.rand(n, 3, 12, 10), torch.randint(5, (n,))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, 'rand_bbox', noted)
        their_x, their_y = theirs(x.clone(), y)
    partner = torch.arange(n).flip(0)
    if kind == 'mixup':
        np.random.seed(0)
        lam = theirs._params_per_elem(n)[0] if mode == 'elem' else np.full(n, theirs._params_per_batch()[0])
        share = lam = torch.from_numpy(np.asarray(lam, dtype=np.float64))
    else:
        boxes = torch.tensor(np.array(seen if mode == 'elem' else seen*n))
        share = outside(boxes, (12, 10))
        lam = share.double().mean((1, 2, 3))
    torch.testing.assert_close(mix(x, partner, share), their_x)
    torch.testing.assert_close(mix(F.one_hot(y, 5).float(), partner, lam), their_y, check_dtype=False)

def test_boxes_are_distributed_like_timms():
    "Mean λ after clipping, and its spread, over many draws."
    rng = np.random.default_rng(0)
    lam, cy, cx = rng.random((3, 20000))
    ours = cut_boxes(lam, cy, cx, (64, 48))[1]
    np.random.seed(0)
    boxes = np.array([rand_bbox((3, 64, 48), l) for l in lam])
    theirs = 1 - (boxes[:, 1] - boxes[:, 0])*(boxes[:, 3] - boxes[:, 2])/(64*48)
    assert abs(ours.mean() - theirs.mean()) < .02 and abs(ours.std() - theirs.std()) < .02
