"""`report_to`: the name of a tracker -> the callback that reports to it.

TensorBoard is ours. For the services, transformers has callbacks that need nothing of its trainer; they are imported when
one is asked for, and nothing is contacted otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from etude.errors import ConfigError, nearest, require
from etude.observe.tensorboard import TensorBoardCallback

# name in report_to -> the module that must import, and what installs it
_PACKAGES: Mapping[str, tuple[str, str]] = {
    "azure_ml": ("azureml.core", "azureml-sdk"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dagshub": ("dagshub", "dagshub"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}
_WITHOUT_PACKAGE = ("kubeflow",)  # its callback speaks to the server that the job names, with Python's own library
TRACKER_NAMES: tuple[str, ...] = ("tensorboard", *_PACKAGES, *_WITHOUT_PACKAGE)


def tracker_callbacks(args: Any) -> list[Any]:
    """A callback for each tracker that `args.report_to` names, and TensorBoard's where `args.logging_dir` is given.

    Raises:
        ConfigError: a name that does not exist.
        MissingDependencyError: the package of a tracker is not installed.
    """
    names = requested(args.report_to)
    if getattr(args, "logging_dir", None) and "tensorboard" not in names:
        names.append("tensorboard")
    return [_callback(name) for name in names]


def requested(report_to: str | list[str] | None) -> list[str]:
    """The names without repetition: "none" is nothing, "all" is every tracker that is installed."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    if "all" in names:
        from transformers.integrations import get_available_reporting_integrations

        names = [name for name in get_available_reporting_integrations() if name in TRACKER_NAMES]
    return list(dict.fromkeys(name for name in names if name != "none"))


# Callbacks of transformers that act at on_save only where they were told to upload checkpoints.
_UPLOADS: Mapping[str, Callable[[Any], bool]] = {
    "WandbCallback": lambda callback: getattr(callback._log_model, "value", callback._log_model) == "checkpoint",
    "MLflowCallback": lambda callback: bool(getattr(callback, "_log_artifacts", False)),
    "ClearMLCallback": lambda callback: bool(getattr(callback, "_log_model", False)),
    "DVCLiveCallback": lambda callback: callback._log_model == "all",
    "TrackioCallback": lambda callback: False,
}


def uploads_checkpoints(callback: Any) -> bool | None:
    """Whether the callback of a tracker uploads each checkpoint; None for one that is not known here."""
    kind = type(callback)
    if kind.__name__ not in _UPLOADS or not kind.__module__.startswith("transformers."):
        return None
    try:
        return _UPLOADS[kind.__name__](callback)
    except AttributeError:  # another version of it
        return None


def _callback(name: str) -> Any:
    if name == "tensorboard":
        return TensorBoardCallback()
    if name not in TRACKER_NAMES:
        near = nearest(name, TRACKER_NAMES)
        hint = f"did you mean '{near}'?" if near else f"known: {', '.join(TRACKER_NAMES)}"
        raise ConfigError(f"unknown tracker '{name}'; {hint}", field="report_to")
    if name in _PACKAGES:
        module, package = _PACKAGES[name]
        require(module, purpose=f"report_to='{name}'", install=f"pip install {package}")
    from transformers.integrations import get_reporting_integration_callbacks

    (callback_class,) = get_reporting_integration_callbacks([name])
    return callback_class()
