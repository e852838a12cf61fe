"""A corpus of image files as people really have them: each odd but sound one equals its plain RGB twin, each broken one gives one clear error."""
import io, os, sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from imgclf.core import InputError
from imgclf.data import decode as decode_module
from imgclf.data.decode import DECODERS, METHODS, ImageError, PresizeImage, SafeImage, as_rgb, load_image, load_pixels, presized, window
from imgclf.data import scan as scan_module
from imgclf.data.source import check_items, items_from_folder, scan_images

H, W = 40, 56

def picture():
    "Smooth and without any symmetry, so that lossy formats stay close and every turn shows; float (H, W, 3) in [0, 1]."
    y, x = np.mgrid[0:1:H*1j, 0:1:W*1j]
    return np.stack([x, y, (x*y + (1 - x)**2) / 2], -1)

RGB = (picture() * 255).round().astype(np.uint8)
GREY = np.asarray(Image.fromarray(RGB).convert('L'))
ALPHA = np.broadcast_to(np.linspace(0, 255, W).round().astype(np.uint8), (H, W))
TWIN, GREY_TWIN = RGB, np.repeat(GREY[..., None], 3, -1)

def on_white(px, alpha):
    a = alpha[..., None] / 255
    return (px * a + 255 * (1 - a)).round().astype(np.uint8)

def write(make, path):
    make(path)
    return path

def palette(path, fmt, **kw):
    "Four colours, one of them transparent (with red lying under it)."
    im = Image.fromarray(np.arange(H*W, dtype=np.uint8).reshape(H, W) % 4).convert('P')
    im.putpalette([255, 0, 0,  0, 255, 0,  0, 0, 255,  9, 9, 9])
    im.save(path, fmt, transparency=0, **kw)
COLOURS = np.array([[255, 255, 255], [0, 255, 0], [0, 0, 255], [9, 9, 9]], dtype=np.uint8)
PALETTE_TWIN = COLOURS[(np.arange(H*W) % 256 % 4).reshape(H, W)]

def frames(path, fmt, **kw):
    "The picture, then two frames of noise."
    more = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (H, W, 3), dtype=np.uint8)) for i in range(2)]
    Image.fromarray(RGB).save(path, fmt, save_all=True, append_images=more, duration=50, **kw)

def png16_rgb(path):
    "A 16-bit RGB PNG, which PIL cannot write: header, rows of big-endian samples, checksums."
    import struct, zlib
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    rows = (RGB.astype('>u2') * 257).reshape(H, -1)
    raw = b''.join(b'\0' + r.tobytes() for r in rows)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', W, H, 16, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(raw)) + chunk(b'IEND', b''))

def oriented(turn, fmt, **kw):
    "The stored pixels are such that a viewer who applies `turn` sees the picture."
    T = Image.Transpose
    undo = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE, 6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}
    def make(path):
        im = Image.fromarray(RGB)
        if turn in undo: im = im.transpose(undo[turn])
        exif = Image.Exif(); exif[0x0112] = turn
        im.save(path, fmt, exif=exif, **kw)
    return make

def lab(path):
    srgb, lab = (ImageCms.createProfile(o) for o in ('sRGB', 'LAB'))
    ImageCms.applyTransform(Image.fromarray(RGB), ImageCms.buildTransform(srgb, lab, 'RGB', 'LAB')).save(path)

def damaged_exif(path):
    f = io.BytesIO(); Image.fromarray(RGB).save(f, 'PNG', exif=b'Exif\0\0MM\0*garbage'); path.write_bytes(f.getvalue())

