"""Quantization: calibration data, what it shows of every linear's inputs, and rounding of weights.

`load_calibration` reads data; `DecoderCalibrator` and `VisionCalibrator` run `torch_model` over it;
`round_to_nearest` and `gptq` turn weights into integers; `static_vision` quantizes a whole vision
graph with activations. How integers are laid out in files is the graph writers' business.
"""

from lrs_edge_export.quantization.calibration import CalibrationData, load_calibration
from lrs_edge_export.quantization.calibrators import DecoderCalibrator, VisionCalibrator
from lrs_edge_export.quantization.channels import quantize_channels, saturates
from lrs_edge_export.quantization.error_feedback import gptq
from lrs_edge_export.quantization.results import KeptStates, Results, Rounded
from lrs_edge_export.quantization.rounding import Quantized, dequantize, round_to_nearest
from lrs_edge_export.quantization.static import StaticVision, spread, static_vision
from lrs_edge_export.quantization.statistics import MAX_BLOCK, Calibrator, InputStatistics

__all__ = [
    "MAX_BLOCK",
    "CalibrationData",
    "Calibrator",
    "DecoderCalibrator",
    "InputStatistics",
    "KeptStates",
    "Quantized",
    "Results",
    "Rounded",
    "StaticVision",
    "VisionCalibrator",
    "dequantize",
    "gptq",
    "load_calibration",
    "quantize_channels",
    "round_to_nearest",
    "saturates",
    "spread",
    "static_vision",
]
