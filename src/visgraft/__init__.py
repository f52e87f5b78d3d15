"""visgraft adapts a frozen, pretrained vision backbone by training well under 1 % extra parameters.

This is the whole public interface; docs/architecture.md says how the parts fit together.
"""

# ruff: noqa: F401  (everything imported here is for users)
import os

if "_VISGRAFT_COMPLETE" not in os.environ:  # a shell that completes a word should not wait for torch
    from visgraft.adapter import load, save
    from visgraft.attach import ParameterCount, attach, count_parameters, detach
    from visgraft.backbone import Adapted, Backbone, create_backbone, model_data_config
    from visgraft.certificate import Certificate
    from visgraft.config import MethodConfig, TrainConfig
    from visgraft.data.dataset import Dataset, Example, Split
    from visgraft.data.folders import read_folder
    from visgraft.data.images import Images, load_images
    from visgraft.data.read import Source, read_data
    from visgraft.errors import DataError, VisgraftError
    from visgraft.evaluate import Evaluation, evaluate
    from visgraft.merge import merge
    from visgraft.methods import *  # noqa: F403  (the options of every method, so that adding one touches no list)
    from visgraft.predict import Prediction, predict, predict_stream
    from visgraft.registry import methods
    from visgraft.resume import Epoch, TrainState
    from visgraft.salience import salient_channels
    from visgraft.train import Training, train

__version__ = "0.1.0"