img = Image.fromarray
GREY16 = np.asarray(GREY).astype(np.uint16) * 257
# name: (writer, what a person sees, tolerance in grey levels for what a lossy format or a palette costs)
SOUND = {
    'plain.png':        (lambda p: img(RGB).save(p), TWIN, 0),
    'plain.jpg':        (lambda p: img(RGB).save(p, quality=98, subsampling=0), TWIN, 4),
    'progressive.jpg':  (lambda p: img(RGB).save(p, quality=98, subsampling=0, progressive=True), TWIN, 4),
    'plain.webp':       (lambda p: img(RGB).save(p, lossless=True), TWIN, 0),
    'plain.bmp':        (lambda p: img(RGB).save(p), TWIN, 0),
    'plain.tif':        (lambda p: img(RGB).save(p), TWIN, 0),
    'png_named.jpg':    (lambda p: img(RGB).save(p, 'PNG'), TWIN, 0),
    'upper.JPG':        (lambda p: img(RGB).save(p, 'JPEG', quality=98, subsampling=0), TWIN, 4),
    'cmyk.jpg':         (lambda p: img(RGB).convert('CMYK').save(p, quality=98), TWIN, 6),
    'cmyk.tif':         (lambda p: img(RGB).convert('CMYK').save(p), TWIN, 1),
    'grey.jpg':         (lambda p: img(GREY).save(p, quality=98), GREY_TWIN, 4),
    'grey.png':         (lambda p: img(GREY).save(p), GREY_TWIN, 0),
    'grey16.png':       (lambda p: img(GREY16).save(p), GREY_TWIN, 0),
    'grey16.tif':       (lambda p: img(GREY16).save(p), GREY_TWIN, 0),
    'grey16_be.tif':    (lambda p: img(GREY16).save(p, big_endian=True), GREY_TWIN, 0),
    'rgb16.png':        (png16_rgb, TWIN, 0),
    'grey32.tif':       (lambda p: img(GREY16.astype(np.int32)).save(p), GREY_TWIN, 0),
    'float.tif':        (lambda p: img((GREY / 255).astype(np.float32)).save(p), GREY_TWIN, 0),
    'la.png':           (lambda p: Image.merge('LA', (img(GREY), img(ALPHA))).save(p), on_white(GREY_TWIN, ALPHA), 1),
    'rgba.png':         (lambda p: img(np.dstack([RGB, ALPHA])).save(p), on_white(RGB, ALPHA), 1),
    'rgba.webp':        (lambda p: img(np.dstack([RGB, ALPHA])).save(p, lossless=True, exact=True), on_white(RGB, ALPHA), 1),
    'rgba.tif':         (lambda p: img(np.dstack([RGB, ALPHA])).save(p), on_white(RGB, ALPHA), 1),
    'palette.png':      (lambda p: palette(p, 'PNG'), PALETTE_TWIN, 0),
    'palette.gif':      (lambda p: palette(p, 'GIF'), PALETTE_TWIN, 0),
    'colour_key.png':   (lambda p: img(PALETTE_TWIN).save(p, transparency=(9, 9, 9)), np.where(PALETTE_TWIN == 9, 255, PALETTE_TWIN), 0),
    'lab.tif':          (lab, TWIN, 34),
    'bilevel.png':      (lambda p: img(GREY > 99).save(p), np.where(GREY_TWIN > 99, 255, 0), 0),
    'bilevel.tif':      (lambda p: img(GREY > 99).save(p, compression='group4'), np.where(GREY_TWIN > 99, 255, 0), 0),
    'animated.gif':     (lambda p: frames(p, 'GIF'), TWIN, 24),
    'animated.png':     (lambda p: frames(p, 'PNG'), TWIN, 0),
    'animated.webp':    (lambda p: frames(p, 'WEBP', lossless=True), TWIN, 0),
    'pages.tif':        (lambda p: frames(p, 'TIFF'), TWIN, 0),
    'one.png':          (lambda p: img(RGB[:1, :1]).save(p), TWIN[:1, :1], 0),
    'one.jpg':          (lambda p: img(RGB[9:10, 9:10]).save(p, quality=98), TWIN[9:10, 9:10], 4),
    'one_bilevel.png':  (lambda p: img(np.array([[True]])).save(p), np.full((1, 1, 3), 255), 0),
    'damaged_exif.png': (damaged_exif, TWIN, 0),
    **{f'exif{t}.jpg':  (oriented(t, 'JPEG', quality=98, subsampling=0), TWIN, 4) for t in range(1, 9)},
    **{f'exif{t}.png':  (oriented(t, 'PNG'), TWIN, 0) for t in range(1, 9)},
    **{f'exif{t}.webp': (oriented(t, 'WEBP', lossless=True), TWIN, 0) for t in (1, 6)},
    **{f'exif{t}.tif':  (oriented(t, 'TIFF'), TWIN, 0) for t in (1, 3, 6)},
    'exif9.png':        (oriented(9, 'PNG'), TWIN, 0),
}

def text(path): path.write_bytes(b'<!DOCTYPE html><title>404</title>')
def cut(fmt, share=.5):
    def make(path):
        f = io.BytesIO(); img(RGB).resize((560, 400)).save(f, fmt); path.write_bytes(f.getvalue()[:int(len(f.getvalue()) * share)])
    return make

BROKEN = {
    'text.jpg':      (text, 'not an image in a known format'),
    'empty.jpg':     (lambda p: p.write_bytes(b''), 'empty (0 bytes)'),
    'cut.jpg':       (cut('JPEG'), 'truncated'),
    'cut_late.jpg':  (cut('JPEG', .97), 'truncated'),
    'cut.png':       (cut('PNG'), 'broken'),
    'cut.webp':      (cut('WEBP'), ''),
    'cut.tif':       (cut('TIFF'), ''),
    'header.jpg':    (lambda p: p.write_bytes(b'\xff\xd8\xff\xe0\x00\x10JFIF'), ''),
    'bomb.png':      (lambda p: Image.new('1', (20_000, 10_000)).save(p), 'megapixels'),
    'bomb.gif':      (lambda p: p.write_bytes(b'GIF89a' + b'\xff\xff\xff\xff\x80\x00\x00' + b'\0'*6 + b',\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;'), 'megapixels'),
    'large.png':     (lambda p: Image.new('1', (12_000, 10_000)).save(p), '12000x10000'),
    'folder.jpg':    (lambda p: p.mkdir(), 'folder'),
    'absent.jpg':    (lambda p: None, 'no such file'),
}

