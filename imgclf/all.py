"""Everything for a notebook, by one `from imgclf.all import *`.

Written by hand: fastai's names come first and ours after, so that where both have a name, ours is meant. A new module is one line."""
from fastai.vision.all import *

from imgclf import demo
from imgclf.config import Config, config_table
from imgclf.core import InputError, batch_ids, set_ids
from imgclf.batch import find_bs
from imgclf.bench import BenchConfig, bench_table, run_bench
from imgclf.blend import blend_runs, blend_weights
from imgclf.callback.accumulate import Accumulate, EarlyStop
from imgclf.callback.average import EMA, SWA
from imgclf.callback.compile import Compile
from imgclf.callback.mix import CutMix, CutMixUp, MixUp
from imgclf.callback.plc import ProgressiveLabelCorrection, SoftLabels
from imgclf.callback.resize import ProgressiveSize, Stage, fit_progressive, set_size
from imgclf.callback.seed import SeedEpochs
from imgclf.callback.targets import TargetTable
from imgclf.calibration import calibrate_run, calibration_error, fit_temperature
from imgclf.callback.track import Track
from imgclf.callback.watch import Watch
from imgclf.compare import compare_runs
from imgclf.compose import config_learner, settle_bs
from imgclf.crossval import cross_validate
from imgclf.data.augment import presize_tfms
from imgclf.data.block import channel_stats, dls_stats, fold_block, fold_dls, items_dl, set_stats
from imgclf.data.cache import clear_caches, fill_cache, list_caches
from imgclf.data.clean import by_class, find_issues, prune
from imgclf.data.decode import PresizeBlock, PresizeImage, SafeImage, load_image, load_pixels
from imgclf.data.fold import make_folds, split_fold
from imgclf.data.loader import seeded
from imgclf.data.sample import class_weights, epoch_coverage, one_vs_rest, oversample, sample_weights, undersample
from imgclf.data.scan import find_duplicates, scan_images, scan_summary, show_scan
from imgclf.data.source import check_items, items_from_df, items_from_folder
from imgclf.data.soft import changed_labels, show_changed, soften_items, soften_labels
from imgclf.experiment import Experiment, load_run
from imgclf.export import export_onnx
from imgclf.interpret import Attribution, Explainer, attribute, show_attributions
from imgclf.learner import find_lr, make_learner
from imgclf.losses import FocalLoss, SoftTargetBCE, SoftTargetCE
from imgclf.mistakes import mistakes, show_confused, show_mistakes
from imgclf.models.maps import attention_maps, show_maps
from imgclf.models.zoo import create_model, list_zoo, plot_zoo, save_table, zoo_sources, zoo_table
from imgclf.one_vs_rest import one_vs_rest_study
from imgclf.overview import list_runs, rerun
from imgclf.report import write_report
from imgclf.results import class_scores, plot_classes
from imgclf.review import correct_items, doubtful, write_review
from imgclf.search import SearchConfig, run_search
from imgclf.submit import competition_folder, send_submission, write_submission
from imgclf.tta import merge_preds, tta, tta_gain
from imgclf.versus import write_comparison
from imgclf.weights import bundle_weights, list_weights
