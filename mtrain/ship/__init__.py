"""Models outside the trainer: predictions, calibration, export, and the predictor of what was exported."""

from mtrain.ship.predictor import Predictor

__all__ = ["Predictor"]