def close(got, want, tol):
    got = np.asarray(got)
    assert got.dtype == np.uint8 and got.shape == want.shape
    assert np.abs(got.astype(int) - want).max() <= tol

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', SOUND)
def test_odd_but_sound(name, tmp_path):
    make, want, tol = SOUND[name]
    path = write(make, tmp_path/name)
    im = load_image(path)
    assert im.mode == 'RGB' and not im.info
    close(im, want, tol)
    close(load_image(path.read_bytes()), want, tol)
    assert type(SafeImage.create(path)) is SafeImage
    close(SafeImage.create(str(path)), want, tol)
    with Image.open(path) as opened: close(SafeImage.create(opened), want, tol)

QUICK = {'plain.jpg', 'progressive.jpg', 'upper.JPG', 'grey.jpg', 'one.jpg', 'exif1.jpg'}

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', SOUND)
def test_fast_pixels_are_the_same(name, tmp_path, monkeypatch):
    "Whoever decodes, and once; the resize is Pillow's within .01 of 255 on average."
    make, want, tol = SOUND[name]
    path, asked = write(make, tmp_path/name), []
    with monkeypatch.context() as m:
        m.setattr(decode_module, 'as_rgb', lambda im: asked.append(im) or as_rgb(im))
        x = load_pixels(path)
    assert len(asked) == (name not in QUICK)
    assert x.dtype is torch.uint8 and torch.equal(x.permute(1, 2, 0), torch.from_numpy(np.array(load_image(path))))
    assert torch.equal(load_pixels(path.read_bytes()), x)
    im = load_image(path)
    for hw in ((40, 50), (13, 7), (90, 80)):
        off = np.abs(presized(path, hw).permute(1, 2, 0).numpy().astype(int) - np.asarray(im.resize(hw[::-1], Image.Resampling.BILINEAR)))
        assert off.max() <= 1
        off_by.append(off.mean())
        for method in METHODS:
            for decoder in DECODERS:
                x = PresizeImage(hw, method, decoder)(path, split_idx=1)
                assert x.shape == (3, *hw) and x.is_contiguous()
                assert torch.equal(x, window(presized(path, hw, method, decoder), hw))
    assert np.mean(off_by) <= .01

off_by = []      # over the whole corpus so far

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', BROKEN)
def test_broken(name, tmp_path):
    make, reason = BROKEN[name]
    path = write(make, tmp_path/name)
    for read in (SafeImage.create, load_pixels, PresizeImage(9), PresizeImage((9, 9), 'crop', 'reduced')):
        with pytest.raises(ImageError) as e: read(path)
        assert isinstance(e.value, InputError) and reason in str(e.value)
        assert str(path) in str(e.value) and '\n' not in str(e.value)     # one message that names the file

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('n_workers', [0, 2])
def test_scan_finds_the_broken_ones_and_only_them(n_workers, tmp_path):
    for kind, corpus in dict(sound=SOUND, broken=BROKEN).items():
        (tmp_path/kind).mkdir()
        for name, (make, *_) in corpus.items(): make(tmp_path/kind/name)
    items = items_from_folder(tmp_path)
    there = {n for n in BROKEN if n not in ('folder.jpg', 'absent.jpg')}
    assert len(items) == len(SOUND) + len(there)
    scan = scan_images(items, n_workers=n_workers)
    assert list(scan.index) == list(items.id)
    assert set(scan.index[~scan.ok]) == {f'broken/{n}' for n in there}
    assert (scan.error[~scan.ok] != '').all() and (scan.error[scan.ok] == '').all()
    for name, (_, want, _) in SOUND.items():
        row = scan.loc[f'sound/{name}']
        assert (row.height, row.width) == want.shape[:2], name        # as seen, after the EXIF turn
        assert len(row.phash) == 16 and len(row.sha1) == 40
    with pytest.raises(InputError) as e: check_items(items, scan)
    assert f'{len(there)} unreadable' in str(e.value)
    with pytest.warns(UserWarning, match=f'dropped {len(there)} row'): kept = check_items(items, scan, on_bad='drop')
    assert set(kept.label) == {'sound'}

@pytest.mark.skipif(sys.platform != 'linux', reason='the fault is planted in a forked worker')
def test_a_worker_that_dies_loses_one_file_only(tmp_path, monkeypatch):
    (tmp_path/'a').mkdir()
    for i in range(150): img(RGB).save(tmp_path/f'a/{i}.png')
    items, whole, parent = items_from_folder(tmp_path), scan_module.open_image, os.getpid()
    def deadly(src, name=None, **kw):
        if os.getpid() != parent and name.endswith(('/7.png', '/120.png')): os._exit(139)     # as a decoder that breaks down
        return whole(src, name, **kw)
    monkeypatch.setattr(scan_module, 'open_image', deadly)
    scan = scan_images(items, n_workers=2)
    assert list(scan.index[~scan.ok]) == ['a/7.png', 'a/120.png']
    assert scan.error['a/7.png'] == 'broken: the decoder crashed on it'
