"""The whole public interface: what `import visgraft` offers, gathered when the first of it is asked for."""

# ruff: noqa: F401  (everything imported here is for users)
# mypy: implicit-reexport
from visgraft.adapters.blending import blend
from visgraft.adapters.directory import Adapted, load, save
from visgraft.adapters.publish import push
from visgraft.algebra.diff import AdapterDiff, diff_adapters
from visgraft.algebra.nearest import NearestAdapters, nearest_adapters
from visgraft.algebra.truncation import Truncation, truncate_adapter
from visgraft.backbones.creation import Backbone, create_backbone, model_data_config
from visgraft.bank.bank import Bank, BankAnswer
from visgraft.bank.opening import load_bank
from visgraft.check.findings import Report
from visgraft.check.run import check_data
from visgraft.core.attach import ParameterCount, attach, count_parameters, detach
from visgraft.data.dataset import Dataset, Example, Split
from visgraft.data.folders import read_folder
from visgraft.data.images import Images, Loading, load_images
from visgraft.data.label_columns import LabelColumns
from visgraft.data.read import Source, read_data
from visgraft.data.tasks import LabelTask
from visgraft.errors import DataError, VisgraftError
from visgraft.export.certificate import Certificate
from visgraft.export.merge import merge
from visgraft.export.plain import merge_adapter
from visgraft.export.proof import ExportCertificate
from visgraft.export.run import export_adapter, export_model, list_formats
from visgraft.measure.evaluation import Evaluation, evaluate
from visgraft.measure.measuring import eval_adapter
from visgraft.measure.numbers import NumberFigures
from visgraft.methods import *  # noqa: F403  (the options of every method, so that adding one touches no list)
from visgraft.methods import list_methods
from visgraft.methods.salience import salient_channels
from visgraft.options import MethodConfig, TrainConfig
from visgraft.report.page import build_report
from visgraft.search.blending import BlendSearch, search_blend
from visgraft.search.result import Comparison
from visgraft.search.run import compare
from visgraft.serve.prediction import Prediction, predict, predict_rows, predict_stream
from visgraft.training.folds import CrossValidation, cross_validate
from visgraft.training.forecast import forecast_folder
from visgraft.training.loop import Training, train
from visgraft.training.resume import Epoch, TrainState
from visgraft.training.run import train_folder
