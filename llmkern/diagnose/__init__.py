"""Which hardware wall each op of a model hits, where its memory is, and what would change that."""

from .diagnosis import diagnose
from .predict import Prediction, predict
from .report import Diagnosis
from .workload import Workload

__all__ = ["Diagnosis", "Prediction", "Workload", "diagnose", "predict"]
