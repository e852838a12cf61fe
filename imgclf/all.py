"""Everything for a notebook, by one `from imgclf.all import *`.

Written by hand: fastai's names come first and ours after, so that where both have a name, ours is meant. A new module is one line."""
from fastai.vision.all import *

from imgclf import demo
from imgclf.config import Config, config_table
from imgclf.core import InputError, batch_ids, set_ids
from imgclf.data.augment import presize_tfms
from imgclf.data.block import channel_stats, fold_dls
from imgclf.data.fold import make_folds, split_fold
from imgclf.data.source import find_duplicates, items_from_df, items_from_folder, scan_images, show_scan
from imgclf.losses import SoftTargetCE
from imgclf.submit import write_submission
